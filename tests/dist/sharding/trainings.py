"""What a small training needs to run twice, plainly on the whole batch and on an engine's ranks, and be compared.

A kind is a function of a `Run` that returns tensors by name: weights, or what else a script would see. It is written
once, as a script is, and knows of the engine only where a script would have to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import distui
from distui.core.sharding.units import partition

DIM, OUT, BATCH = 12, 5, 12
STAGES = (0, 1, 2, 3)

Result = dict[str, torch.Tensor]


class Run:
    """Plain torch where `engine` is None, else the engine; of `num_ranks` either way."""

    def __init__(self, num_ranks: int, engine: distui.Engine | None = None, stage: int = 0) -> None:
        self.num_ranks, self.engine, self.stage = num_ranks, engine, stage
        self.start: Result = {}
        self.has_all = engine is None or engine.num_processes < num_ranks
        """Whether this process does what all ranks do: plain torch, or an engine by itself."""

    @property
    def is_plain(self) -> bool:
        return self.engine is None

    @property
    def rank(self) -> int:
        return self.engine.process_index if self.engine is not None else 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        self.start |= {name: value.detach().clone() for name, value in model.state_dict().items()}
        return (model, optimizer) if self.engine is None else self.engine.prepare(model, optimizer)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a batch; plain torch has all of it."""
        return x if self.has_all else x.chunk(self.num_ranks)[self.rank]

    def mean_over_ranks(self, loss: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return the loss of what each rank does with its part: plain torch does it for all of them."""
        parts = list(enumerate(x.chunk(self.num_ranks)))
        mine = parts if self.has_all else parts[self.rank : self.rank + 1]
        return torch.stack([loss(part, rank) for rank, part in mine]).mean()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        if self.engine is None:
            loss.backward(**kwargs)
        else:
            self.engine.backward(loss, **kwargs)

    @contextmanager
    def gradients(self, model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        if self.engine is not None:
            with self.engine.gradients(model) as found:
                yield found
            return
        params = dict(model.named_parameters())
        plain = {name: param.grad for name, param in params.items() if param.grad is not None}
        yield plain
        for name, grad in plain.items():
            params[name].grad = grad

    def state(self, model: nn.Module) -> Result:
        state = model.state_dict() if self.engine is None else self.engine.get_state_dict(model)
        return {name: value.detach().clone() for name, value in state.items()}


@dataclass(frozen=True)
class Kind:
    """A training, and where it is run."""

    train: Callable[[Run], Result]
    stages: tuple[int, ...]
    in_bf16: bool
    joined: bool
    settings: dict[str, Any]


KINDS: dict[str, Kind] = {}


def kind(
    *, stages: tuple[int, ...] = STAGES, in_bf16: bool = False, joined: bool = False, **settings: Any
) -> Callable[[Any], Any]:
    """Have a training run at `stages` on ranks, and against one process `in_bf16` too; `settings` are the engine's.

    Its blocks share one unit where they are `joined`; else each has its own.
    """

    def add(train: Callable[[Run], Result]) -> Callable[[Run], Result]:
        assert train.__name__ not in KINDS
        KINDS[train.__name__] = Kind(train, stages, in_bf16, joined, settings)
        return train

    return add


def batch(step: int, width: int = DIM) -> torch.Tensor:
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(100 + step))


def square(output: torch.Tensor) -> torch.Tensor:
    return output.float().square().mean()


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def decaying(model: nn.Module) -> torch.optim.Optimizer:
    # What the two sides round apart must not become a whole step by Adam's division.
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5, eps=1e-2)


def train(
    run: Run,
    model: nn.Module,
    *,
    forward: Callable[[Any, torch.Tensor], torch.Tensor] = lambda model, x: square(model(x)),
    make: Callable[[nn.Module], torch.optim.Optimizer] = momentum,
    num_steps: int = 3,
    before: Callable[[int, Any], None] = lambda step, model: None,
    graded: Callable[[int, Any], None] = lambda step, model: None,
    after: Callable[[int, Any], None] = lambda step, model: None,
    inputs: Callable[[int], torch.Tensor] = batch,
) -> Result:
    """Train as most scripts do: `before` the forward, `graded` before the step, `after` zero_grad."""
    model, optimizer = run.prepare(model, make(model))
    steps(run, model, optimizer, num_steps, forward=forward, before=before, graded=graded, after=after, inputs=inputs)
    return run.state(model)


def steps(
    run: Run,
    model: Any,
    optimizer: Any,
    num_steps: int = 2,
    *,
    forward: Callable[[Any, torch.Tensor], torch.Tensor] = lambda model, x: square(model(x)),
    before: Callable[[int, Any], None] = lambda step, model: None,
    graded: Callable[[int, Any], None] = lambda step, model: None,
    after: Callable[[int, Any], None] = lambda step, model: None,
    inputs: Callable[[int], torch.Tensor] = batch,
) -> None:
    """Train what is prepared, for some more steps."""
    for step in range(num_steps):
        before(step, model)
        run.backward(forward(model, run.local(inputs(step))))
        graded(step, model)
        optimizer.step()
        optimizer.zero_grad()
        after(step, model)


class Block(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    """Blocks between a root in front and a root behind; what is `between` is theirs."""

    def __init__(self, make_block: Callable[[], nn.Module] = Block, num_blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(make_block() for _ in range(num_blocks))
        self.head = nn.Linear(DIM, OUT)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.between(self.first(x)))


# ---- comparing ----------------------------------------------------------------------------------------------------


def problems(
    name: str, start: Result, expected: Result, found: Result, least: float = 1e-2, share: float = 1e-3
) -> list[str]:
    """Return where `found` is not `expected`, measured by how far each tensor was to move from `start`.

    One of them must move by `least`, or nothing would be shown.
    """
    told, furthest = [], 0.0
    if expected.keys() != found.keys():
        told.append(f"{name}: has {sorted(found.keys() ^ expected.keys())} on one side only")
    for key in expected.keys() & found.keys():
        wanted, given = expected[key].double(), found[key].double()
        before = start[key].double() if key in start else torch.zeros_like(wanted)
        moved = (wanted - before).abs().max().item() if wanted.numel() else 0.0
        furthest = max(furthest, moved)
        error = (wanted - given).abs().max().item() if wanted.numel() else 0.0
        if not error <= 1e-6 + share * moved:
            told.append(f"{name}: {key} is off by {error:.2e}, of {moved:.2e} that it was to move")
    if furthest < least:
        told.append(f"{name}: nothing moved further than {furthest:.1e}, so nothing is shown")
    return told


def run_kind(
    name: str, num_ranks: int, stage: int, dtype: str | None, joined: bool = False
) -> tuple[Result, Result]:
    """Return what a kind starts from and ends with: in plain torch where `dtype` is None, else on this job's ranks."""
    chosen = KINDS[name]
    partition.SMALL_UNIT_NUMEL = 1 << 21 if joined or chosen.joined else 1  # one is a unit a block
    engine = None
    if dtype is not None:
        sections = {"strategy": {"zero_stage": stage}, "precision": {"dtype": dtype}, **chosen.settings}
        engine = distui.Engine(**sections)
    run = Run(num_ranks, engine, stage)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what torch has deprecated is still used
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # nested, reentrant
            found = chosen.train(run)
    except Exception as error:
        place = "plain torch" if engine is None else f"stage {stage}"
        raise AssertionError(f"{name} in {place}: {type(error).__name__}: {error}") from error
    if engine is not None:
        engine.free_memory()
    return run.start, found


def compare_kinds(names: list[str], num_ranks: int, stage: int, joined: bool = False) -> list[str]:
    """Run each kind plainly and on this job's ranks, and return the problems. Collective: all ranks."""
    told = []
    for name in names:
        start, expected = run_kind(name, num_ranks, stage, None)
        told += problems(name, start, expected, run_kind(name, num_ranks, stage, "fp32", joined)[1])
    return told
