"""Written for Accelerate: one training a feature, the losses of all ranks' batches as JSON on rank 0."""

import json
import sys
import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

FEATURES = [
    "fp32",
    "accumulation 2",
    "clipping 0.1",
    "groups and schedule",
    "uneven last batch",
    "save and resume",
    "bf16",
]


class Model(nn.Module):
    def __init__(self, width=32, depth=3):
        super().__init__()
        self.embed = nn.Embedding(61, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.head = nn.Linear(width, 61, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return F.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(feature):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    steps = 2 if feature.startswith("accumulation") else 1
    accelerator = Accelerator(
        gradient_accumulation_steps=steps, mixed_precision="bf16" if feature == "bf16" else "no", cpu=True
    )
    set_seed(3)
    model = Model()
    groups = [{"params": model.parameters()}]
    if feature.startswith("groups"):
        plain = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": plain, "lr": 0.02},
        ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 8))
    count = 90 if feature.startswith("uneven") else 96
    ids = (torch.arange(count)[:, None] + torch.arange(16)[None] * (1 + torch.arange(count)[:, None] % 3)) % 61
    loader = torch.utils.data.DataLoader(list(ids), batch_size=4, shuffle=not feature.startswith("save"))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = []

    def epoch():
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch)
                accelerator.backward(loss)
                if feature.startswith("clipping"):
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                if feature.startswith("groups"):
                    schedule.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach().float(), "mean").item())

    epoch()
    if feature.startswith("save"):
        folder = broadcast_object_list([tempfile.mkdtemp()])[0]
        accelerator.save_state(folder)
        epoch()
        del losses[-len(loader) :]
        accelerator.load_state(folder)
    epoch()
    last = accelerator.is_main_process
    accelerator.free_memory()
    return losses, last


found = {}
for name in FEATURES:
    found[name], is_main = train(name)
if is_main:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
