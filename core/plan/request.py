"""What is to be planned: the model, the hardware, and what the user has fixed. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from distui.core.hardware.detect import Hardware
from distui.core.plan.types import ModelSpec

DEFAULT_MARGIN = 0.08
"""Share of the device memory that is kept free, for fragmentation and what the formulas leave out."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan: the model, the hardware, and what the user has fixed."""

    model: ModelSpec
    hardware: Hardware
    ranks_per_node: int
    dtype: str
    reduce_dtype: str
    optimizer: str
    margin: float
    global_size: int | None = None
    micro_size: int | None = None
    backends: tuple[str, ...] = ("native",)
    compressions: tuple[str, ...] = ("none",)
    name_suffix: str = ""
    """Ends the names of its plans, where several requests are planned together."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.hardware.nodes * self.ranks_per_node

    @property
    def limit_bytes(self) -> int | None:
        """Device memory of one rank."""
        return self.hardware.memory_limit_bytes(self.ranks_per_node)


def default_dtype(hardware: Hardware) -> str:
    """Return bf16 where every GPU computes in it, fp16 on older GPUs, fp32 on a CPU."""
    if not hardware.gpus_per_node:
        return "fp32"
    capable = all(
        "bf16" in gpu.peak_flops if gpu.peak_flops is not None else (gpu.compute_capability or (0, 0)) >= (8, 0)
        for gpu in hardware.gpus_per_node
    )
    return "bf16" if capable else "fp16"
