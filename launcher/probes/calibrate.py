"""`distui plan --calibrate`: a short run that measures what plans need, kept for this machine. Torch-free itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distui.core.errors import UserError
from distui.core.hardware.detect import Hardware, detect
from distui.core.hardware.measure import save_training
from distui.core.plan.measured import Measured
from distui.launcher.probes.collectives import run_ranks

TIMEOUT_S = 600.0


def calibrate(
    hardware: Hardware, nproc: int | None = None, clock: str = "wall", watch: Callable[[str], bool] | None = None
) -> Hardware:
    """Measure this machine with `nproc` ranks (else as many as `auto` starts), keep it, and return the new facts.

    `clock`: wall, or cpu to count the ranks' own CPU time, which other programs disturb less. `watch`: hears what is
    measured, and ends it by returning False; nothing is kept then.

    Raises: UserError on another machine than this one, or where a rank fails.
    """
    if hardware.source != "detected" or hardware.cpu is None:
        raise UserError(
            f"cannot calibrate {hardware.name}",
            "a calibration trains for a moment on the machine itself, and this one is only named",
            "run distui plan --calibrate there, without --hardware",
        )
    ranks = nproc or hardware.ranks_per_node
    cores = min(hardware.cpu.num_cores_physical or hardware.cpu.num_cores_usable, hardware.cpu.num_cores_usable)
    threads = max(1, cores // ranks)
    environ = {"OMP_NUM_THREADS": str(threads), "DISTUI_BENCH_CLOCK": clock}
    found: dict[str, Any] = run_ranks("distui.launcher.probes.calibrate_bench", ranks, environ, TIMEOUT_S, watch)
    save_training(hardware.cpu, hardware.gpus_per_node, ranks, found)
    return detect(hardware.nodes)


def report(hardware: Hardware, num_ranks: int) -> list[str]:
    """Return lines that say what was measured."""
    from distui.tui.format import num_bytes, seconds, si

    measured = Measured.of(hardware.calibration, num_ranks)
    if measured is None:
        return ["nothing was kept"]
    lines = [
        f"compute {dtype}: "
        + ", ".join(f"{si(rate, 'FLOP/s')} (width {width:.0f}, {tokens:.0f} tokens)" for width, tokens, rate in rows)
        for dtype, rows in measured.compute.items()
    ]
    lines.append(f"optimizer: {si(measured.optimizer_bandwidth, 'B/s')}")
    lines.append(f"a pass over gradients: {si(measured.pass_bandwidth, 'B/s')}")
    lines += [f"{op}: {seconds(alpha)} + {si(beta, 'B/s')}" for op, (alpha, beta) in measured.collectives.items()]
    if measured.baseline_bytes is not None:
        lines.append(f"memory of a rank beyond its tensors: {num_bytes(measured.baseline_bytes)}")
    return lines
