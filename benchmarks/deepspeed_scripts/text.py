"""A loop in Hugging Face's style: a tiny language model, two losses with a backward each, accumulation."""

import argparse
import json

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--out", type=str)
parser.add_argument("--one_backward", action="store_true")
parser.add_argument("--save_to", help="a checkpoint after the first epoch")
parser.add_argument("--load_from", help="a checkpoint, from which the second epoch goes on")
deepspeed.add_config_arguments(parser)
args = parser.parse_args()

deepspeed.init_distributed()
torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        mixed = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        return x + self.down(F.gelu(self.up(self.norm(mixed))))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary=61, width=32, depth=3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden).float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return {"loss": loss, "z_loss": 1e-2 * logits.logsumexp(-1).pow(2).mean(), "logits": logits}


with deepspeed.zero.Init(config_dict_or_path=args.deepspeed_config, enabled=False):
    model = LanguageModel()
decay = [p for n, p in model.named_parameters() if "norm" not in n and "bias" not in n]
rest = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=5e-3)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
engine, optimizer, _, scheduler = deepspeed.initialize(
    args=args, model=model, optimizer=optimizer, lr_scheduler=scheduler
)
start = torch.arange(96)[:, None] % 61
ids = (start + torch.arange(24)[None] * (1 + start % 3)) % 61
data = TensorDataset(ids)
sampler = DistributedSampler(data, seed=3)
loader = DataLoader(data, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler)
losses, norms = [], []
if args.load_from:
    _, client = engine.load_checkpoint(args.load_from)
for epoch in range(client["epochs"] if args.load_from else 0, 2):
    sampler.set_epoch(epoch)
    for (batch,) in loader:
        outputs = engine(input_ids=batch.to(engine.device))
        if args.one_backward:
            engine.backward(outputs["loss"] + outputs["z_loss"])
        else:
            engine.backward(outputs["loss"], retain_graph=True)
            engine.backward(outputs["z_loss"])
        engine.step()
        losses.append(outputs["loss"].item())
    if args.save_to and epoch == 0:
        engine.save_checkpoint(args.save_to, client_state={"epochs": 1})
norm = engine.get_global_grad_norm()
if torch.distributed.get_rank() == 0:
    with open(args.out, "w") as file:
        json.dump({"losses": losses, "lr": engine.get_lr()[0], "norm": norm and float(norm)}, file)
