"""Random trainings as plain data, how Hypothesis draws them, and what runs one, plainly or on an engine's ranks."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import distui
from distui.core.sharding.transport.agreement import Agreement
from distui.core.sharding.transport.transport import Pending, Transport
from distui.core.sharding.units import partition
from tests.dist.sharding.trainings import DIM, STAGES, Block, Net, Result, Run, batch, problems, square

BLOCKS = ("plain", "normed", "wide")
WAYS = ("call", "forward", "parts", "method", "raw", "checkpoint", "reentrant", "object")
EXTRAS = ("", "weights", "no_grad", "penalty", "last_weight")
WRITES = ("clamp", "assign", "in_place", "detached")


@dataclass(frozen=True)
class Pass:
    """One forward: which blocks in which order, each by its way."""

    calls: tuple[tuple[int, str], ...]
    evaluates: bool = False
    skewed: bool = False
    """Odd ranks go through the blocks the other way round, and leave the first out."""
    by_method: bool = False
    extra: str = ""


@dataclass(frozen=True)
class Step:
    passes: tuple[Pass, ...]
    joined: bool = False
    """One backward for all passes, else one for each."""
    trainable: tuple[int, ...] | None = None
    """Blocks that are trainable from here on, and no others; None changes nothing."""
    write: tuple[str, int] | None = None
    reads: int | None = None
    alone: int | None = None
    """A block that rank 1 alone evaluates after the step."""


@dataclass(frozen=True)
class Program:
    blocks: tuple[str, ...]
    steps: tuple[Step, ...]
    same: tuple[int, int] | None = None
    """The second block is the first once more."""
    tied: tuple[int, int] | None = None
    frozen: tuple[int, ...] = ()
    optimizer: str = "momentum"
    joins: bool = False
    """Whether small blocks become one unit."""
    seed: int = 0


# ---- drawing ------------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program of one to four blocks and one to four steps."""
    blocks = tuple(draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4)))
    index = st.integers(0, len(blocks) - 1)
    some = st.lists(index, unique=True, max_size=3).map(lambda found: tuple(sorted(found)))
    calls = st.lists(st.tuples(index, st.sampled_from(WAYS)), max_size=5).map(tuple)
    rarely = st.sampled_from((False, False, False, True))
    one_pass = st.builds(Pass, calls, rarely, rarely, rarely, st.sampled_from(("", "", *EXTRAS)))
    step = st.builds(
        Step,
        st.lists(one_pass, min_size=1, max_size=2).map(tuple),
        st.booleans(),
        st.none() | some,
        st.none() | st.tuples(st.sampled_from(WRITES), index),
        st.none() | index,
        st.none() | index,
    )
    pair = st.none() | st.tuples(index, index).map(lambda found: (min(found), max(found)))
    return draw(
        st.builds(
            Program,
            st.just(blocks),
            st.lists(step, min_size=1, max_size=4).map(tuple),
            pair,
            pair,
            some,
            st.sampled_from(("momentum", "decaying")),
            rarely,
            st.integers(0, 9),
        )
    )


# ---- running ------------------------------------------------------------------------------------------------------


class _Box:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class _Drawn(Block):
    def __init__(self, made: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM) if made == "normed" else nn.Identity()
        outer = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.outer = outer if made == "wide" else None

    def forward(self, x: Any) -> Any:
        if isinstance(x, _Box):
            return _Box(self.encode(x.value))
        return self.encode(x)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(self.norm(x))
        return x if self.outer is None else x + 0.5 * self.outer(x)


def _parts(block: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.tanh(block.inner(block.norm(x)))
    return x if block.outer is None else block.outer[2](torch.sin(block.outer[0](x)))


class _Model(Net):
    def __init__(self, program: Program) -> None:
        made = iter(program.blocks)
        super().__init__(lambda: _Drawn(next(made)), len(program.blocks))
        if program.tied is not None:
            first, second = program.tied
            self.blocks[second].inner.weight = self.blocks[first].inner.weight  # type: ignore[union-attr]
        if program.same is not None:
            self.blocks[program.same[1]] = self.blocks[program.same[0]]
        for index in program.frozen:
            self.blocks[index].requires_grad_(False)
        self.calls: tuple[tuple[int, str], ...] = ()
        self.recomputes = True

    def between(self, x: torch.Tensor) -> torch.Tensor:
        for index, way in self.calls:
            x = self._through(self.blocks[index], way, x)
        return x

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)

    def _through(self, block: Any, way: str, x: torch.Tensor) -> torch.Tensor:
        if way in ("checkpoint", "reentrant") and self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=way == "reentrant")
        if way == "parts":
            return _parts(block, x)
        if way == "method":
            return block.encode(x)
        if way == "forward":
            return block.forward(x)
        if way == "raw":
            return x + torch.tanh(F.linear(x, block.inner.weight)) * (1 + block.inner.bias)
        if way == "object":
            return block(_Box(x)).value
        return block(x)


def _loss_of(model: Any, one: Any, part: Any, rank: int) -> Any:
    return _loss(model, one, part, rank)


def _loss(model: _Model, one: Pass, x: torch.Tensor, rank: int) -> torch.Tensor:
    model.calls = one.calls[:0:-1] if one.skewed and rank % 2 else one.calls
    model.recomputes = one.extra != "penalty"
    model.train(not one.evaluates)
    if one.extra == "penalty":
        x = x.clone().requires_grad_(True)
    output = model.encode(x) if one.by_method else model(x)
    loss = square(output)
    if one.extra == "penalty":
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        loss = loss + 0.1 * slope.square().sum(1).mean()
    elif one.extra == "weights":
        loss = loss + 0.01 * sum(param.square().sum() for param in model.parameters())
    elif one.extra == "last_weight":
        loss = loss + 0.1 * model.blocks[-1].inner.weight.sin().mean()  # type: ignore[union-attr,operator]
    elif one.extra == "no_grad":
        with torch.no_grad():
            target = model(x + 1)
        loss = loss + F.mse_loss(output, target)
    return loss


def _write(block: Any, way: str) -> None:
    for param in block.parameters():
        if way == "clamp":
            param.data.clamp_(-0.2, 0.2)
        elif way == "assign":
            param.data = param.data * 0.75
        elif way == "detached":
            param.detach().view(-1)[1:3] = 0.125
        else:
            with torch.no_grad():
                param.mul_(0.75)


def run_program(run: Run, program: Program) -> Result:
    """Return the weights that a program ends with, and what it read on the way."""
    net = _Model(program)
    rate = {"momentum": 0.1, "decaying": 0.02}[program.optimizer]
    make: Any = torch.optim.SGD if program.optimizer == "momentum" else torch.optim.AdamW
    # What is zero in one piece and nearly zero in two must not become a whole step by Adam's division.
    options: Any = {"momentum": 0.9} if make is torch.optim.SGD else {"weight_decay": 0.5, "eps": 1e-2}
    model, optimizer = run.prepare(net, make(net.parameters(), lr=rate, **options))
    seen: Result = {}
    for number, step in enumerate(program.steps):
        if step.trainable is not None:
            for index, block in enumerate(model.blocks):
                block.requires_grad_(index in step.trainable)
        losses = []
        for turn, one in enumerate(step.passes):
            x = batch(10 * number + turn)
            loss = run.mean_over_ranks(partial(_loss_of, model, one), x)
            if step.joined:
                losses.append(loss)
            else:
                run.backward(loss)
        if losses:
            run.backward(torch.stack(losses).sum())
        optimizer.step()
        optimizer.zero_grad()
        if step.reads is not None:
            seen[f"read.{number}"] = model.blocks[step.reads].inner.weight.detach().clone()
        if step.write is not None:
            _write(model.blocks[step.write[1]], step.write[0])
        if step.alone is not None and run.rank == 1:
            with torch.no_grad():
                assert not model.blocks[step.alone](batch(number)).isnan().any()
    return run.state(model) | seen


# ---- on ranks -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def delays(seed: int, longest_s: float = 0.002) -> Iterator[None]:
    """Wait a random while wherever this rank waits for others or starts something with them, so that they drift."""
    chance = random.Random(seed)

    def delayed(function: Any) -> Any:
        def later(*args: Any, **kwargs: Any) -> Any:
            if chance.random() < 0.3:
                time.sleep(chance.random() * longest_s)
            return function(*args, **kwargs)

        return later

    points = [(Pending, "wait"), (Agreement, "post"), (Agreement, "result"), (Agreement, "union")]
    points += [(Transport, name) for name in ("all_gather", "reduce_scatter", "sum_gradient")]
    with contextlib.ExitStack() as patched:
        for owner, name in points:
            patched.enter_context(mock.patch.object(owner, name, delayed(getattr(owner, name))))
        yield


def compare_program(program: Program, num_ranks: int) -> list[str]:
    """Run a program at every stage and return where it is not plain torch's. Collective: all ranks."""
    partition.SMALL_UNIT_NUMEL = 600 if program.joins else 1
    torch.manual_seed(program.seed)
    plain = Run(num_ranks)
    expected = run_program(plain, program)
    told = []
    for stage in STAGES:
        engine = distui.Engine(strategy={"zero_stage": stage})
        torch.manual_seed(program.seed)
        try:
            with delays(1000 * program.seed + engine.process_index):
                found = run_program(Run(num_ranks, engine, stage), program)
        except Exception as error:
            raise AssertionError(f"stage {stage}: {type(error).__name__}: {error}") from error
        told += problems(f"stage {stage}", plain.start, expected, found, least=0.0)
        engine.free_memory()
    return told
