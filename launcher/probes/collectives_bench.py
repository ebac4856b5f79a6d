"""One rank of the collectives measurement, started by `collectives`.

Takes RANK, WORLD_SIZE, DISTUI_BENCH_INIT (init method) and DISTUI_BENCH_SIZES (bytes, separated by commas) from the
environment. Rank 0 writes rows of JSON to OUT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

NUM_RUNS = 5


def main(out: Path) -> None:
    """Measure every operation at every size. Collective: all ranks."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sizes = [int(size) for size in os.environ["DISTUI_BENCH_SIZES"].split(",")]
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(
        backend,
        init_method=os.environ["DISTUI_BENCH_INIT"],
        rank=rank,
        world_size=world_size,
        device_id=device if cuda else None,
    )
    rows = []
    for num_bytes in sizes:
        for op, (run, factor) in operations(num_bytes, world_size, device).items():
            seconds = best_time(run, device)
            rows.append(
                {
                    "op": op,
                    "backend": backend,
                    "world_size": world_size,
                    "bytes": num_bytes,
                    "seconds": seconds,
                    "bus_bandwidth": num_bytes * factor / seconds,
                }
            )
    if rank == 0:
        out.write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def operations(num_bytes: int, world_size: int, device: torch.device) -> dict[str, tuple[Callable[[], object], float]]:
    """Return each operation on a full tensor of `num_bytes`, with the factor from bytes to bytes on the bus.

    The factors are those of nccl-tests: 2(N-1)/N for an all-reduce, (N-1)/N for the two others.
    """
    numel = max(1, num_bytes // 4 // world_size)
    full = torch.ones(numel * world_size, device=device)
    shard = torch.ones(numel, device=device)
    share = (world_size - 1) / world_size
    return {
        "all_reduce": (lambda: dist.all_reduce(full), 2 * share),
        "all_gather": (lambda: dist.all_gather_into_tensor(full, shard), share),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(shard, full), share),
    }


def best_time(run: Callable[[], object], device: torch.device) -> float:
    """Return the slowest rank's shortest run, after one that does not count. Collective: all ranks."""
    run()
    best = float("inf")
    for _ in range(NUM_RUNS):
        dist.barrier()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    slowest = torch.tensor([best], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.item())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
