"""`deepspeed.accelerator`: the device that the ranks compute on."""

from __future__ import annotations

import functools
import os
from typing import Any

import psutil
import torch


class Accelerator:
    """CUDA (or ROCm) where there is a GPU, else the CPU; what is not here is taken from `torch.cuda` or `torch.cpu`."""

    def __init__(self) -> None:
        self._name = "cuda" if torch.cuda.is_available() else "cpu"
        self._module: Any = torch.cuda if self._name == "cuda" else torch.cpu

    def device_name(self, device_index: int | None = None) -> str:
        """Return `cuda`, `cuda:1` or `cpu`."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        """Return the context of a device."""
        return torch.device(self.device_name(device_index))

    def current_device(self) -> int:
        """Return the index of this rank's device."""
        return torch.cuda.current_device() if self._name == "cuda" else int(os.environ.get("LOCAL_RANK", "0"))

    def current_device_name(self) -> str:
        """Return this rank's device as a text."""
        return self.device_name(self.current_device())

    def set_device(self, device_index: int) -> None:
        """Choose this rank's device."""
        if self._name == "cuda":
            torch.cuda.set_device(device_index)

    def device_count(self) -> int:
        """Return the number of devices of this node, which on the CPU is that of its ranks."""
        return torch.cuda.device_count() if self._name == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def is_available(self) -> bool:
        """Return True."""
        return True

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for the device."""
        if self._name == "cuda":
            torch.cuda.synchronize(device_index)

    def empty_cache(self) -> None:
        """Give cached device memory back."""
        if self._name == "cuda":
            torch.cuda.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Return the bytes that tensors take; on the CPU this process's resident bytes."""
        if self._name == "cuda":
            return torch.cuda.memory_allocated(device_index)
        return int(psutil.Process().memory_info().rss)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Return the largest `memory_allocated`; on the CPU the current one."""
        if self._name == "cuda":
            return torch.cuda.max_memory_allocated(device_index)
        return self.memory_allocated()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Forget the largest `memory_allocated`."""
        if self._name == "cuda":
            torch.cuda.reset_peak_memory_stats(device_index)

    def total_memory(self, device_index: int | None = None) -> int:
        """Return the device's bytes."""
        if self._name == "cuda":
            return int(torch.cuda.get_device_properties(device_index or 0).total_memory)
        return int(psutil.virtual_memory().total)

    def available_memory(self, device_index: int | None = None) -> int:
        """Return the bytes that are left."""
        if self._name == "cuda":
            return int(torch.cuda.mem_get_info(device_index)[0])
        return int(psutil.virtual_memory().available)

    def communication_backend_name(self) -> str:
        """Return `nccl` or `gloo`."""
        return "nccl" if self._name == "cuda" else "gloo"

    def is_bf16_supported(self) -> bool:
        """Return whether bf16 can be computed in."""
        return self._name == "cpu" or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        """Return whether fp16 can be computed in."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Return the formats to compute in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    def pin_memory(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the tensor in page-locked memory, where there is a GPU."""
        return tensor.pin_memory() if self._name == "cuda" else tensor

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies on the device."""
        return tensor.device.type == self._name

    def manual_seed(self, seed: int) -> None:
        """Seed the device's generator."""
        torch.manual_seed(seed) if self._name == "cpu" else torch.cuda.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed every device's generator."""
        torch.manual_seed(seed) if self._name == "cpu" else torch.cuda.manual_seed_all(seed)

    def range_push(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Begin a range for a profiler."""
        if self._name == "cuda":
            torch.cuda.nvtx.range_push(message)

    def range_pop(self, *args: Any, **kwargs: Any) -> None:
        """End the range."""
        if self._name == "cuda":
            torch.cuda.nvtx.range_pop()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(self._module, name):
            return getattr(self._module, name)
        raise AttributeError(f"distui's get_accelerator() has no {name!r} on {self.__dict__.get('_name')}")


@functools.lru_cache(maxsize=1)
def get_accelerator() -> Accelerator:
    """Return the device that the ranks compute on."""
    return Accelerator()


__all__ = ["Accelerator", "get_accelerator"]
