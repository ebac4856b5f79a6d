"""What axes cost: pipelines beside their tables and torch's, tensor parallelism, sharding and experts beside bare code.

    python benchmarks/parallel.py --rounds 7

Two ranks of one thread each, over gloo. All variants are in the same processes, and their steps take turns, so that
drift hits all alike. `bubble` is the share of both ranks' time that the blocks' own work, run by both at once without a
pipeline, does not account for; beside it stands what the schedule's table says. For tensor parallelism `bare` is what
one would write by hand: local matrix products, and one all-reduce behind each pair in forward and in backward. Sharded
states (stage 3) stand beside FSDP2, and experts over ranks beside the same mixture with all experts on both ranks, once
with tokens spread evenly and once with all of them going to one rank. So what torchtitan is made of is there: DTensor's
styles, torch.distributed.pipelining, fully_shard. DeepSpeed's parts are not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import distui
from distui.core.axes.schedules import course, num_chunks, stage_of, tables

Run = Callable[[], Any]


class Pair(nn.Module):
    """Two matrix products with a residual around them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what x is after the block."""
        hidden: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return hidden


class Stack(nn.Module):
    """Blocks in a row, of which the mean square is the loss."""

    def __init__(self, num_blocks: int, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(dim) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def build(options: argparse.Namespace) -> Stack:
    """Return the model, the same on all ranks."""
    torch.manual_seed(0)
    return Stack(options.blocks, options.dim)


def pipeline_of_ours(options: argparse.Namespace, schedule: str, batch: torch.Tensor) -> Run:
    """Return a pass of the schedule over the batch."""
    strategy = {"pipeline_parallel": 2, "pipeline_schedule": schedule}
    engine = distui.Engine(strategy=strategy, batch={"accumulation": options.micro})
    model = build(options)
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))

    def run() -> None:
        engine.backward(model(batch))
        optimizer.zero_grad()

    return run


def pipeline_of_torch(options: argparse.Namespace, schedule: str, batch: torch.Tensor) -> Run:
    """Return the same by torch.distributed.pipelining."""
    from torch.distributed import pipelining

    kinds = {
        "gpipe": pipelining.ScheduleGPipe,
        "1f1b": pipelining.Schedule1F1B,
        "interleaved": pipelining.ScheduleInterleaved1F1B,
        "zbv": pipelining.ScheduleZBVZeroBubble,
    }
    rank, chunks = dist.get_rank(), num_chunks(schedule)
    blocks, count = build(options).blocks, 2 * chunks
    per_stage = options.blocks // count
    numbers = [stage_of(schedule, 2, rank, chunk) for chunk in range(chunks)]
    stages = [
        pipelining.PipelineStage(
            nn.Sequential(*blocks[number * per_stage : (number + 1) * per_stage]),
            number,
            count,
            torch.device("cpu"),
            group=dist.new_group([0, 1]) if index == 0 else None,
        )
        for index, number in enumerate(numbers)
    ]
    for stage in stages[1:]:
        stage.group = stages[0].group
    given: Any = stages[0] if chunks == 1 else stages
    ran: Any = kinds[schedule](given, options.micro, loss_fn=lambda out, target: out.square().mean())

    def run() -> None:
        args = (batch,) if 0 in numbers else ()
        target = {"target": batch} if count - 1 in numbers else {}
        ran.step(*args, **target)
        for stage in stages:
            stage.submod.zero_grad()

    return run


def without_pipeline(options: argparse.Namespace, batch: torch.Tensor) -> Run:
    """Return the whole model's work over all micro-batches on one rank."""
    model = build(options)

    def run() -> None:
        for part in batch.chunk(options.micro):
            (model(part) / options.micro).backward()
        model.zero_grad()

    return run


class _Sum(torch.autograd.Function):
    """Sums over ranks in forward, or with `behind` in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, behind: bool) -> torch.Tensor:
        ctx.behind = behind
        if not behind:
            x = x.clone()
            dist.all_reduce(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.behind:
            grad = grad.clone()
            dist.all_reduce(grad)
        return grad, None


def tensor_by_hand(options: argparse.Namespace, batch: torch.Tensor) -> Run:
    """Return a step of the model with half of each matrix, and two sums a block."""
    model, rank = build(options), dist.get_rank()
    half, params = 2 * options.dim, []
    for block in model.blocks:
        own = slice(rank * half, (rank + 1) * half)
        params.append(
            [
                nn.Parameter(part.detach().clone())
                for part in (block.up.weight[own], block.up.bias[own], block.down.weight[:, own], block.down.bias)
            ]
        )

    def run() -> None:
        x = batch
        for block, (up, bias, down, end) in zip(model.blocks, params, strict=True):
            inner = nn.functional.linear(_Sum.apply(block.norm(x), True), up, bias)
            x = x + _Sum.apply(nn.functional.linear(nn.functional.gelu(inner), down), False) + end
        x.square().mean().backward()
        for block, parts in zip(model.blocks, params, strict=True):
            block.zero_grad()
            for part in parts:
                part.grad = None

    return run


def tensor_of_ours(options: argparse.Namespace, batch: torch.Tensor) -> Run:
    """Return the same by the engine."""
    engine = distui.Engine(strategy={"tensor_parallel": 2})
    model = build(options)
    plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), plan=plan)

    def run() -> None:
        engine.backward(model(batch))
        optimizer.zero_grad()

    return run


def tensor_of_torch(options: argparse.Namespace, batch: torch.Tensor) -> Run:
    """Return the same by DTensor's styles."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    model = build(options)
    plan = {}
    for index in range(options.blocks):
        plan |= {f"blocks.{index}.up": parallel.ColwiseParallel(), f"blocks.{index}.down": parallel.RowwiseParallel()}
    parallel.parallelize_module(model, init_device_mesh("cpu", (2,)), plan)

    def run() -> None:
        model(batch).backward()
        model.zero_grad()

    return run


def sharded_of_ours(options: argparse.Namespace, batch: torch.Tensor) -> Run:
    """Return a step whose parameters and gradients lie over both ranks, a batch of its own on each."""
    engine = distui.Engine(strategy={"zero_stage": 3})
    model = build(options)
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))

    def run() -> None:
        engine.backward(model(batch))
        optimizer.step()  # after it parameters are gathered anew
        optimizer.zero_grad()

    return run


def sharded_of_torch(options: argparse.Namespace, batch: torch.Tensor) -> Run:
    """Return the same by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = build(options), init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run() -> None:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def experts(options: argparse.Namespace, batch: torch.Tensor, over: int, uneven: bool) -> Run:
    """Return a step of a row of mixtures, whose experts are over so many ranks; `uneven` sends all tokens to one."""
    engine = distui.Engine(strategy={"expert_parallel": over})
    torch.manual_seed(0)
    model = Stack(0, options.dim)
    for _ in range(options.blocks // 2):
        mixture = distui.MoE(options.dim, 2 * options.dim, 8, top_k=2, balance_rate=0.0)
        mixture.bias[:4] += 1e3 * uneven  # of the first rank
        model.blocks.append(mixture)
    prepared, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))

    def run() -> None:
        engine.backward(prepared(batch))
        optimizer.zero_grad()

    return run


def measured(runs: dict[str, Run], rounds: int) -> dict[str, tuple[float, float]]:
    """Return median seconds of each run, which take turns, of the slower rank: on the clock, and of its CPU."""
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            dist.barrier()
            begin, worked = time.perf_counter(), time.process_time()
            run()
            taken = torch.tensor([time.perf_counter() - begin, time.process_time() - worked])
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if number >= 2:
                times[name].append(taken.tolist())
    return {name: (_median(found, 0), _median(found, 1)) for name, found in times.items()}


def _median(found: list[list[float]], column: int) -> float:
    return statistics.median(row[column] for row in found)


def worker(rank: int, port: int, options: argparse.Namespace) -> None:
    """Measure on one of two ranks; the first one prints."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", TORCH_CPP_LOG_LEVEL="ERROR"
    )
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(1)
    batch = torch.randn(options.rows * options.micro, options.tokens, options.dim)
    schedules = ("gpipe", "1f1b", "interleaved", "zbv")
    runs = {"alone": without_pipeline(options, batch)}
    with contextlib.redirect_stderr(io.StringIO()):
        for schedule in schedules:
            runs[f"distui {schedule}"] = pipeline_of_ours(options, schedule, batch)
            runs[f"torch {schedule}"] = pipeline_of_torch(options, schedule, batch)
        found = measured(runs, options.rounds)
        few = batch[: options.rows]
        cut = measured(
            {
                "bare": tensor_by_hand(options, few),
                "distui": tensor_of_ours(options, few),
                "torch DTensor": tensor_of_torch(options, few),
            },
            4 * options.rounds,
        )
        shared = measured(
            {"distui stage 3": sharded_of_ours(options, few), "torch FSDP2": sharded_of_torch(options, few)},
            2 * options.rounds,
        )
        routed = measured(
            {
                "all experts on each rank": experts(options, few, 1, False),
                "experts over ranks": experts(options, few, 2, False),
                "all tokens to one rank": experts(options, few, 2, True),
            },
            2 * options.rounds,
        )
    if rank == 0:
        report: dict[str, list[dict[str, Any]]] = {"pipeline": []}
        for name, (seconds, _) in found.items():
            row: dict[str, Any] = {"variant": name, "ms": round(1e3 * seconds, 1)}
            if name != "alone":
                schedule = name.split()[1]
                row["bubble"] = round(1.0 - found["alone"][0] / (2 * seconds), 3)
                row["table"] = round(course(schedule, tables(schedule, 2, options.micro)).bubble, 3)
            report["pipeline"].append(row)
        for kind, times in (("tensor", cut), ("sharded", shared), ("experts", routed)):
            first = next(iter(times.values()))
            report[kind] = [
                {
                    "variant": name,
                    "ms": round(1e3 * wall, 2),
                    "over_first": round(wall / first[0], 3),
                    "cpu_ms": round(1e3 * worked, 2),
                    "cpu_over_first": round(worked / first[1], 3),
                }
                for name, (wall, worked) in times.items()
            ]
        print(json.dumps(report) if options.json else _table(report))
    dist.destroy_process_group()


def _table(report: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'pipeline, 2 ranks':24}{'ms':>10}{'bubble':>10}{'table':>10}"]
    for row in report["pipeline"]:
        more = f"{row['bubble']:10.1%}{row['table']:10.1%}" if "bubble" in row else ""
        lines.append(f"{row['variant']:24}{row['ms']:10.1f}{more}")
    for kind in ("tensor", "sharded", "experts"):
        lines.append(f"{f'{kind}, 2 ranks':24}{'ms':>10}{'over first':>12}{'CPU ms':>10}{'over first':>12}")
        for row in report[kind]:
            clock = f"{row['ms']:10.2f}{row['over_first']:12.2f}"
            lines.append(f"{row['variant']:24}{clock}{row['cpu_ms']:10.2f}{row['cpu_over_first']:12.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="a multiple of 4")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=2, help="samples of a micro-batch")
    parser.add_argument("--micro", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # serves the ranks, who then name their groups in it
    torch.multiprocessing.spawn(worker, (store.port, options), nprocs=2)


if __name__ == "__main__":
    main()
