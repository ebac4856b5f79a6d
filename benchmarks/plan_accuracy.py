"""Predicted against measured: memory and step time of every stage, on this machine's CPU.

    python benchmarks/plan_accuracy.py [--steps 5]

Trains a byte-level GPT in two gloo ranks, each with one thread on a core of its own, for 32 combinations of stage,
format, width and micro-batch, and prints what the planner said beside what came out: bytes of the model states, peak
resident set, and seconds of a step. The rates come from a run of stage 0 (the first row of each width and format).
Goals: states within 2%, total within 8%, time within 15%.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

from distui.core.hardware import GIB, Cpu, Hardware
from distui.core.plan.memory import footprint
from distui.core.plan.models import gpt
from distui.core.plan.search import Request, strategies
from distui.core.plan.time import CPU_EFFICIENCY, rates_of, step_time
from distui.core.plan.types import ModelSpec

WIDTHS = {"tiny": (2, 32, 2, 16), "wide": (4, 768, 12, 128), "deep": (16, 256, 8, 128)}
VOCAB = 256
CASES = [
    (width, dtype, micro, stage)
    for width in ("wide", "deep")
    for dtype in ("fp32", "bf16")
    for micro in (2, 8)
    for stage in (0, 1, 2, 3)
]


def spec_of(width: str) -> ModelSpec:
    """Return the shapes of the benchmark's model as the planner takes them."""
    layers, hidden, heads, length = WIDTHS[width]
    return gpt(
        width,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        vocab_size=VOCAB,
        sequence_length=length,
        tied_embeddings=False,
    )


def build(width: str) -> Any:
    """Return the torch model of the same shapes."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    layers, hidden, heads, length = WIDTHS[width]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
            self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

        def forward(self, x: Any) -> Any:
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, hidden))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.position = nn.Embedding(VOCAB, hidden), nn.Embedding(length, hidden)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, VOCAB, bias=False)

        def forward(self, ids: Any) -> Any:
            x = self.embedding(ids) + self.position(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    return GPT()


def worker(options: argparse.Namespace) -> None:
    """Train one combination as one rank and print its figures. Collective: both ranks."""
    os.sched_setaffinity(0, {options.rank % (os.cpu_count() or 1)})
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F

    from distui.core.precision import apply_border_casts
    from distui.core.sharding.sharded import ShardedModel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{options.store}", rank=options.rank, world_size=2)
    low = torch.bfloat16 if options.dtype == "bf16" else None
    torch.manual_seed(options.rank)
    ids = torch.randint(0, VOCAB, (options.micro, WIDTHS[options.width][3] + 1))
    model = build(options.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    sharded = ShardedModel(model, stage=options.stage, group=dist.group.WORLD, compute_dtype=low)
    if low is not None:
        apply_border_casts(model, low)
    prepared = sharded.prepare_optimizer(optimizer)
    seconds = []
    for _ in range(options.steps + 2):
        dist.barrier()
        start = time.perf_counter()
        sharded.schedule.hide_gradients()
        loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        sharded.schedule.end_backward()
        prepared.step()
        prepared.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = sharded.memory_by_category()
    if options.rank == 0:
        print(json.dumps({"memory": memory, "peak": peak, "step_s": statistics.median(seconds[2:])}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(width: str, dtype: str, micro: int, stage: int, steps: int) -> dict[str, Any]:
    """Return the figures of one combination from two fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--store", f"{folder}/store", "--width", width, "--dtype", dtype]
        command += ["--micro", str(micro), "--stage", str(stage), "--steps", str(steps)]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)
        ]
        texts = [process.communicate()[0] for process in ranks]
        if any(process.returncode for process in ranks):
            raise SystemExit(f"{width} {dtype} {micro} {stage} failed")
    found = json.loads(texts[0])
    assert isinstance(found, dict)
    return found


def machine(flops: float, dtype: str, copy_rate: float) -> Hardware:
    """Return two CPU ranks with the rates that the calibration gave."""
    cpu = Cpu("benchmark", 2, 2, 2, peak_flops={dtype: 2 * flops / CPU_EFFICIENCY}, memory_bandwidth=2 * copy_rate)
    return Hardware(
        name="benchmark",
        nodes=1,
        gpus_per_node=(),
        cpu=cpu,
        memory_total_bytes=64 * GIB,
        memory_available_bytes=64 * GIB,
        rank_bandwidth=copy_rate / 4,
    )


def main() -> None:
    """Print one line a combination and the largest errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--copy-rate", type=float, default=8e9, help="memory copy rate of one core, bytes/s")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--store")
    parser.add_argument("--width")
    parser.add_argument("--dtype")
    parser.add_argument("--micro", type=int)
    parser.add_argument("--stage", type=int)
    options = parser.parse_args()
    if options.rank is not None:
        worker(options)
        return
    print("width dtype micro stage |  states MiB plan/real |   total MiB plan/real |   step ms plan/real")
    flops: dict[tuple[str, str], float] = {}
    errors: dict[str, list[float]] = {"states": [], "total": [], "step": []}
    for width, dtype, micro, stage in CASES:
        real = measure(width, dtype, micro, stage, options.steps)
        model = spec_of(width)
        rate = flops.get((width, dtype), 1e10)
        hardware = machine(rate, dtype, options.copy_rate)
        request = Request(model, hardware, 2, dtype, "fp32", "adamw", 0.08, micro_size=micro)
        strategy = next(each for each in strategies(request) if each.zero_stage == stage)
        strategy = replace(strategy, micro_size=micro)
        memory = footprint(model, strategy, "cpu")
        timing = step_time(model, strategy, rates_of(hardware, dtype, 2))
        total_s = timing.total_s
        assert total_s is not None
        if (width, dtype) not in flops:
            # What is left of the measured step after communication and optimizer is compute.
            compute_s = real["step_s"] - (total_s - timing.forward_s - timing.backward_s)
            flops[width, dtype] = timing.flops / max(compute_s, 1e-6)
            total_s = real["step_s"]
        states = sum(real["memory"][key] for key in ("parameters", "gradients", "optimizer_states"))
        rows = {
            "states": (memory.model_states, states),
            "total": (memory.total, real["peak"]),
            "step": (total_s, real["step_s"]),
        }
        for key, (planned, measured) in rows.items():
            errors[key].append(planned / measured - 1)
        print(
            f"{width:>5} {dtype:>5} {micro:5d} {stage:5d} | {memory.model_states / 2**20:8.1f} {states / 2**20:8.1f} "
            f"{errors['states'][-1]:+5.1%} | {memory.total / 2**20:8.1f} {real['peak'] / 2**20:8.1f} "
            f"{errors['total'][-1]:+5.1%} | {total_s * 1e3:7.0f} {real['step_s'] * 1e3:7.0f} "
            f"{errors['step'][-1]:+5.1%}",
            flush=True,
        )
    for key, values in errors.items():
        print(f"{key}: median {statistics.median(values):+.1%}, largest {max(values, key=abs):+.1%}")


if __name__ == "__main__":
    main()
