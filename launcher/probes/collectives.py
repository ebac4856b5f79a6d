"""Measure the bandwidth of collectives on this machine, by starting ranks that do nothing else. Torch-free itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distui.core.errors import UserError
from distui.core.hardware.detect import Cpu

DEFAULT_SIZES = (64 << 10, 1 << 20, 16 << 20, 64 << 20)
TIMEOUT_S = 120.0


def measure_collectives(num_ranks: int, sizes: Sequence[int] = DEFAULT_SIZES) -> list[dict[str, Any]]:
    """Return a row an operation and size: op, backend, world_size, bytes, seconds, bus_bandwidth (bytes/s).

    Raises: UserError where a rank fails or none ends in time, with the rank's last words.
    """
    if num_ranks < 2:
        raise UserError(f"{num_ranks} rank has nobody to send to", "a collective needs two", "give --nproc 2 or more")
    sizes_text = ",".join(map(str, sizes))
    rows = run_ranks("distui.launcher.probes.collectives_bench", num_ranks, {"DISTUI_BENCH_SIZES": sizes_text})
    assert isinstance(rows, list)
    return rows


def run_ranks(
    module: str,
    num_ranks: int,
    environ: Mapping[str, str],
    timeout_s: float = TIMEOUT_S,
    watch: Callable[[str], bool] | None = None,
) -> Any:
    """Run `python -m MODULE OUT` as `num_ranks` ranks that meet in a file, and return the JSON that rank 0 wrote.

    `watch` is called again and again with rank 0's last line; where it returns False, the ranks are ended.

    Raises: UserError where a rank fails, none ends in time, with the rank's last words, or `watch` says so.
    """
    with tempfile.TemporaryDirectory(prefix="distui-bench-") as folder:
        out = Path(folder) / "rows.json"
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_ranks):
                with open(Path(folder) / f"rank{rank}.log", "wb") as log:
                    ranks.append(
                        subprocess.Popen(
                            [sys.executable, "-m", module, str(out)],
                            env={**os.environ, **_environment(rank, num_ranks, folder), **environ},
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                        )
                    )
            _wait(ranks, Path(folder), timeout_s, watch)
            return json.loads(out.read_text(encoding="utf-8"))
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _environment(rank: int, num_ranks: int, folder: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "DISTUI_BENCH_INIT": f"file://{folder}/rendezvous",
    }


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float, watch: Callable[[str], bool] | None
) -> None:
    """Wait until all ranks have ended well; the first that fails ends the wait."""
    deadline = time.monotonic() + timeout_s
    waiting = dict(enumerate(ranks))
    while waiting:
        if watch is not None and not watch(_last_line(folder, 0)):
            raise UserError("the measurement was ended", "somebody left it", "start it again")
        for rank, process in list(waiting.items()):
            try:
                status = process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
            del waiting[rank]
            if status != 0:
                raise UserError(
                    f"rank {rank} of the measurement ended with status {status}",
                    _last_line(folder, rank) or "it said nothing",
                    "see whether a plain torch.distributed script runs here",
                )
        if time.monotonic() > deadline:
            raise UserError(
                f"the measurement did not end in {timeout_s:.0f} s",
                f"ranks {sorted(waiting)} still run: the machine is busy, or the interconnect stuck",
                "try NCCL_DEBUG=INFO, or fewer ranks with --nproc 2",
            )


def _last_line(folder: Path, rank: int) -> str:
    text = (folder / f"rank{rank}.log").read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[-1] if text else ""


def keep_rank_bandwidth(rows: Sequence[dict[str, Any]], cpu: Cpu) -> float | None:
    """Keep what the planner needs of a CPU measurement: the all-gather's bus bandwidth at the largest size."""
    from distui.core.hardware.measure import identity, save_calibration

    gathers = [row for row in rows if row["op"] == "all_gather" and row["backend"] == "gloo"]
    if not gathers:
        return None
    bandwidth = float(max(gathers, key=lambda row: row["bytes"])["bus_bandwidth"])
    save_calibration(rank_bandwidth=bandwidth, rank_bandwidth_cpu=identity(cpu))
    return bandwidth
