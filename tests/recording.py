"""A machine that has no GPU and knows what would be ordered on one: a use that nothing orders raises, with both places.

    machine = RecordingMachine()
    with machine.recording(monkeypatch): ...train...

`DEVICE` is the CPU under another name. What is allocated there, or computed from it, counts as device memory; all else
is the host's. Operations are carried out at once, so numbers are right whatever the order. What is checked is whether
they would be on a GPU: the host, each stream and the stream of copies have a vector clock (Lamport's happens-before, as
in a race detector), events carry clocks from one to the other, and every access of memory, by every operator, must
come after each access that it conflicts with.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distui.core.ranks import streams
from distui.core.ranks.streams import Machine, Mark

DEVICE = torch.device("cpu", 0)
"""Tensors made here say `cpu`, as the host's do; the machine tells them apart by their memory."""

HOST, COPIES = "host", "side stream"
Clock = dict[str, int]

_AT_THE_HOST = {"aten::_local_scalar_dense", "aten::copy_", "aten::_to_copy", "aten::equal", "aten::nonzero"}
"""Where these meet both memories, or give the host a number, it waits for the device."""
_NO_ACCESS = ("aten::empty", "aten::new_empty", "aten::set_", "aten::_storage")


class UnorderedError(AssertionError):
    """Memory is used, and nothing says that what is under way there is over."""


@dataclass
class Agent:
    """The host, or a stream."""

    name: str
    clock: Clock = field(default_factory=dict)

    def join(self, clock: Clock) -> None:
        for name, time in clock.items():
            self.clock[name] = max(self.clock.get(name, 0), time)

    def tick(self) -> int:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock[self.name]


@dataclass
class Access:
    """What an agent did to a range of memory, and where in the code that was."""

    begin: int
    end: int
    agent: str
    time: int
    writes: bool
    what: str
    place: str


@dataclass
class _Recorded(Mark):
    machine: RecordingMachine
    clock: Clock

    def order(self, device: torch.device) -> None:
        self.machine.stream.join(self.clock)

    def wait(self) -> None:
        self.machine.agents[HOST].join(self.clock)


class RecordingMachine(Machine):
    """Takes the place of `streams.machine`."""

    def __init__(self) -> None:
        self.agents = {HOST: Agent(HOST), COPIES: Agent(COPIES)}
        self.stream = self.agents.setdefault("stream 0", Agent("stream 0"))
        self.num_copies = 0
        self.pinned: dict[int, int] = {}
        self._on_device: set[int] = set()
        self._accesses: list[Access] = []

    # ---- what the engine calls -----------------------------------------------------------------------------------

    def is_apart(self, device: torch.device) -> bool:
        return device == DEVICE

    def holds(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._on_device

    def current(self, device: torch.device) -> Any:
        return self.stream

    def follow(self, stream: Agent, other: Agent) -> None:
        stream.join(other.clock)

    def mark(self, device: torch.device) -> Mark:
        self.stream.join(self.agents[HOST].clock)
        return _Recorded(self, dict(self.stream.clock))

    def copy_beside(self, out: torch.Tensor, source: torch.Tensor) -> Mark:
        beside = self.agents[COPIES]
        beside.join(self.stream.clock)
        self._copy(beside, out, source)
        self.num_copies += 1
        return _Recorded(self, dict(beside.clock))

    def copy_in_line(self, out: torch.Tensor, source: torch.Tensor) -> None:
        self._copy(self.stream, out, source)

    def keep(self, tensor: torch.Tensor) -> None:
        assert self.holds(tensor)

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        self.forget(address, address + nbytes)
        self._on_device.discard(address)
        self.pinned[address] = nbytes

        def unpin() -> None:
            del self.pinned[address]

        return unpin

    # ---- what a test calls ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingMachine]:
        """Be the machine, and see every operator, while inside."""
        with monkeypatch.context() as patch, _Seeing(self):
            patch.setattr(streams, "machine", self)
            yield self

    @contextlib.contextmanager
    def in_stream(self, name: str) -> Iterator[None]:
        """As `with torch.cuda.stream(...)`: nothing is waited for."""
        before, self.stream = self.stream, self.agents.setdefault(name, Agent(name))
        try:
            yield
        finally:
            self.stream = before

    # ---- the record ----------------------------------------------------------------------------------------------

    def _copy(self, agent: Agent, out: torch.Tensor, source: torch.Tensor) -> None:
        assert self.holds(out) or self.holds(source), "a copy from the host to the host needs no stream"
        agent.join(self.agents[HOST].clock)
        with _unseen():
            out.copy_(source)
        self._access(agent, "copy", [(source, False), (out, True)])

    def _access(self, agent: Agent, what: str, used: Sequence[tuple[torch.Tensor, bool]]) -> None:
        time, place = agent.tick(), _place()
        new = []
        for tensor, writes in used:
            begin, end = _range(tensor)
            for other in self._accesses:
                if other.begin >= end or other.end <= begin or not (writes or other.writes):
                    continue
                if other.agent != agent.name and agent.clock.get(other.agent, 0) < other.time:
                    doing = "writes" if writes else "reads"
                    did = "writes" if other.writes else "reads"
                    raise UnorderedError(
                        f"{agent.name} {doing} ({what}) at\n{place}\nwhat {other.agent} still {did} "
                        f"({other.what}), begun at\n{other.place}"
                    )
            if end > begin:
                new.append(Access(begin, end, agent.name, time, writes, what, place))
        for access in new:
            # What a write covers is behind it, and of an agent's own reads the last says all.
            self._accesses = [
                other
                for other in self._accesses
                if not (
                    access.begin <= other.begin
                    and other.end <= access.end
                    and (access.writes or (other.agent == access.agent and not other.writes))
                )
            ]
            self._accesses.append(access)

    def forget(self, begin: int, end: int) -> None:
        """Begin anew with memory that is allocated again."""
        self._accesses = [other for other in self._accesses if other.begin >= end or other.end <= begin]

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record what an operator did."""
        schema, name = func._schema, func._schema.name
        given: list[tuple[torch.Tensor, bool]] = []
        aliased = False
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            aliased = aliased or (argument.alias_info is not None and not writes)
            given += [(leaf, writes) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        apart = [self.holds(tensor) for tensor, _ in given]
        device = kwargs.get("device")
        at_device = self.is_apart(device) if isinstance(device, torch.device) else any(apart)
        known = {_storage(tensor) for tensor, _ in given}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and _storage(leaf) not in known]
        for tensor in made:
            storage = _storage(tensor)
            self.forget(storage, storage + tensor.untyped_storage().nbytes())
            (self._on_device.add if at_device else self._on_device.discard)(storage)
        if aliased or name.startswith(_NO_ACCESS):
            return  # a view, or memory that is only asked for
        agent = self.stream if any(apart) or (made and at_device) else self.agents[HOST]
        if any(apart):
            # A number of the host's goes along with the launch, or lies, as fused steps' counters do, on the device.
            given = [pair for pair, on_device in zip(given, apart, strict=True) if on_device or pair[0].dim()]
        agent.join(self.agents[HOST].clock)
        self._access(agent, name, [*given, *((tensor, True) for tensor in made)])
        crosses = len({*apart, *(at_device for _ in made)}) > 1
        asks = name in _AT_THE_HOST and not made and name != "aten::copy_"
        if any(apart) and (asks or (crosses and name in _AT_THE_HOST)):
            self.agents[HOST].join(agent.clock)


class _Seeing(TorchDispatchMode):
    def __init__(self, machine: RecordingMachine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            self._machine.see(func, args, kwargs, result)
        return result


def _unseen() -> Any:
    return torch.utils._python_dispatch._disable_current_modes()


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().data_ptr()


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _place() -> str:
    lines: list[str] = []
    frame: Any = sys._getframe(2)
    while frame is not None and len(lines) < 5:
        code = frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename != __file__:
            lines.append(f"  {code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return "\n".join(lines)
