"""Which rank this process is, on which device, and the ways for ranks to wait for and follow each other."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.ranks import ops

R = TypeVar("R")
Decorated = Callable[..., R | None]


def _place(environ: Mapping[str, str], name: str, others: tuple[str, ...], default: int) -> int:
    """Read the first of `name` and `others` that is set; refuse what is no number."""
    for key in (name, *others):
        if text := environ.get(key):
            if text.isdecimal():
                return int(text)
            raise UserError(f"{key}={text} is no rank", "it must be a whole number from 0", f"unset {key}")
    return default


class ProcessState:
    """This process among the ranks of the job: torchrun's environment, an existing group, or one process alone."""

    def __init__(self, device: str | torch.device = "auto") -> None:
        """Join the process group, making it where there is none yet. Collective: all ranks.

        `device` overrides the choice of this rank's GPU, or the CPU where there is none ("auto"); "cuda" is its GPU.

        Raises: UserError where the environment does not describe a place among the ranks, or there is no such device.
        """
        self._owns_group = False
        if dist.is_initialized():
            self.process_index: int = dist.get_rank()
            """This rank, from 0, over all nodes."""
            self.num_processes: int = dist.get_world_size()
        else:
            self.process_index, self.num_processes = self._launched()
        # A group that the user made says nothing of nodes: without a launcher's word it is one node.
        schedulers = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK") if self.num_processes > 1 else ()
        self.local_process_index: int = _place(os.environ, "LOCAL_RANK", schedulers, self.process_index)
        """This rank, from 0, among those of its node."""
        self.device: torch.device = torch.device(device) if device not in ("auto", "cuda") else self._own_device()
        if device == "cuda" and self.device.type != "cuda":
            raise UserError("run.device=cuda, and torch sees no GPU here", "nothing else was allowed", "set it to auto")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.num_processes > 1 and not dist.is_initialized():
            self._join()
        self.data_place: tuple[int, int] | None = None
        """Which of how many batches of a moment this rank has; None where each rank has its own."""
        self.data_group: dist.ProcessGroup | None = None
        """Those that have different batches, and beside this one nobody who shares its own; None is the world."""
        self._triggered = False
        self.active_loaders: list[Any] = []
        """What is being iterated, the innermost last; prepared loaders keep it."""

    @staticmethod
    def _launched() -> tuple[int, int]:
        world = _place(os.environ, "WORLD_SIZE", (), 1)
        if world <= 1:
            return 0, 1
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"WORLD_SIZE={world}, but {' and '.join(missing)} is not set",
                "a rank must know its own number and where the others meet",
                "start the script with `distui launch`, or unset WORLD_SIZE to run one process",
            )
        rank = _place(os.environ, "RANK", (), 0)
        if rank >= world:
            raise UserError(
                f"RANK={rank} is not among WORLD_SIZE={world} ranks", "ranks count from 0", "start with `distui launch`"
            )
        return rank, world

    def _own_device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_process_index >= count:
            raise UserError(
                f"local rank {self.local_process_index} has no GPU of its own",
                f"this node shows {count} (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')})",
                f"start at most {count} ranks a node: `distui launch --nproc {count}`",
            )
        return torch.device("cuda", self.local_process_index)

    def _join(self) -> None:
        # Two backends in one group: tensors and objects on the host need no GPU, whatever the device.
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            rank=self.process_index,
            world_size=self.num_processes,
            device_id=self.device if self.device.type == "cuda" else None,
        )
        self._owns_group = True

    def destroy(self) -> None:
        """Leave the process group, if this object made it. Collective: all ranks."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        self._owns_group = False

    # ---- who am I ---------------------------------------------------------------------------------------------

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.num_processes > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is its node's first rank."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return self.process_index == self.num_processes - 1

    @property
    def data_index(self) -> int:
        """Which of the ranks that have different batches this is; those that compute one together share it."""
        return self.process_index if self.data_place is None else self.data_place[0]

    @property
    def num_data_ranks(self) -> int:
        """Ranks that have different batches, counting those that share one once."""
        return self.num_processes if self.data_place is None else self.data_place[1]

    # ---- across ranks ------------------------------------------------------------------------------------------

    def gather(self, tensors: Any) -> Any:
        """Concatenate every data rank's tensors along dimension 0. Collective."""
        return ops.gather(tensors, self.data_group)

    def reduce(self, tensors: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Sum or average every data rank's tensors. Collective."""
        return ops.reduce(tensors, reduction, scale, self.data_group)

    def pad_across_processes(self, tensors: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad to the largest size over ranks along `dim`. Collective."""
        return ops.pad_across_processes(tensors, dim, pad_index, pad_first, self.data_group)

    # ---- waiting ----------------------------------------------------------------------------------------------

    def wait_for_everyone(self) -> None:
        """Return when every rank has called it. Collective."""
        if self.use_distributed:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on the others. Collective."""
        yield from self._goes_first(self.is_main_process)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Run the block on each node's first rank first, then on the others. Collective."""
        yield from self._goes_first(self.is_local_main_process)

    def _goes_first(self, first: bool) -> Iterator[None]:
        if not first:
            self.wait_for_everyone()
        try:
            yield
        finally:
            # Also when the block raised: the others would wait for ever and hide the error.
            if first:
                self.wait_for_everyone()

    # ---- on some ranks only -----------------------------------------------------------------------------------

    def _only(self, here: bool, function: Callable[..., R]) -> Decorated[R]:
        @functools.wraps(function)
        def run_if_here(*args: Any, **kwargs: Any) -> R | None:
            return function(*args, **kwargs) if here else None

        return run_if_here

    def on_main_process(self, function: Callable[..., R]) -> Decorated[R]:
        """Decorate `function` to run on rank 0 only; it returns None on the others."""
        return self._only(self.is_main_process, function)

    def on_local_main_process(self, function: Callable[..., R]) -> Decorated[R]:
        """Decorate `function` to run on each node's first rank only."""
        return self._only(self.is_local_main_process, function)

    def on_last_process(self, function: Callable[..., R]) -> Decorated[R]:
        """Decorate `function` to run on the highest rank only."""
        return self._only(self.is_last_process, function)

    @overload
    def on_process(
        self, function: None = None, process_index: int | None = None
    ) -> Callable[[Callable[..., R]], Decorated[R]]: ...
    @overload
    def on_process(self, function: Callable[..., R], process_index: int | None = None) -> Decorated[R]: ...
    def on_process(self, function: Callable[..., R] | None = None, process_index: int | None = None) -> Any:
        """Decorate a function to run on rank `process_index` only: `@engine.on_process(process_index=1)`."""
        if process_index is None or not 0 <= process_index < self.num_processes:
            raise UserError(
                f"on_process got process_index={process_index}",
                f"ranks are 0 to {self.num_processes - 1}",
                "give one of them",
            )
        here = process_index == self.process_index
        return functools.partial(self._only, here) if function is None else self._only(here, function)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once a node."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Enter with this rank's part of a list, tuple, tensor, or dict of them; the first ranks get one more.

        With `apply_padding` the last element is repeated, so that every rank has as many: drop what is too much after
        gathering. What has no length comes back whole.
        """
        if not self.use_distributed:
            yield inputs
            return
        yield self._part(inputs, apply_padding)

    def _part(self, inputs: Any, apply_padding: bool) -> Any:
        if isinstance(inputs, Mapping):
            lengths = {key: len(value) for key, value in inputs.items()}
            if len(set(lengths.values())) > 1:
                raise UserError(
                    "split_between_processes got values of different lengths",
                    ", ".join(f"{key}: {length}" for key, length in lengths.items()),
                    "give values of one length",
                )
            return {key: self._part(value, apply_padding) for key, value in inputs.items()}
        if not isinstance(inputs, (list, tuple, torch.Tensor)):
            return inputs
        each, extra = divmod(len(inputs), self.num_data_ranks)
        rank = self.data_index
        begin = rank * each + min(rank, extra)
        part: Any = inputs[begin : begin + each + (rank < extra)]
        num_missing = each + (extra > 0) - len(part) if apply_padding and len(inputs) else 0
        if isinstance(inputs, torch.Tensor):
            padding = inputs[-1:].expand(num_missing, *inputs.shape[1:])
            return torch.cat([part, padding]).to(self.device) if apply_padding else part
        return part + type(inputs)([inputs[-1]] * num_missing) if num_missing else part

    # ---- a flag that any rank may raise -----------------------------------------------------------------------

    def set_trigger(self) -> None:
        """Raise this rank's flag; every rank sees it at its next `check_trigger`."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Return whether any rank has raised its flag, and lower it again. Collective."""
        if self.use_distributed:
            flag = torch.tensor(int(self._triggered), device=ops.object_device())
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            raised = bool(flag.item())
        else:
            raised = self._triggered
        if raised:
            self._triggered = False
        return raised
