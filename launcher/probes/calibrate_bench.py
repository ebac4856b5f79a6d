"""One rank of `distui plan --calibrate`, started by `calibrate`.

Takes RANK, WORLD_SIZE, DISTUI_BENCH_INIT and DISTUI_BENCH_CLOCK (wall, or cpu for the process's own CPU time) from the
environment. All ranks compute at once, since they share caches and memory. Rank 0 writes the figures to OUT.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from distui.core.plan.memory import Strategy, footprint
from distui.core.plan.shapes import gpt
from distui.core.plan.types import ModelSpec
from distui.core.sharding.transport.transport import Pending, Transport
from distui.core.sharding.units.pool import BufferPool

NUM_RUNS = 5
VOCAB = 256
LENGTH = 128
LAYERS = 2
CPU_SHAPES = ((256, 1), (256, 4), (768, 1), (768, 4))
GPU_SHAPES = ((1024, 16), (1024, 128), (4096, 16), (4096, 128))
"""(hidden size, samples of 128 tokens)."""
BEYOND_CACHES = 1 << 23
"""Elements of a tensor: after forward and backward none of a model's states is in a cache either."""
ADAMW_BYTES = 28
"""Bytes a parameter that fused AdamW in fp32 moves: two moments and the weight read and written, the gradient read."""


class Block(nn.Module):
    """A pre-norm transformer block, as most models have it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the stream after this block."""
        q, k, v = self.qkv(self.norm1(x_BTD)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        x_BTD = x_BTD + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


class GPT(nn.Module):
    """Two blocks between an embedding and a head of 256 bytes."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCAB, hidden), nn.Embedding(LENGTH, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.embedding(ids) + self.position.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        assert isinstance(logits, torch.Tensor)
        return logits


def spec_of(hidden: int) -> ModelSpec:
    """Return the shapes of `GPT` as the planner takes them."""
    return gpt(
        "calibration",
        num_layers=LAYERS,
        hidden_size=hidden,
        num_heads=hidden // 64,
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        tied_embeddings=False,
    )


class Bench:
    """Times of this rank, of which the slowest rank's count."""

    def __init__(self) -> None:
        """Join the others. Collective: all ranks."""
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.rank % torch.cuda.device_count()) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.clock = time.process_time if os.environ.get("DISTUI_BENCH_CLOCK") == "cpu" else time.perf_counter
        dist.init_process_group(
            "nccl" if self.cuda else "gloo",
            init_method=os.environ["DISTUI_BENCH_INIT"],
            rank=self.rank,
            world_size=self.world_size,
            device_id=self.device if self.cuda else None,
        )

    def seconds(self, run: Callable[[], object], num_runs: int = NUM_RUNS, share: float = 0.5) -> float:
        """Return the slowest rank's median run, after one that does not count. Collective: all ranks.

        Not the shortest: a job's steps meet the same disturbances as these runs. `share` is the share of runs that may
        be shorter than what is returned.
        """
        times = []
        for index in range(num_runs + 1):
            dist.barrier()
            start = self.clock()
            run()
            if self.cuda:
                torch.cuda.synchronize()
            if index >= 1:
                times.append(self.clock() - start)
        typical = statistics.median(times) if share == 0.5 else sorted(times)[int(share * len(times))]
        slowest = torch.tensor([typical], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest.item())

    def compute(self) -> dict[str, list[list[float]]]:
        """Return FLOP/s of forward and backward by dtype, as [hidden, tokens, rate]."""
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16} | ({"fp16": torch.float16} if self.cuda else {})
        found: dict[str, list[list[float]]] = {name: [] for name in dtypes}
        for name, dtype in dtypes.items():
            for hidden, samples in GPU_SHAPES if self.cuda else CPU_SHAPES:
                model = GPT(hidden).to(self.device, dtype)
                ids = torch.randint(0, VOCAB, (samples, LENGTH), device=self.device)

                def run(model: nn.Module = model, ids: torch.Tensor = ids) -> None:
                    F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten()).backward()

                tokens = samples * LENGTH
                rate = 3 * spec_of(hidden).forward_flops * tokens / self.seconds(run)
                found[name].append([hidden, tokens, rate])
        return found

    def gradient_pass(self, numel: int = BEYOND_CACHES) -> float:
        """Return bytes/s of scaling one flat tensor into another, as the engine does with each gradient."""
        gradient, flat = torch.ones(numel, device=self.device), torch.zeros(numel, device=self.device)
        return 8 * numel / self.seconds(partial(torch.mul, gradient, 0.5, out=flat))

    def optimizer(self, numel: int = BEYOND_CACHES) -> float:
        """Return bytes/s of a fused AdamW on one flat tensor."""
        param = nn.Parameter(torch.zeros(numel, device=self.device))
        param.grad = torch.ones_like(param)
        optimizer = torch.optim.AdamW([param], fused=True)
        return ADAMW_BYTES * numel / self.seconds(optimizer.step)

    def collectives(self) -> dict[str, list[float]]:
        """Return alpha and beta of what the engine calls, on its own transport, by a line through two sizes."""
        if self.world_size == 1:
            return {}
        group = dist.group.WORLD
        assert group is not None
        transport = Transport(group, "calibration", BufferPool())
        share = (self.world_size - 1) / self.world_size
        times: dict[str, list[tuple[float, float]]] = {"all_gather": [], "reduce_scatter": [], "all_reduce": []}
        for num_bytes in (64 << 10, (256 if self.cuda else 16) << 20):
            numel = num_bytes // 4 // self.world_size
            full, shard = (torch.ones(size, device=self.device) for size in (numel * self.world_size, numel))
            calls: dict[str, Callable[[], object]] = {
                "all_gather": partial(_finish, transport.all_gather, full, shard),
                "reduce_scatter": partial(_finish, transport.reduce_scatter, full, shard),
                "all_reduce": partial(_finish, transport.all_reduce, full),
            }
            for op, call in calls.items():
                # A small message takes next to no time: what disturbs one of them is many times longer than itself.
                is_small = num_bytes < 1 << 20
                seconds = self.seconds(call, 8 * NUM_RUNS, 0.25) if is_small else self.seconds(call, 2 * NUM_RUNS)
                times[op].append((share * 4 * numel * self.world_size, seconds))
        found = {}
        for op, ((small, small_s), (large, large_s)) in times.items():
            beta = (large - small) / max(large_s - small_s, 1e-9)
            found[op] = [max(0.0, small_s - small / beta), beta]
        return found

    def baseline(self) -> int | None:
        """Return the peak memory of this process beyond a small training step's tensors; None on a GPU.

        With the engine that a job has in memory, and with its group of ranks.
        """
        if self.cuda:
            return None
        import distui.core.engine.engine
        import distui.core.sharding.sharded  # noqa: F401

        dist.all_reduce(torch.ones(1 << 16))
        model = GPT(256)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(0, VOCAB, (1, LENGTH))
        for _ in range(2):
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        strategy = Strategy(0, "none", "none", "none", 1, 1, 1, 1, 1, "fp32", "fp32", "adamw")
        planned = footprint(spec_of(256), strategy, "cpu")
        return peak - (planned.total - planned.framework)


def _finish(collective: Callable[..., Pending], *tensors: torch.Tensor) -> None:
    collective(*tensors).wait()


def main(out: Path) -> None:
    """Measure everything. Collective: all ranks."""
    bench = Bench()
    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "baseline_bytes": ("memory beyond tensors", bench.baseline),
        "collectives": ("collectives", bench.collectives),
        "optimizer_bandwidth": ("the optimizer", bench.optimizer),
        "pass_bandwidth": ("a pass over gradients", bench.gradient_pass),
        "compute": ("forward and backward", bench.compute),
    }
    found: dict[str, Any] = {}
    for number, (name, (words, measure)) in enumerate(parts.items(), 1):
        print(f"{number} of {len(parts)}: {words}", flush=True)
        found[name] = measure()
    found |= {"torch": torch.__version__, "measured_s": time.time(), "threads": torch.get_num_threads()}
    if bench.rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
