"""The part of `Engine` that keeps: whole weights, saved states, and what they weigh in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distui.core.axes.groups import Axes
from distui.core.axes.sizes import AxisSizes
from distui.core.backends.base import Backend
from distui.core.config.schema import Config
from distui.core.data.loader import PreparedLoader
from distui.core.engine.expert_load import ExpertLoad
from distui.core.engine.resuming import Resuming
from distui.core.engine.scheduler import PreparedScheduler
from distui.core.engine.step_end import IN_MEMORY, StepEnd
from distui.core.engine.tracking import Tracking
from distui.core.errors import UserError
from distui.core.ranks import ops
from distui.core.ranks.precision import LossScaler
from distui.core.ranks.random_states import RandomStates
from distui.core.sharding.homes.homes import agreed
from distui.core.sharding.optim.prepared import PreparedOptimizer
from distui.core.sharding.start.weight_files import WeightFiles

# What reads and writes checkpoints, and what swaps kernels, costs a second to import: it is when it is first used.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from distui.core.checkpoint import Saver
    from distui.core.model.kernel_swap import KernelReport


class States(Tracking):
    """Reads, writes and counts what an engine holds; the engine brings the backend."""

    backend: Backend
    config: Config
    device: torch.device
    num_processes: int
    num_micro: int
    data_group: torch.distributed.ProcessGroup | None
    active_loaders: list[Any]
    gradient_accumulation_steps: int
    inside_no_sync = 0
    sync_outside = True
    wait_for_everyone: Callable[[], None]
    scaler: LossScaler | None
    _models: list[nn.Module]
    _optimizers: list[PreparedOptimizer]
    _schedulers: list[PreparedScheduler]
    _loaders: list[PreparedLoader]
    if TYPE_CHECKING:  # of `ProcessState`, beside which an engine has this

        @property
        def data_index(self) -> int: ...
        @property
        def num_data_ranks(self) -> int: ...

    def __init__(self) -> None:
        super().__init__()
        self._registered: list[Any] = []
        self._faces: dict[str, Any] = {}
        """What the faces of other trainers keep, by their names; a checkpoint without it is loaded all the same."""
        self._saver: Saver | None = None
        self._axes: Axes | None = None
        """Those of a job without axes, made where somebody asks for the mesh."""
        self._unstepped = False
        """Whether a backward has run whose gradients no optimizer has stepped or forgotten."""
        self._half: str = ""
        """Why the engine trains no more: a load that failed half-way."""
        self.step_end = StepEnd(
            self._save_asked,
            lambda: self.saver.group(self),
            lambda: bool(self._optimizers) and any(model.training for model in self._models),
            self.num_processes,
        )
        """What is saved when the step that asked for it is over."""
        self.expert_load = ExpertLoad()
        self.resuming = Resuming(self)
        self.step_end.before_batch, self.step_end.before_work = self.resuming.before_batch, self.resuming.before_work
        self.step_end.arrived = self.resuming.arrive

    def gather_for_metrics(self, data: Any, use_gather_object: bool = False) -> Any:
        """Gather, without the samples that were repeated to even out the last batch. Collective."""
        num_real = self.active_loaders[-1].remainder if self.active_loaders else -1
        return ops.gather_for_metrics(data, num_real, use_gather_object, self.data_group)

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks by axis (pp, dp, cp, tp) as torch's DeviceMesh. Collective the first time: all ranks."""
        axes = self.backend.axes
        if axes is None:
            axes = self._axes = self._axes or Axes(AxisSizes(dp=self.num_processes))
        return axes.mesh(self.device.type)

    @property
    def saver(self) -> Saver:
        """What saves this engine, made when it is first asked for."""
        if self._saver is None:
            from distui.core.checkpoint import Saver

            self._saver = Saver(self.telemetry)
            self._saver.before_wait = self.step_end.finish
        return self._saver

    @property
    def save_failed(self) -> bool:
        """Whether a save in the background has failed on this rank."""
        return self._saver is not None and bool(self._saver.failed)

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

    def load_weights(self, model: nn.Module, folder: str | Path, strict: bool = True) -> None:
        """Give a prepared `model` the weights in a safetensors file, or a folder of them. Collective.

        At stage 3 each rank reads only its part; fp32 masters take the files' precision. With `strict=False` the files
        may lack some of the model's tensors, or have more. Before prepare: `engine.prepare(model, weights=folder)`.

        Raises: UserError that lists what does not fit.
        """
        cuts = self.backend.cuts
        files = agreed(lambda: WeightFiles(folder, model, strict, cuts), self.backend.group)
        self.backend.load_full_state_dict(model, files, strict=False)

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
        from distui.core.model.kernel_swap import KINDS, KernelReport, apply_kernels, undo_kernels

        if self.backend.axes is not None:
            raise UserError(
                "use_kernels with axes that cut the model",
                "a kernel takes a module's parameters and tokens for the whole, and each rank has pieces of them",
                "leave the kernels out, or set strategy.tensor_parallel and context_parallel to 1",
            )
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

    def save_state(self, output_dir: str, *, asynchronous: bool = False) -> str:
        """Save models, optimizers, schedulers, loaders, scaler, random state and registered objects. Collective.

        Any stage and any number of ranks can load it. Returns the folder; what a checkpoint did not write there stays.
        With `asynchronous` the files are written while training goes on; the next save, load_state and end_training
        wait for them and raise what went wrong.

        A batch in hand that was not trained with yet will come again. Raises: UserError between a backward and the
        optimizer's step, since gradients are not saved; for states of the script's that are no plain data.
        """
        return self._save_now(output_dir, asynchronous)

    def _save_now(
        self, output_dir: str, asynchronous: bool, *, loses: bool = False, without: frozenset[int] = frozenset()
    ) -> str:
        """Save; where it `loses` gradients of a step that has begun, say so and go on. Collective."""
        if self._unstepped:
            why = "gradients of a step that is under way are not saved, and a resumed run would go on without them"
            if not loses:
                raise UserError(
                    "save_state between a backward and the optimizer's step",
                    why,
                    "call it after optimizer.step(); with accumulation, only where engine.sync_gradients is True",
                )
            self.telemetry.event("warning", "checkpoint", f"{output_dir}: {why}", step=self.clock.step)
        return self.saver.save(self, output_dir, asynchronous, random=self._random_to_resume(None), without=without)

    def _random_to_resume(self, random: RandomStates | None) -> RandomStates:
        """Return the random states that a resumed run begins with: `random`, or now, or before the batch in hand."""
        random = random if random is not None else RandomStates.take()
        before = self.step_end.in_hand()
        return before.filled(random) if before is not None else random

    def _save_asked(
        self, asked: list[Any], random: RandomStates | None, *, provisional: bool = False, at_exit: bool = False
    ) -> None:
        def tell(path: Any, error: BaseException | None) -> None:
            for who in asked:
                if callable(who):
                    who(path, error)

        self.saver.save_step(
            self,
            tell,
            in_memory=IN_MEMORY in asked,
            on_disk=not asked or any(who != IN_MEMORY for who in asked),
            random=self._random_to_resume(random),
            provisional=provisional,
            at_exit=at_exit,
        )

    def _ask_saves(self) -> None:
        """Have the step that has just been made saved where the settings say so. Collective."""
        settings, step = self.config.checkpoint, self.clock.step
        if settings.every_steps and step % settings.every_steps == 0:
            self.step_end.ask()
        if settings.memory_every_steps and step % settings.memory_every_steps == 0:
            busy = torch.tensor([self.saver.is_busy], dtype=torch.int64, device=ops.object_device())
            if self.num_processes > 1:
                torch.distributed.all_reduce(busy, op=torch.distributed.ReduceOp.MAX)
            if not busy.item():
                self.step_end.ask(IN_MEMORY)

    def load_state(self, input_dir: str, *, strict: bool = True) -> list[str]:
        """Load what `save_state` wrote. Collective.

        Names, shapes, formats and classes are compared, and the checksums of what this rank reads, before anything is
        changed. With `strict=False` what either side lacks is left as it is; returns what that was, in words.

        Raises: UserError that lists what does not fit.
        """
        self.resuming.is_due = False
        return self.saver.load(self, input_dir, strict=strict)

    def forget_step(self) -> None:
        """Drop what is left of a step that began before a state was loaded."""
        for optimizer in self._optimizers:
            optimizer.discard_gradients(True)
            optimizer.grad_factor = optimizer.loss_scale = 1.0
            optimizer.skip_next = optimizer.step_was_skipped = False
        self._unstepped = False

    def _notice_forgetting(self, optimizer: PreparedOptimizer) -> None:
        forget = optimizer.discard_gradients

        def discard_gradients(set_to_none: bool) -> None:
            forget(set_to_none)
            self._unstepped = False

        optimizer.discard_gradients = discard_gradients  # type: ignore[method-assign]

    @contextmanager
    def half_loaded(self, what: str) -> Iterator[None]:
        """Train no more where the block is not left well, until another one is."""
        self._half = what
        yield
        self._half = ""

    def _refuse_half_loaded(self) -> None:
        if self._half:
            raise UserError(
                "the engine holds half of one state and half of another",
                self._half,
                "load a whole checkpoint with load_state, or build the engine anew",
            )

    def save_model(self, model: nn.Module, save_directory: str, max_shard_size: str | int = "10GB") -> None:
        """Write the weights of `model` as safetensors with an index. Collective."""
        from distui.core import checkpoint

        checkpoint.save_model(self, model, save_directory, max_shard_size, self.saver.group(self))

    def end_training(self) -> None:
        """Finish the save in flight and the trackers, and leave the process group. Collective: all ranks, last."""
        try:
            self.step_end.finish()
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
