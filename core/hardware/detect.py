"""Find out what hardware there is (`detect`), or describe what was named (`parse_hardware`). Torch-free.

The facts are in `hardware_types`, the reading of this machine in `hardware_host` and `hardware_nvml`, the datasheets in
`hardware_known`. This module is what others import.
"""

from __future__ import annotations

from distui.core.hardware.host import detect_host
from distui.core.hardware.known import named_hardware
from distui.core.hardware.nvml import NvmlReport, read_nvml
from distui.core.hardware.types import GIB, Cpu, Disk, Gpu, Hardware, NetworkInterface, NumaNode

__all__ = [
    "GIB",
    "Cpu",
    "Disk",
    "Gpu",
    "Hardware",
    "NetworkInterface",
    "NumaNode",
    "NvmlReport",
    "detect",
    "parse_hardware",
]


def detect(nodes: int = 1) -> Hardware:
    """Return this node's hardware, times `nodes`. What is absent or unreadable is None; nothing raises."""
    return detect_host(read_nvml(), nodes)


def parse_hardware(text: str, *, nodes: int | None = None, host_memory_bytes: int | None = None) -> Hardware:
    """Return the hardware that `text` names.

    `8xA100-40GB` is one node, `4x8xH100-80GB` four nodes of eight, `RTX4090` one GPU; `detect` or `local` is this
    machine. A named machine has no known host memory unless `host_memory_bytes` (of one node) is given.

    Raises: UserError with the nearest known names.
    """
    if text.strip().lower() in ("detect", "local", ""):
        return detect(nodes or 1)
    return named_hardware(text, nodes=nodes, host_memory_bytes=host_memory_bytes)
