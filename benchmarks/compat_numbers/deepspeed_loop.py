"""Written for DeepSpeed: one training a feature at the stage that is given, rank 0's losses as JSON."""

import json
import sys

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

out, stage = sys.argv[1], int(sys.argv[2])
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01, "torch_adam": True}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 5}}
FEATURES = {
    "fp32": {"gradient_clipping": 0},
    "accumulation 2": {"gradient_accumulation_steps": 2},
    "clipping 0.1": {"gradient_clipping": 0.1},
    "WarmupLR": {"scheduler": WARMUP},
    "bf16": {"bf16": {"enabled": True}},
}


class Model(nn.Module):
    def __init__(self, width=32, depth=3):
        super().__init__()
        self.embed = nn.Embedding(61, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.head = nn.Linear(width, 61, bias=False)

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return F.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(name, more):
    torch.manual_seed(0)
    model = Model()
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": ADAM, "zero_optimization": {"stage": stage}, **more}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(16):
        start = torch.arange(4)[:, None] + 7 * (step * ranks + rank)
        ids = ((start + torch.arange(16)[None] * (1 + start % 3)) % 61).to(engine.device)
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


deepspeed.init_distributed()
found = {name: train(name, more) for name, more in FEATURES.items()}
if torch.distributed.get_rank() == 0:
    with open(out, "w") as file:
        json.dump(found, file)
