"""Who this process is, shared by everything in it: `PartialState`, `AcceleratorState`, `GradientState`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from distui.compat.accelerate import beside
from distui.compat.accelerate.refusals import offered, refuse_argument
from distui.compat.accelerate.utils.dataclasses import GradientAccumulationPlugin
from distui.compat.accelerate.utils.enums import DistributedType
from distui.core.ranks.process import ProcessState

_OF_PROCESS = frozenset(
    [
        "wait_for_everyone",
        "main_process_first",
        "local_main_process_first",
        "on_main_process",
        "on_local_main_process",
        "on_last_process",
        "on_process",
        "on_local_process",
        "is_main_process",
        "is_local_main_process",
        "is_last_process",
        "use_distributed",
    ]
)


def is_initialized() -> bool:
    """Return whether there is an `AcceleratorState`."""
    return bool(AcceleratorState._shared_state)


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


_OF_STATE: tuple[str, ...] = (
    "_cpu",
    "backend",
    "device",
    "debug",
    "distributed_type",
    "fork_launched",
    "local_process_index",
    "num_processes",
    "process_index",
)


def _lacking(kind: str, name: str, known: tuple[str, ...]) -> AttributeError:
    if name not in known:
        return AttributeError(f"'{kind}' object has no attribute '{name}'")
    return AttributeError(
        f"`{kind}` object has no attribute `{name}`. This happens if `{kind}._reset_state()` was called and an "
        "`Accelerator` or `PartialState` was not reinitialized."
    )


class PartialState:
    """This process among the ranks; every instance is the same one."""

    _shared_state: ClassVar[dict[str, Any]] = beside.HELD["PartialState"]

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        """Join the job on the first call. Collective then. `kwargs` are those of `InitProcessGroupKwargs`."""
        self.__dict__ = self._shared_state
        if self.initialized:
            return
        if cpu and torch.cuda.is_available():
            raise refuse_argument("Accelerator", "cpu", True, "distui launch --set run.device=cpu ...")
        process = beside.join(kwargs.get("timeout"), kwargs.get("backend"))
        self._process = process
        self._cpu = cpu
        self.device = process.device
        self.num_processes = process.num_processes
        self.process_index = process.process_index
        self.local_process_index = process.local_process_index
        self.backend = dist.get_backend() if dist.is_initialized() else None
        self.debug = False
        self.fork_launched = os.environ.get("FORK_LAUNCHED", "0") == "1"
        self.data_places = list(range(process.num_processes))
        """By rank, which of the batches of a moment it has; ranks that share one have the same."""
        several = DistributedType.MULTI_GPU if process.device.type == "cuda" else DistributedType.MULTI_CPU
        self.distributed_type = several if process.num_processes > 1 else DistributedType.NO

    def __repr__(self) -> str:
        return (
            f"Distributed environment: {self.distributed_type.value}  Backend: {self.backend}\n"
            f"Num processes: {self.num_processes}\nProcess index: {self.process_index}\n"
            f"Local process index: {self.local_process_index}\nDevice: {self.device}\n"
        )

    @property
    def initialized(self) -> bool:
        """Whether there is a state."""
        return bool(self._shared_state)

    @property
    def num_data_ranks(self) -> int:
        """Ranks with batches of their own, counting those that share one once."""
        return int(self._process.num_data_ranks)

    @property
    def data_index(self) -> int:
        """Which of them this is."""
        return int(self._process.data_index)

    def follow(self, process: ProcessState, places: list[int]) -> None:
        """Take over who shares a batch from an engine that has axes inside the model."""
        self._process.data_place, self._process.data_group = process.data_place, process.data_group
        self.data_places = places

    @property
    def default_device(self) -> torch.device:
        """The kind of device that this machine offers."""
        return torch.device(self.device.type)

    @staticmethod
    def _reset_state() -> None:
        PartialState._shared_state.clear()
        beside.forget("PartialState")

    def set_device(self) -> None:
        """Do nothing: the device is set on joining."""

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Any:
        """Enter with this rank's part of a list, tuple, tensor, data set, or dict of them."""
        if self.num_processes > 1 and hasattr(inputs, "select") and hasattr(inputs, "column_names"):
            indices = list(range(len(inputs)))
            with self._process.split_between_processes(indices, apply_padding) as part:
                yield inputs.select(part)
            return
        with self._process.split_between_processes(inputs, apply_padding) as part:
            yield part

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once a node."""
        if self._process.is_local_main_process:
            print(*args, **kwargs)

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the process group. Collective."""
        if self.num_processes > 1 and dist.is_initialized():
            dist.destroy_process_group(group)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PROCESS and "_process" in self.__dict__:
            return getattr(self.__dict__["_process"], name)
        if name.startswith("__"):
            raise AttributeError(name)
        raise _lacking("PartialState", name, _OF_STATE)


class AcceleratorState:
    """`PartialState` with what the `Accelerator` decided; every instance is the same one."""

    _shared_state: ClassVar[dict[str, Any]] = beside.HELD["AcceleratorState"]

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        parallelism_config: Any = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None:
        self.__dict__ = self._shared_state
        if not self.initialized:
            self._partial = PartialState(cpu, **kwargs)
            self.device = self._partial.device
            self.num_processes = self._partial.num_processes
            self.process_index = self._partial.process_index
            self.local_process_index = self._partial.local_process_index
            self.distributed_type = self._partial.distributed_type
            self.backend = self._partial.backend
            self.deepspeed_plugins = None
            self.fsdp_plugin = None
            self.device_mesh: Any = None
            self.use_ipex = False
            self._mixed_precision = "no"
        if mixed_precision is not None:
            self._mixed_precision = str(mixed_precision)
        if dynamo_plugin is not None or "dynamo_plugin" not in self.__dict__:
            self.dynamo_plugin = dynamo_plugin
        if deepspeed_plugin is not None:
            self.deepspeed_plugins = deepspeed_plugin
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self.num_processes > 1:
                self.distributed_type = DistributedType.FSDP
        if parallelism_config is not None or "parallelism_config" not in self.__dict__:
            self.parallelism_config = parallelism_config
        beside.agree()

    def __repr__(self) -> str:
        return f"{self._partial!r}Mixed precision type: {self.mixed_precision}\n"

    @property
    def initialized(self) -> bool:
        """Whether there is a state."""
        return bool(self._shared_state)

    @property
    def mixed_precision(self) -> str:
        """The format that the newest `Accelerator` computes in: no, fp16 or bf16."""
        return str(self.__dict__["_mixed_precision"]) if "_mixed_precision" in self.__dict__ else "no"

    @property
    def is_fsdp2(self) -> bool:
        """Whether FSDP2 is the engine: it never is here."""
        return False

    @property
    def deepspeed_plugin(self) -> Any:
        """The plugin that the script gave; distui's own engine runs what it asks for."""
        plugins = self.deepspeed_plugins
        return next(iter(plugins.values())) if isinstance(plugins, dict) else plugins

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        AcceleratorState._shared_state.clear()
        beside.forget("AcceleratorState")
        if reset_partial_state:
            PartialState._reset_state()

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Enter with this rank's part."""
        return PartialState().split_between_processes(inputs, apply_padding)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once a node."""
        PartialState().print(*args, **kwargs)

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the process group. Collective."""
        PartialState().destroy_process_group(group)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "_partial" in self.__dict__:
            try:
                return getattr(self.__dict__["_partial"], name)
            except AttributeError as error:
                raise AttributeError(str(error).replace("PartialState", "AcceleratorState", 1)) from error
        raise _lacking("AcceleratorState", name, (*_OF_STATE, "deepspeed_plugin", "dynamo_plugin", "mixed_precision"))


class GradientState:
    """Whether gradients are synchronised now, and where the loaders stand; every instance is the same one."""

    _shared_state: ClassVar[dict[str, Any]] = beside.HELD["GradientState"]
    _listeners: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()
    """Objects whose `_on_sync_gradients(value)` is told of each change."""

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        self.__dict__ = self._shared_state
        if not self.initialized:
            self.sync_gradients = True
            self._references: list[Callable[[], Any]] = []
            self.plugin_kwargs: dict[str, Any] = {}
            self.is_xla_gradients_synced = False
        if gradient_accumulation_plugin is not None:
            self.plugin_kwargs = gradient_accumulation_plugin.to_kwargs()
            beside.agree()

    @property
    def initialized(self) -> bool:
        """Whether there is a state."""
        return bool(self._shared_state)

    @property
    def num_steps(self) -> int:
        """Micro-batches in an optimizer step."""
        return int(self.plugin_kwargs.get("num_steps") or 1)

    @property
    def adjust_scheduler(self) -> bool:
        """Whether schedulers count micro-batches too."""
        return bool(self.plugin_kwargs.get("adjust_scheduler", False))

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether the last batch of a loader ends an optimizer step."""
        return bool(self.plugin_kwargs.get("sync_with_dataloader", True))

    @property
    def dataloader_references(self) -> list[Any]:
        """None, and the loaders that are being iterated, the innermost last."""
        return [None, *(loader for reference in self._references if (loader := reference()) is not None)]

    @property
    def active_dataloader(self) -> Any:
        """The innermost loader that is being iterated, or None."""
        return self.dataloader_references[-1]

    @property
    def in_dataloader(self) -> bool:
        """Whether a loader is being iterated."""
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the script holds the last batch."""
        return self.in_dataloader and bool(self.active_dataloader.end_of_dataloader)

    @property
    def remainder(self) -> int:
        """Samples of the last global batch that are no repeats; 0 where it is full, -1 where that is not known."""
        return int(self.active_dataloader.remainder) if self.in_dataloader else -1

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\nAt end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\nGradient accumulation plugin: {self.plugin_kwargs}\n"
        )

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        self.sync_gradients = sync_gradients
        for listener in list(self._listeners):
            listener._on_sync_gradients(sync_gradients)
        beside.agree()

    def _add_dataloader(self, dataloader: Any) -> None:
        self._references.append(weakref.ref(dataloader))
        beside.agree()

    def _remove_dataloader(self, dataloader: Any) -> None:
        self._references[:] = [reference for reference in self._references if reference() not in (None, dataloader)]
        beside.agree()

    @staticmethod
    def _reset_state() -> None:
        GradientState._shared_state.clear()
        beside.forget("GradientState")


def __getattr__(name: str) -> Any:
    return offered("accelerate.state", {}, name)
