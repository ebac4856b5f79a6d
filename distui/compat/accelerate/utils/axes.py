"""Accelerate's axes inside a model, as settings of distui's engine: tensor and context parallelism, and the data's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch.distributed import device_mesh as meshes
from torch.distributed.device_mesh import DeviceMesh

from distui.compat.accelerate.refusals import refuse_argument
from distui.core.errors import UserError

_SIZES = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
"""Outermost first, as the ranks lie."""


def _told(name: str, without: str) -> str:
    return os.environ.get(f"PARALLELISM_CONFIG_{name}", without)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Invalid {name}: {value}. `{name}` must be one of {' or '.join(known)}")


@dataclass
class TorchTensorParallelPlugin:
    """The ranks that share each matrix; Accelerate prefers `ParallelismConfig(tp_size=...)`."""

    tp_size: int = 1
    torch_device_mesh: Any = None


@dataclass
class TorchTensorParallelConfig:
    """Options of `ParallelismConfig(tp_size=...)`."""

    enable_async_tp: bool = False

    def __post_init__(self) -> None:
        if self.enable_async_tp:
            way = "leave it out, as with Accelerate, which has none either"
            raise refuse_argument(type(self).__name__, "enable_async_tp", True, way)


@dataclass
class TorchContextParallelConfig:
    """Options of `ParallelismConfig(cp_size=...)`: how pieces go round, which changes no number; ours is Ulysses."""

    cp_comm_strategy: str | None = None

    def __post_init__(self) -> None:
        self.cp_comm_strategy = self.cp_comm_strategy or _told("CP_COMM_STRATEGY", "allgather")
        _one_of("cp_comm_strategy", self.cp_comm_strategy, ("allgather", "alltoall"))


@dataclass
class DeepSpeedSequenceParallelConfig:
    """Options of `ParallelismConfig(sp_size=...)`; the engine attends by torch's scaled_dot_product_attention."""

    sp_seq_length: int | None = None
    sp_seq_length_is_variable: bool | None = None
    sp_attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.sp_seq_length_is_variable is None:
            self.sp_seq_length_is_variable = _told("SP_SEQ_LENGTH_IS_VARIABLE", "true").lower() == "true"
        if not self.sp_seq_length_is_variable and self.sp_seq_length is None:
            told = _told("SP_SEQ_LENGTH", "None")
            if told == "None":
                raise ValueError("when `sp_seq_length_is_variable` is `False` `sp_seq_length` must be provided")
            self.sp_seq_length = int(told)
        self.sp_attn_implementation = self.sp_attn_implementation or _told("SP_ATTN_IMPLEMENTATION", "") or None
        kind = self.sp_attn_implementation
        if kind is not None and not ("/" in kind and "flash-attn" in kind):
            _one_of("sp_attn_implementation", kind, ("flash_attention_2", "flash_attention_3", "sdpa"))


@dataclass
class ParallelismConfig:
    """How many ranks share what: copies of the model, shards of one, matrices (tp), or sequences (cp and sp, alike)."""

    dp_replicate_size: int | None = None
    dp_shard_size: int | None = None
    tp_size: int | None = None
    cp_size: int | None = None
    cp_backend: str | None = None
    sp_size: int | None = None
    sp_backend: str | None = None
    tp_handler: Any = None
    cp_handler: Any = None
    sp_handler: Any = None

    device_mesh = None
    """Made by `get_device_mesh`."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            given = getattr(self, f"{name}_size")
            size = int(_told(f"{name.upper()}_SIZE", "1")) if given is None else given
            if size < 1:
                raise ValueError(f"{name}_size must be at least 1, but got {size}")
            setattr(self, f"{name}_size", size)
        self.cp_backend = self.cp_backend or _told("CP_BACKEND", "torch")
        self.sp_backend = self.sp_backend or _told("SP_BACKEND", "deepspeed")
        _one_of("cp_backend", self.cp_backend, ("torch",))
        _one_of("sp_backend", self.sp_backend, ("deepspeed",))
        if self._size("cp") > 1 and self._size("sp") > 1:
            raise ValueError(
                "Context Parallelism (CP) and Sequence Parallelism (SP) are mutually exclusive. "
                f"Got cp_size={self.cp_size} and sp_size={self.sp_size}. "
                "Please set either cp_size=1 or sp_size=1."
            )
        kinds = {"tp": TorchTensorParallelConfig, "cp": TorchContextParallelConfig}
        for name, kind in {**kinds, "sp": DeepSpeedSequenceParallelConfig}.items():
            handler = getattr(self, f"{name}_handler")
            if self._size(name) > 1 and handler is None:
                setattr(self, f"{name}_handler", kind())
            elif self._size(name) > 1 and type(handler).__name__ != kind.__name__:  # the real Accelerate's fits too
                raise ValueError(f"{name}_handler must be a {kind.__name__}, but got {type(handler)}")

    def _size(self, name: str) -> int:
        return int(getattr(self, f"{name}_size"))

    @property
    def total_size(self) -> int:
        """The ranks that the sizes multiply to."""
        return self.data_parallel_size * self.non_data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """The ranks that see different samples."""
        return self._size("dp_replicate") * self._size("dp_shard")

    @property
    def non_data_parallel_size(self) -> int:
        """The ranks that share samples."""
        return self._size("tp") * self._size("cp") * self._size("sp")

    @property
    def shared_sequence(self) -> int:
        """The ranks that share each sequence."""
        return self._size("cp") * self._size("sp")

    def _enabled(self, *names: str) -> list[str]:
        return [name for name in names if self._size(name) > 1]

    def __getattr__(self, name: str) -> Any:
        axis = name.removesuffix("_enabled")
        if axis != name and axis in _SIZES:
            return self._size(axis) > 1
        raise AttributeError(f"'ParallelismConfig' object has no attribute {name!r}")

    @property
    def dp_dim_names(self) -> list[str]:
        """Dimensions of the mesh over which samples differ."""
        return self._enabled("dp_replicate", "dp_shard")

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Dimensions of the mesh over which samples are the same."""
        return self._enabled("tp", "cp", "sp")

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Dimensions over which states are sharded."""
        return self._enabled("dp_shard", "cp")

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Dimensions over which a loss is averaged."""
        return self._enabled("dp_replicate", "dp_shard", "cp")

    @property
    def fsdp_dim_names(self) -> list[str]:
        """Dimensions of FSDP, replicas included."""
        return [*self._enabled("dp_replicate"), "dp_shard_cp"]

    @property
    def active_mesh_dims(self) -> list[str]:
        """All dimensions of more than one rank."""
        return self.dp_dim_names + self.non_dp_dim_names

    def _get_mesh(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the names and the sizes of the axes of more than one rank."""
        names = tuple(self._enabled(*_SIZES))
        return names, tuple(map(self._size, names))

    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """Return a mesh of the axes of more than one rank, with dp, dp_shard_cp and dp_cp; None without any.

        Collective: all ranks.
        """
        names, sizes = self._get_mesh()
        if not names:
            return None
        mesh = meshes.init_device_mesh(device_type, sizes, mesh_dim_names=names)
        joint = {"dp": self.dp_dim_names, "dp_shard_cp": self.dp_shard_cp_dim_names, "dp_cp": self.dp_cp_dim_names}
        for name, parts in joint.items():
            if parts:
                mesh[tuple(parts)]._flatten(name)
        return mesh

    def get_device_mesh(self, device_type: str | None = None) -> DeviceMesh | None:
        """Return the mesh. Collective the first time."""
        if self.device_mesh is None:
            if device_type is None:
                raise ValueError("You need to pass a device_type e.g cuda to build the device mesh")
            self.device_mesh = self.build_device_mesh(device_type)
        return self.device_mesh

    def check(self, num_processes: int) -> None:
        """Refuse what the job cannot be. Raises: UserError for another number of ranks."""
        # With DeepSpeed's sequence parallelism the sizes say nothing of the data: what is left is data-parallel.
        rest = num_processes % self.total_size if self._size("sp") > 1 else num_processes - self.total_size
        if rest and self.total_size != 1:
            given = ", ".join(f"{name}_size={self._size(name)}" for name in _SIZES)
            raise UserError(
                f"ParallelismConfig total_size ({self.total_size}) does not match num_processes ({num_processes})",
                given,
                f"launch {self.total_size} ranks, or choose sizes whose product is {num_processes}",
            )

    def settle(self, num_processes: int) -> None:
        """Fill in what the sizes leave to the data, as the real one does."""
        left = num_processes // self.total_size
        if left > 1 and (self.total_size == 1 or self._size("sp") > 1):
            self.dp_replicate_size = self._size("dp_replicate") * left

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return the configuration that this asks for."""
        strategy: dict[str, Any] = {}
        if self._size("dp_shard") > 1:
            strategy["zero_stage"] = 3
            if self._size("dp_replicate") > 1:
                strategy["shard_size"] = self._size("dp_shard")
        if self._size("tp") > 1:
            strategy["tensor_parallel"] = self._size("tp")
        if self.shared_sequence > 1:
            strategy["context_parallel"] = self.shared_sequence
        return {"strategy": strategy} if strategy else {}
