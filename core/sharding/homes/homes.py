"""Which of one model's states rest where, and the buffers that they pass through."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from distui.core.errors import UserError
from distui.core.ranks import streams
from distui.core.sharding.homes.home import Home, Transfer, flat_buffer
from distui.core.sharding.homes.memory import HostHome
from distui.core.sharding.homes.nvme import NvmeHome
from distui.core.telemetry.source import current

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Offload:
    """The homes that the configuration asks for: none (the device), cpu, nvme."""

    optimizer: str = "none"
    params: str = "none"
    nvme_path: str = ""

    @property
    def active(self) -> bool:
        """Whether any state has another home than the device."""
        return self.optimizer != "none" or self.params != "none"


def warn(message: str) -> None:
    """Tell the script and whoever watches the job."""
    source = current()
    if source is not None:
        source.event("warning", "offload", message)
    warnings.warn(message, stacklevel=2)


class Homes:
    """The homes of one model on one rank. A home that is None is the memory where the state is computed with.

    Host memory is the device's own where ranks compute on the CPU: then nothing moves for `cpu`, and the step takes
    the same way over units.
    """

    def __init__(self, offload: Offload, device: torch.device, stage: int) -> None:
        """Open the file, where a home is nvme.

        Raises: UserError where it cannot be written.
        """
        self.offload, self.device = offload, device
        on_gpu = streams.machine.is_apart(device)
        self.host = HostHome(pinned=on_gpu)
        self.nvme: NvmeHome | None = None
        if "nvme" in (offload.optimizer, offload.params):
            self.nvme = NvmeHome(offload.nvme_path, warn, pinned=on_gpu)
        known: dict[str, Home | None] = {"none": None, "cpu": self.host if on_gpu else None, "nvme": self.nvme}
        self.params = known[offload.params]
        """Parameter shards in the compute format (stage 3)."""
        self.masters = known[offload.optimizer]
        """fp32 copies of parameters in 16-bit formats."""
        self.states = self.nvme if offload.optimizer == "nvme" else None
        """Optimizer states: in host memory they lie where the step runs."""
        self.gradients = known[offload.optimizer] if stage >= 2 else None
        """Reduced gradients (stages 2 and 3)."""
        self.step_device = torch.device("cpu") if offload.optimizer != "none" else device
        self._storing: deque[tuple[Transfer, torch.Tensor]] = deque()
        self._free: list[torch.Tensor] = []
        self.buffer_bytes = 0

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a flat buffer on the device for a shard on its way; the caller owns it until `give`."""
        nbytes = numel * dtype.itemsize
        with torch.inference_mode(False):  # what an evaluation fetches ahead, training may use
            for index, buffer in enumerate(self._free):
                if buffer.numel() >= nbytes:
                    return self._free.pop(index)[:nbytes].view(dtype)
            self.buffer_bytes += nbytes
            return flat_buffer(nbytes, torch.uint8, self.device).view(dtype)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back; nothing may be in flight on it."""
        whole = torch.empty(0, dtype=torch.uint8, device=buffer.device)
        storage = buffer.untyped_storage()
        self._free.append(whole.set_(storage, 0, (storage.nbytes(),), (1,)))

    def give_after(self, transfer: Transfer, buffer: torch.Tensor) -> None:
        """Take a buffer back once `transfer` is over; at most two are in flight."""
        self._storing.append((transfer, buffer))
        while len(self._storing) > 2:
            self._give_oldest()

    def _give_oldest(self) -> None:
        transfer, buffer = self._storing.popleft()
        transfer.wait()
        self.give(buffer)

    def settle(self) -> None:
        """Wait for everything that `give_after` was told of."""
        while self._storing:
            self._give_oldest()

    def account(self, report: dict[str, int]) -> None:
        """Add the bytes that rest on the host and on NVMe to a report by category; none are counted twice."""
        host = self.host.held_bytes
        for home, category in ((self.offload.optimizer, "optimizer_states"), (self.offload.params, "parameters")):
            if home == "cpu":
                host += report[category]
                report[category] = 0
        report["host"] = host
        report["nvme"] = 0
        if self.nvme is not None:
            report["nvme"] = self.nvme.held_bytes
            report["buffers"] += self.nvme.staging_bytes

    def expect_model(self, num_trainable: int, num_frozen: int, itemsize: int, num_ranks: int) -> None:
        """Refuse a disk that has no room for the model: before anything is laid out, by what AdamW keeps.

        Raises: UserError in numbers.
        """
        if self.nvme is None:
            return
        per_parameter = 0
        if self.masters is self.nvme and self.states is not None:
            per_parameter += 8 + (4 if itemsize < 4 else 0)
        if self.gradients is self.nvme:
            per_parameter += 4
        if self.params is self.nvme:
            per_parameter += itemsize
        frozen = itemsize if self.params is self.nvme else 0
        local_ranks = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), num_ranks)
        total = (num_trainable * per_parameter + num_frozen * frozen) * local_ranks // num_ranks
        share = f" / {num_ranks} ranks x {local_ranks} on this node" if num_ranks > 1 else ""
        each = f"{num_trainable:,} parameters x {per_parameter} bytes{share}"
        self.nvme.file.expect(total, each)


def open_homes(
    model: nn.Module,
    offload: Offload,
    stage: int,
    compute_dtype: torch.dtype | None,
    num_ranks: int,
    device: torch.device,
) -> Homes:
    """Open the homes of a model's states, and refuse a disk that is too small for them.

    Raises: UserError.
    """
    params = list(model.parameters())
    homes = Homes(offload, device, stage)
    itemsize = (compute_dtype or torch.float32).itemsize
    trainable = sum(param.numel() for param in params if param.requires_grad)
    frozen = sum(param.numel() for param in params if not param.requires_grad)
    homes.expect_model(trainable, frozen, itemsize, num_ranks)
    return homes


def agreed(act: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run `act` on every rank, and go on only where all of them could. Collective: all ranks of `group`.

    Raises: UserError on every rank where one of them raised it; that rank's own where it did.
    """
    problem: UserError | None = None
    result: list[T] = []
    try:
        result.append(act())
    except UserError as error:
        problem = error
    if group is not None:
        problems: list[UserError | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
        problem = problem or next((found for found in problems if found is not None), None)
    if problem is not None:
        raise problem
    return result[0]
