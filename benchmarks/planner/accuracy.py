"""Predicted against measured: memory and step time of 34 combinations, on this machine's CPU.

    python benchmarks/planner/accuracy.py [--steps 3] [--clock cpu]

Calibrates two ranks as `distui plan --calibrate --nproc 2` does, then trains a byte-level GPT in two fresh gloo ranks,
each with one thread on a core of its own, for every combination of CASES, and prints what the planner said beside
what came out: bytes of the model states, peak resident set, and seconds of a step. With `--clock cpu` both the
calibration and the steps count CPU time of a rank, which other programs on the machine disturb less than wall time.
They still disturb it, since they take caches and the other half of a core: beside each step a rank runs forward and
backward of one of the calibration's own models, and the step's time is divided by how much slower that is than then.
Goals: states within 2%, total within 8%, time within 15%, the measured best among the predicted top 3.
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
from operator import truediv
from pathlib import Path
from typing import Any

from distui.core.hardware.detect import Hardware, detect
from distui.core.plan.memory import Strategy, footprint
from distui.core.plan.rates import rates_of
from distui.core.plan.shapes import gpt
from distui.core.plan.time import step_time
from distui.core.plan.types import ModelSpec

Case = tuple[str, str, int, int, str, int]
WIDTHS = {"wide": (4, 512, 8, 128), "deep": (12, 256, 8, 128)}
VOCAB = 256
REFERENCE_WIDTH, REFERENCE_SAMPLES = 256, 4
CASES = [
    *(("wide", dtype, micro, stage, "none", 1) for dtype in ("fp32", "bf16") for micro in (1, 4) for stage in range(4)),
    *(("deep", "fp32", 4, stage, mode, 1) for mode in ("none", "selective", "full") for stage in range(4)),
    *(("wide", "fp32", 1, stage, "none", 3) for stage in (0, 2, 3)),
    *(("deep", "bf16", 2, stage, "full", 2) for stage in (0, 1, 3)),
]
"""Width, dtype, micro-batch, stage, activation checkpointing, accumulation."""


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


def train(options: argparse.Namespace) -> None:
    """Train one combination as one rank; rank 0 writes its figures. Collective: both ranks."""
    os.sched_setaffinity(0, {options.rank % (os.cpu_count() or 1)})
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F

    from distui.core.model.activation_checkpointing import apply_activation_checkpointing
    from distui.core.ranks.precision import apply_border_casts
    from distui.core.sharding.sharded import ShardedModel
    from distui.launcher.probes.calibrate_bench import GPT

    torch.set_num_threads(1)
    width, dtype, micro, stage, mode, accumulation = CASES[options.case]
    store = f"file://{options.folder}/store{options.case}"
    dist.init_process_group("gloo", init_method=store, rank=options.rank, world_size=2)
    low = torch.bfloat16 if dtype == "bf16" else None
    torch.manual_seed(options.rank)
    ids = torch.randint(0, VOCAB, (micro, WIDTHS[width][3] + 1))
    model = build(width)
    apply_activation_checkpointing(model, mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    sharded = ShardedModel(model, stage=stage, group=dist.group.WORLD, compute_dtype=low)
    if low is not None:
        apply_border_casts(model, low)
    prepared = sharded.prepare_optimizer(optimizer)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds, references, peak = [], [], 0
    reference = None
    tokens = torch.randint(0, VOCAB, (REFERENCE_SAMPLES, 128))
    for _ in range(options.steps + 3):
        dist.barrier()
        start = clock()
        for micro_batch in range(accumulation):
            sharded.schedule.sync = micro_batch == accumulation - 1
            sharded.schedule.hide_gradients()
            loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
            (loss / accumulation).backward()
            sharded.schedule.end_backward()
        prepared.step()
        prepared.zero_grad()
        seconds.append(clock() - start)
        if len(seconds) == 2:  # before the reference takes memory of its own
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            reference = GPT(REFERENCE_WIDTH).to(low)
        if reference is None:
            continue
        dist.barrier()
        start = clock()
        F.cross_entropy(reference(tokens).float().flatten(0, 1), tokens.flatten()).backward()
        references.append(clock() - start)
    if options.rank == 0:
        row = {
            "memory": sharded.memory_by_category(),
            "peak": peak,
            "steps_in_references": statistics.median(map(truediv, seconds[3:], references[2:])),
        }
        Path(options.folder, f"case{options.case}").write_text(json.dumps(row), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(index: int, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one combination in two ranks and return what rank 0 found.

    Two new processes: a forked one would not count the pages of libraries that its parent has touched.
    """
    given = ["--steps", str(options.steps), "--clock", options.clock, "--folder", folder, "--case", str(index)]
    command = [sys.executable, __file__, *given, "--rank"]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    if any([process.wait() for process in ranks]):
        raise SystemExit(f"{CASES[index]} failed")
    found = json.loads(Path(folder, f"case{index}").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def compare(case: Case, real: dict[str, Any], hardware: Hardware) -> dict[str, tuple[float, float]]:
    """Return planned and measured bytes of states and of the whole, and seconds of a step."""
    from distui.launcher.probes.calibrate_bench import spec_of as calibration_model

    width, dtype, micro, stage, mode, accumulation = case
    model = spec_of(width)
    strategy = Strategy(stage, "none", "none", mode, micro, accumulation, 1, 1, 2, dtype, "fp32", "adamw")
    rates = rates_of(hardware, dtype, 2)
    memory = footprint(model, strategy, "cpu", rates.baseline_bytes)
    total_s = step_time(model, strategy, rates).total_s
    assert total_s is not None and rates.measured is not None
    calibrated = rates.measured.rate(dtype, REFERENCE_WIDTH, REFERENCE_SAMPLES * 128)
    assert calibrated is not None
    flops = 3 * calibration_model(REFERENCE_WIDTH).forward_flops * REFERENCE_SAMPLES * 128
    step_s = real["steps_in_references"] * flops / calibrated
    states = sum(real["memory"][key] for key in ("parameters", "gradients", "optimizer_states"))
    return {
        "states": (memory.model_states, states),
        "total": (memory.total, real["peak"]),
        "step": (total_s, step_s),
    }


def main() -> None:
    """Print one line a combination, the largest errors, and where the measured best stands in the prediction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--case", type=int)
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.rank is not None:
        train(options)
        return
    from distui.launcher.probes.calibrate import calibrate, report

    with tempfile.TemporaryDirectory() as folder:
        os.environ["DISTUI_STATE_DIR"] = f"{folder}/state"
        hardware = calibrate(detect(), 2, options.clock)
        print("\n".join(report(hardware, 2)))
        print(
            "width dtype micro accu stage checkpointing |  states MiB plan/real |  total MiB plan/real | "
            "step ms plan/real"
        )
        errors: dict[str, list[float]] = {"states": [], "total": [], "step": []}
        speeds: dict[str, list[tuple[float, float, Case]]] = {}
        for index, case in enumerate(CASES):
            rows = compare(case, measure(index, folder, options), hardware)
            for key, (planned, measured) in rows.items():
                errors[key].append(planned / measured - 1)
            (states, real_states), (total, real_total), (step, real_step) = rows.values()
            width, dtype, micro, stage, mode, accumulation = case
            samples = micro * accumulation
            speeds.setdefault(width, []).append((samples / step, samples / real_step, case))
            print(
                f"{width:>5} {dtype:>5} {micro:5d} {accumulation:4d} {stage:5d} {mode:>13} | {states / 2**20:7.1f} "
                f"{real_states / 2**20:7.1f} {errors['states'][-1]:+5.1%} | {total / 2**20:7.1f} "
                f"{real_total / 2**20:7.1f} {errors['total'][-1]:+5.1%} | {step * 1e3:6.0f} {real_step * 1e3:6.0f} "
                f"{errors['step'][-1]:+5.1%}",
                flush=True,
            )
    for key, goal in (("states", 0.02), ("total", 0.08), ("step", 0.15)):
        values = errors[key]
        inside = sum(abs(value) <= goal for value in values)
        print(
            f"{key}: median {statistics.median(values):+.1%}, largest {max(values, key=abs):+.1%}, "
            f"{inside} of {len(values)} within {goal:.0%}"
        )
    for width, found in speeds.items():
        best = max(found, key=lambda row: row[1])
        place = 1 + sum(row[0] > best[0] for row in found)
        lost = 1 - max(row[1] for row in sorted(found, key=lambda row: -row[0])[:3]) / best[1]
        print(
            f"{width}: the measured fastest, {best[2][1:]}, is number {place} of {len(found)} predicted; "
            f"the best of the predicted top 3 is {lost:.1%} slower"
        )


if __name__ == "__main__":
    main()
