"""The part of `Accelerator` that tells how it was configured."""

from __future__ import annotations

from typing import Any

from distui.compat.accelerate.state import AcceleratorState
from distui.compat.accelerate.utils.dataclasses import DataLoaderConfiguration
from distui.compat.accelerate.utils.enums import FP8BackendType
from distui.core.engine.engine import Engine


class Places:
    """Where this rank is among those that share something with it."""

    engine: Engine
    parallelism_config: Any
    torch_device_mesh: Any

    def _rank_on(self, axis: str, kind: str) -> int:
        axes = self.parallelism_config
        if axes is None:
            raise RuntimeError(f"{kind} parallelism is not configured. Set `parallelism_config` first.")
        return int(self.torch_device_mesh.get_local_rank(axis)) if getattr(axes, f"{axis}_enabled") else 0

    @property
    def tensor_parallel_rank(self) -> int:
        """This rank among those that share its matrices."""
        return self._rank_on("tp", "Tensor")

    @property
    def context_parallel_rank(self) -> int:
        """This rank among those that share its sequences."""
        axes = self.engine.backend.axes
        return axes.index("cp") if axes is not None else 0

    @property
    def pipeline_parallel_rank(self) -> int:
        """This rank's stage."""
        axes = self.engine.backend.axes
        return axes.index("pp") if axes is not None else 0

    @property
    def data_parallel_rank(self) -> int:
        """This rank among the copies of the model."""
        return self._rank_on("dp_replicate", "Data")

    @property
    def data_parallel_shard_rank(self) -> int:
        """This rank among those that shard the model."""
        return self._rank_on("dp_shard", "Shard-based data")


class Given(Places):
    """What the `Accelerator` was given, and what the engine made of it."""

    engine: Engine
    state: AcceleratorState
    dataloader_config: DataLoaderConfiguration
    is_main_process: Any
    _autocast_dtype: str | None

    @property
    def mixed_precision(self) -> str:
        """The format of compute: no, fp16 or bf16."""
        return self.state.mixed_precision

    @property
    def scaler(self) -> Any:
        """The engine's loss scale under fp16, else None."""
        return self.engine.scaler

    @property
    def native_amp(self) -> bool:
        """Whether operations are cast by torch's autocast."""
        return self._autocast_dtype is not None

    @property
    def deepspeed_plugin(self) -> Any:
        """The plugin that the script gave, or None."""
        return self.state.deepspeed_plugin

    @property
    def parallelism_config(self) -> Any:
        """The parallelism that the script, or the settings, gave; None where all ranks are data-parallel."""
        return self.state.parallelism_config

    @property
    def torch_device_mesh(self) -> Any:
        """The mesh of `parallelism_config`, or None."""
        return self.state.device_mesh

    @property
    def is_fsdp2(self) -> bool:
        """Whether FSDP2 is the engine: it never is here."""
        return False

    @property
    def is_composable_parallelism_enabled(self) -> bool:
        """Whether FSDP2 is the engine: it never is here."""
        return False

    @property
    def fp8_backend(self) -> FP8BackendType:
        """None."""
        return FP8BackendType.NO

    @property
    def should_save_model(self) -> bool:
        """Whether this rank writes weights."""
        return self.is_main_process

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch is cut among the ranks."""
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether rank 0 reads for all; None decides by the data set."""
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """Whether samples are repeated so that every rank has as many."""
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.dataloader_config.even_batches = value

    @property
    def use_seedable_sampler(self) -> bool:
        """Whether random samplers are replaced by seedable ones."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """Whether batches travel to the device behind the host."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether saved states hold the position in an epoch."""
        return self.dataloader_config.use_stateful_dataloader
