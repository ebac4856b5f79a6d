"""GPUs that went wrong while a run used them: what NVML's counters say, told of the ranks on them."""

from __future__ import annotations

from distui.daemon.runs.state import GpuFault, RankRecord, RunState
from distui.proto import telemetry_pb2 as pb

SHOWN_S = 600.0
"""For so long after its last error a GPU that goes on working is spoken of."""
HELD_DOWN = frozenset({"hardware slowdown", "thermal (software)", "thermal (hardware)", "power brake"})
"""Reasons for low clocks that are not the usual limit of power."""

RESET, REPLACE, PROGRAM = "reset or restart", "drain and service", "program"
_ADVICE = {
    RESET: "reset the GPU or restart the host (nvidia-smi --gpu-reset), then go on from a checkpoint",
    REPLACE: "take the host out of service, have the GPU tested (dcgmi diag), and go on elsewhere from a checkpoint",
    PROGRAM: "a kernel of the program did it: run with CUDA_LAUNCH_BLOCKING=1, or under compute-sanitizer",
}
XIDS = {
    13: ("graphics engine exception: an illegal instruction or address", PROGRAM),
    31: ("memory page fault: an address that is not mapped", PROGRAM),
    32: ("corrupted push buffer", RESET),
    48: ("double bit ECC error", RESET),
    61: ("internal micro-controller breakpoint", RESET),
    62: ("internal micro-controller halt", RESET),
    63: ("row remapping or page retirement recorded", RESET),
    64: ("row remapping or page retirement failed", REPLACE),
    69: ("graphics engine class error", PROGRAM),
    74: ("NVLink error", RESET),
    79: ("the GPU has fallen off the bus", REPLACE),
    92: ("high rate of single bit ECC errors", REPLACE),
    94: ("contained ECC error: this program alone was hit", RESET),
    95: ("uncontained ECC error", RESET),
    109: ("context switch timed out", RESET),
    119: ("the GPU's system processor (GSP) timed out", RESET),
    120: ("error of the GPU's system processor (GSP)", RESET),
    140: ("unrecovered ECC error", RESET),
}
"""XID to its meaning and whom it concerns. Source: NVIDIA, "XID Errors", the table of common XIDs."""
AFTERMATH = frozenset({43, 45})
"""XIDs that follow the end of a program, whatever ended it."""


def gpu_errors(state: RunState, found: list[pb.Diagnosis], now_s: float) -> list[pb.Diagnosis]:
    """Return a verdict for each GPU that had a grave error; `found` is what else is wrong, mostly because of it."""
    verdicts = []
    for (node, _), fault in sorted(state.gpu_faults.items()):
        if (fault.xid in AFTERMATH or fault.xid is None) and not fault.uncorrected:
            continue
        ranks = sorted(
            record.rank for record in state.ranks.values() if record.node == node and _is_on(record, fault.gpu)
        )
        held = next((one for one in found if set(ranks) & set(one.ranks)), None)
        if not ranks or (held is None and now_s - fault.last_s > SHOWN_S):
            continue
        what, advice = _words(fault)
        whose = f"GPU {fault.gpu.index} of {node} (rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))})"
        message = f"{whose}: {what}{f'; so {held.message}' if held is not None else ''}; {advice}"
        since_s = max(0.0, now_s - fault.since_s)
        verdicts.append(pb.Diagnosis(kind="gpu_error", ranks=ranks, since_s=since_s, message=message))
    return verdicts


def _words(fault: GpuFault) -> tuple[str, str]:
    meaning, concerns = XIDS.get(fault.xid or 0, ("", RESET))
    words = [f"XID {fault.xid}{f' ({meaning})' if meaning else ''}"] * (fault.xid is not None)
    if fault.uncorrected:
        words.append(f"{fault.uncorrected:,} memory errors that ECC could not correct")
    return ", ".join(words), _ADVICE[concerns]


def device_note(state: RunState, rank: int) -> str:
    """Return what the counters say of a rank's GPU beside a verdict of slowness; "" where they say nothing."""
    record = state.ranks.get(rank)
    node = state.nodes.get(record.node) if record is not None else None
    if record is None or node is None:
        return ""
    for gpu in node.hardware.gpus:
        if not _is_on(record, gpu):
            continue
        words = []
        if held := sorted(HELD_DOWN.intersection(gpu.throttle_reasons)):
            hot = f" at {gpu.temperature_c:.0f} C" if gpu.HasField("temperature_c") else ""
            words.append(f"its clocks are held down: {', '.join(held)}{hot}")
        fault = state.gpu_faults.get((record.node, gpu.index))
        if fault is not None and fault.nvlink:
            words.append(f"{fault.nvlink:,} NVLink errors since the run began")
        if fault is not None and fault.pcie:
            words.append(f"{fault.pcie:,} PCIe replays since the run began")
        return f"its GPU {gpu.index}: {'; '.join(words)}" if words else ""
    return ""


def _is_on(record: RankRecord, gpu: pb.Gpu) -> bool:
    """Tell whether a rank runs on a GPU: by its UUID, for CUDA's numbers are those of the devices that are visible."""
    started = record.started
    if started is None or not started.device.startswith("cuda"):
        return False
    if started.device_uuid and gpu.uuid:
        return gpu.uuid.removeprefix("GPU-") == started.device_uuid.removeprefix("GPU-")
    return started.device == f"cuda:{gpu.index}"
