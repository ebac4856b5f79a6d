"""The part of `Engine` that keeps: whole weights, saved states, and what they weigh in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from distui.core.backends.base import Backend
from distui.core.errors import UserError
from distui.core.tracking import Tracking

# What reads and writes checkpoints, and what swaps kernels, costs a second to import: it is when it is first used.
if TYPE_CHECKING:
    from distui.core.checkpoint import Saver
    from distui.core.engine import Engine
    from distui.core.kernel_swap import KernelReport


class States(Tracking):
    """Reads, writes and counts what an engine holds; the engine brings the backend."""

    backend: Backend
    device: torch.device

    def __init__(self) -> None:
        super().__init__()
        self._registered: list[Any] = []
        self._saver: Saver | None = None

    @property
    def saver(self) -> Saver:
        """What saves this engine, made when it is first asked for."""
        if self._saver is None:
            from distui.core.checkpoint import Saver

            self._saver = Saver(self.telemetry)
        return self._saver

    @property
    def save_failed(self) -> bool:
        """Whether a save in the background has failed on this rank."""
        return self._saver is not None and bool(self._saver.failed)

    @property
    def _engine(self) -> Engine:
        return cast("Engine", self)

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True) -> nn.Module:
        """Return the model as it was given, for preparing does not wrap it, with the weights of the last step.

        At stages 1 and 2 weights travel while the next forward begins: read them through this, `parameters()` or
        `state_dict()`, which wait, not through a module's attribute right after `optimizer.step()`.
        """
        next(model.parameters(), None)  # listing them waits
        return getattr(model, "module", model) if type(model).__name__ == "DistributedDataParallel" else model

    def get_state_dict(self, model: nn.Module, only_rank_0: bool = False) -> dict[str, Any]:
        """Return the whole state of `model` on the CPU, as plain torch would save it. Collective."""
        return self.backend.full_state_dict(model, only_rank_0)

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Give `model` a whole state. Collective: all ranks, each with `state`."""
        return self.backend.load_full_state_dict(model, state, strict)

    def full_parameters(self, model: nn.Module, writeback: bool = False) -> AbstractContextManager[nn.Module]:
        """Enter with every parameter of `model` whole and current; with `writeback` changes are kept. Collective."""
        return self.backend.full_parameters(model, writeback)

    def use_kernels(
        self,
        model: nn.Module,
        *,
        undo: bool = False,
        kinds: Iterable[str] | None = None,
        use_triton: bool | None = None,
    ) -> KernelReport:
        """Put kernels into the known modules of `model`, or with `undo` take them out; before or after prepare.

        Returns what was swapped and what was left, and why; `report.undo()` takes them out as well. In training a model
        whose loss a kernel computes gives no logits (`output.logits` is None). See docs/kernels.md. `kinds` are some of
        `kernel_swap.KINDS`; without it, all.
        """
        from distui.core.kernel_swap import KINDS, KernelReport, apply_kernels, undo_kernels

        if undo:
            undo_kernels(model)
            return KernelReport(model)
        report = apply_kernels(model, KINDS if kinds is None else kinds, use_triton=use_triton)
        self.telemetry.event("info", "kernels", str(report))
        return report

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load `objects` (with state_dict and load_state_dict) with the rest of the state."""
        for value in objects:
            if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))):
                raise UserError(
                    f"{type(value).__name__} cannot be registered for checkpointing",
                    "it has no state_dict and load_state_dict",
                    "give it both methods",
                )
        self._registered += objects

    def save_state(self, output_dir: str, *, asynchronous: bool = False, **kwargs: Any) -> str:
        """Save models, optimizers, schedulers, loaders, scaler, random state and registered objects. Collective.

        Any stage and any number of ranks can load it. Returns the folder. With `asynchronous` the files are written
        while training goes on; the next save, load_state and end_training wait for them and raise what went wrong.
        """
        return self.saver.save(self._engine, output_dir, asynchronous)

    def load_state(self, input_dir: str, **kwargs: Any) -> None:
        """Load what `save_state` wrote. Collective."""
        from distui.core import checkpoint

        self.telemetry.phase("checkpoint")
        self.saver.wait()
        checkpoint.load(self._engine, input_dir)
        self.telemetry.event("info", "checkpoint", f"loaded {input_dir}", step=self.clock.step)
        self.telemetry.phase("idle")

    def save_model(self, model: nn.Module, save_directory: str, max_shard_size: str | int = "10GB") -> None:
        """Write the weights of `model` as safetensors with an index. Collective."""
        from distui.core import checkpoint

        checkpoint.save_model(self._engine, model, save_directory, max_shard_size)

    def end_training(self) -> None:
        """Finish the save in flight and the trackers, and leave the process group. Collective: all ranks, last."""
        try:
            if self._saver is not None:
                self._saver.wait()
        finally:
            super().end_training()

    def memory_report(self) -> dict[str, int]:
        """Return this rank's bytes of parameters, gradients, optimizer_states and buffers.

        Where states are offloaded also host and nvme: what rests in host memory and on disk.
        """
        return self.backend.memory_by_category()

    def _report_memory(self) -> None:
        cuda: dict[str, int] = {}
        if self.device.type == "cuda":
            cuda = {
                "allocated_bytes": torch.cuda.memory_allocated(self.device),
                "reserved_bytes": torch.cuda.memory_reserved(self.device),
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
                "device_total_bytes": torch.cuda.get_device_properties(self.device).total_memory,
            }
        # What watchers add up and hold against the device's memory.
        elsewhere = ("host", "nvme") if self.device.type == "cuda" else ("nvme",)
        report = {name: nbytes for name, nbytes in self.memory_report().items() if name not in elsewhere}
        self.telemetry.memory(report, **cuda)
