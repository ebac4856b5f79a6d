"""Steps and memory of scripts that have no `distui.Engine`: plain DDP, Lightning Fabric, anything that torchrun runs.

Every `torch.optim` optimizer calls global hooks when it has stepped. The first one that steps is taken as the script's
clock: its steps are the job's, and what it holds is its memory. Losses, tokens and the parts of a step are not known
from there, and are left out. A script with an engine sends its own, and this stands back.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distui.core.telemetry.after_import import after_import

if TYPE_CHECKING:
    from distui.core.telemetry.source import NullSource, TelemetrySource

MEMORY_EVERY_STEPS = 50
_watching: PlainSteps | None = None


def watch_optimizers(source: TelemetrySource | NullSource, asked: str = "") -> None:
    """Send the steps of this process's optimizers to `source`, from when the script imports torch.

    `asked` is a strategy of the settings, in words: with the first step it is told that it has no effect.
    """
    global _watching
    _watching = PlainSteps(source, asked)
    after_import("torch.optim.optimizer", _watching.hook_into)


def stand_back() -> None:
    """Send no more steps: an engine does."""
    if _watching is not None:
        _watching.stop()


class PlainSteps:
    """Counts the steps of the first optimizer that steps."""

    def __init__(self, source: TelemetrySource | NullSource, asked: str = "") -> None:
        self._source, self._asked = source, asked
        self._hooks: list[Any] = []
        self._optimizer: weakref.ref[Any] | None = None
        self._step = 0
        self._last = 0.0
        self._begin = 0.0
        self._stopped = False

    def hook_into(self, module: Any) -> None:
        """Register with torch's module of optimizers."""
        if not self._stopped:
            self._hooks = [
                module.register_optimizer_step_pre_hook(self._before),
                module.register_optimizer_step_post_hook(self._after),
            ]

    def stop(self) -> None:
        """Take the hooks back."""
        self._stopped = True
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _is_clock(self, optimizer: Any) -> bool:
        # Several optimizers (a generator's and a discriminator's) step in turns: one of them is the clock.
        if self._optimizer is None or self._optimizer() is None:
            self._optimizer = weakref.ref(optimizer)
        return self._optimizer() is optimizer

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._is_clock(optimizer):
            self._begin = time.perf_counter()
            self._source.phase("optimizer")

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._is_clock(optimizer):
            return
        now = time.perf_counter()
        self._step += 1
        if self._step == 1:
            self._say_started(optimizer)
        rate = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
        self._source.step(
            step=self._step,
            step_s=now - self._last if self._last else 0.0,
            optimizer_s=now - self._begin if self._last else 0.0,
            learning_rate=float(rate) if rate is not None else None,
        )
        if self._step in (1, 2) or self._step % MEMORY_EVERY_STEPS == 0:
            self._say_memory(optimizer)
        self._last = now
        self._source.phase("script")

    def _say_started(self, optimizer: Any) -> None:
        if self._asked:
            fabric = any(name in sys.modules for name in ("lightning_fabric", "lightning.fabric"))
            way = "choose it in Lightning Fabric, as by Fabric(strategy='fsdp')" if fabric else "use distui.Engine"
            what = "the script trains without distui's engine"
            print(f"distui: {self._asked} has no effect: {what}; {way}", file=sys.stderr, flush=True)
        params = _params(optimizer)
        device = params[0].device if params else "cpu"
        name = sys.modules["torch"].cuda.get_device_name(device) if str(device).startswith("cuda") else ""
        num_parameters = sum(param.numel() for param in params)
        self._source.rank_started(str(device), name, num_parameters, own_strategy=True)

    def _say_memory(self, optimizer: Any) -> None:
        params = _params(optimizer)
        seen: set[int] = set()
        categories = {
            "parameters": _count(params, seen),
            "gradients": _count((param.grad for param in params), seen),
            "optimizer_states": _count((v for state in optimizer.state.values() for v in state.values()), seen),
        }
        cuda = sys.modules["torch"].cuda
        device: dict[str, int] = {}
        if params and params[0].device.type == "cuda":
            at = params[0].device
            device = {
                "allocated_bytes": cuda.memory_allocated(at),
                "reserved_bytes": cuda.memory_reserved(at),
                "peak_allocated_bytes": cuda.max_memory_allocated(at),
                "device_total_bytes": cuda.get_device_properties(at).total_memory,
            }
        self._source.memory(categories, **device)


def _params(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _count(tensors: Iterable[Any], seen: set[int]) -> int:
    """Return the bytes of this rank's tensors among `tensors`, memory that several share once."""
    total = 0
    for tensor in tensors:
        if not hasattr(tensor, "untyped_storage"):
            continue
        storage = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
