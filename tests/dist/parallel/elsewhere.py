"""What a rank does not have of a model: how it is read, and what is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.dist.parallel.experts import Skewed, plain_loss
from tests.dist.parallel.refused_models import Failing
from tests.dist.parallel.trainings import VOCAB
from torch import nn

import distui
from distui.core.errors import DistuiError

READS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "square": lambda params: sum(param.square().sum() for param in params),
    "norm": lambda params: torch.stack([param.norm() for param in params]),
    "foreach": lambda params: torch._foreach_norm(params),  # type: ignore[arg-type]
    "vector": nn.utils.parameters_to_vector,
    "detach": lambda params: [param.detach() for param in params],
    "data": lambda params: [param.data for param in params],
    "grad": lambda params: [param.grad.norm() for param in params if param.grad is not None],
    "average": lambda params: [torch.zeros(()).add(param) for param in params],
    "in place": lambda params: [param.mul_(0.9) for param in params],
    "data in place": lambda params: [param.data.mul_(0.9) for param in params],
    "assigned": lambda params: list(map(_assign, params)),
    "initialised": lambda params: [nn.init.zeros_(param) for param in params],
    "asked": lambda params: torch.autograd.grad(torch.ones((), requires_grad=True) * 2, params, allow_unused=True),
    "item": lambda params: [param.flatten()[0].item() for param in params],
    "listed": lambda params: [param.tolist() for param in params],
}


def _assign(param: nn.Parameter) -> None:
    param.data = torch.zeros(param.shape)


def _told(act: Callable[[], Any]) -> str:
    try:
        act()
    except DistuiError as error:
        return str(error)
    return "nothing"


def _described(params: list[nn.Parameter]) -> None:
    """Ask for what needs no numbers."""
    for param in params:
        assert isinstance(param, nn.Parameter) and param.requires_grad and param.is_leaf
        assert param.numel() == torch.Size(param.shape).numel() and "Parameter" in repr(param)
        assert param.dtype is torch.float32 and not param.is_complex() and hash(param) == hash(param)
        param.grad = None


def stages_read() -> dict[str, str]:
    """Read parameters of all blocks in a pipeline."""
    engine = distui.Engine(strategy={"pipeline_parallel": 2}, batch={"accumulation": 2})
    model = Failing()
    model.calls = 100  # it is long past the one that fails
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    engine.backward(model(torch.ones(4, 3, dtype=torch.int64)))
    with torch.no_grad():
        told = {kind: _told(lambda read=read: read(list(model.parameters()))) for kind, read in READS.items()}  # type: ignore[misc]
    _described(list(model.parameters()))
    optimizer.zero_grad()
    engine.backward(model(torch.ones(4, 3, dtype=torch.int64)))
    assert engine.clip_grad_norm_(model.parameters(), 1.0) is not None
    optimizer.step()
    assert engine.get_state_dict(model)["blocks.3.weight"].shape == (8, 8)
    engine.free_memory()
    told["afterwards"] = _told(lambda: READS["square"](list(model.parameters())))
    return told


def experts_read(stage: int) -> dict[str, str]:
    """Read parameters of experts that other ranks have too, or a forward of theirs does."""
    engine = distui.Engine(strategy={"expert_parallel": 2, "zero_stage": stage})
    model: Any = Skewed("up")  # up is frozen
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids_BT = torch.ones(4, 3, dtype=torch.int64)
    engine.backward(plain_loss("", model, ids_BT))
    down, up = ([getattr(layer.experts, name) for layer in model.layers] for name in ("down", "up"))
    with torch.no_grad():
        told = {kind: _told(lambda read=read: read(down)) for kind, read in READS.items()}  # type: ignore[misc]
        told["frozen"] = _told(lambda: READS["square"](up))
        told["frozen data"] = _told(lambda: READS["data"](up))
    _described([param for param in down if stage == 0 or param is not None])
    told["others"] = _told(lambda: READS["square"]([model.head.weight]))
    optimizer.zero_grad()
    engine.backward(plain_loss("", model, ids_BT))
    with engine.gradients(model) as grads:
        assert grads["layers.0.experts.down"].shape == (4, 32, 16)
    optimizer.step()
    layer: Any = model.layers[0]
    layer.register_forward_hook(lambda module, args, output: output + module.experts.down.square().sum())
    told["in a forward"] = _told(lambda: plain_loss("", model, ids_BT))
    engine.free_memory()
    return told


def one_evaluates_alone() -> str:
    """Have rank 0 alone evaluate where the others train."""
    engine = distui.Engine(strategy={"expert_parallel": 2})
    model: Any = engine.prepare(Skewed(""))
    ids_BT = torch.ones(4, 3, dtype=torch.int64)

    def act() -> None:
        if engine.process_index == 0:
            with torch.no_grad():
                plain_loss("", model, ids_BT)
        engine.backward(plain_loss("", model, ids_BT))

    told = _told(act)
    engine.free_memory()
    return told


# ---- what modules leave ----------------------------------------------------------------------------------------------


class Leaving(nn.Linear):
    """A block that leaves something in an attribute, where it is one of those that do."""

    def __init__(self, leaves: bool) -> None:
        super().__init__(8, 8)
        self.leaves, self.aux, self.inner = leaves, None, nn.Identity()
        self.maps: list[torch.Tensor] = []
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x_BTD: torch.Tensor, into: list[torch.Tensor] | None = None) -> torch.Tensor:
        found = super().forward(x_BTD)
        if self.leaves:
            aux: Any = found.square().mean()
            self.aux = aux
            self.inner.kept = aux
            self.maps.append(aux.detach())
            self.seen += 1
        if into is not None:
            into.append(found)
        return found


class Chain(Failing):
    """A chain of such blocks; `leaving` are those that leave something."""

    def __init__(self, way: str, leaving: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.way, self.last = way, None
        self.blocks = nn.ModuleList(Leaving(index in leaving) for index in range(4))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        into: list[torch.Tensor] | None = [] if self.way == "given" else None
        for block in self.blocks:
            x_BTD = block(x_BTD, into)
        blocks: Any = self.blocks
        loss = self.head(x_BTD).mean()
        if self.way == "own forward":
            return loss + sum(block.aux for block in blocks if isinstance(block.aux, torch.Tensor))
        last: Any = loss.detach()
        self.last = last
        return loss


LEFT: dict[str, Callable[[Any], Any]] = {
    "aux": lambda model: sum(block.aux for block in model.blocks),
    "aux of a kind": lambda model: sum(block.aux for block in model.blocks if isinstance(block.aux, torch.Tensor)),
    "aux that is": lambda model: sum(block.aux for block in model.blocks if block.aux is not None),
    "inner": lambda model: torch.stack([getattr(block.inner, "kept", torch.zeros(())) for block in model.blocks]),
    "maps": lambda model: [one for block in model.blocks for one in block.maps],
    "buffer": lambda model: sum(float(block.seen) for block in model.blocks),
    "first": lambda model: model.blocks[0].aux.item(),
    "last": lambda model: f"{model.last:.3f}",
}


def left_behind(schedule: str, train: bool) -> dict[str, str]:
    """Read what blocks have left in attributes, after a pass and inside of one."""
    strategy = {"pipeline_parallel": 2, "pipeline_schedule": schedule}
    ids_BT = torch.ones(4, 3, dtype=torch.int64)
    found = {}
    for way, leaving in (("script", (0, 1, 2, 3)), ("some", (0,)), ("own forward", (0, 1, 2, 3)), ("given", ())):
        engine = distui.Engine(strategy=strategy, batch={"accumulation": 2})
        model: Any = engine.prepare(Chain(way, leaving)).train(train)
        told = _told(lambda: model(ids_BT))  # noqa: B023
        if way in ("own forward", "given"):
            found[way] = told
        else:
            assert told == "nothing", told
            kinds = LEFT if way == "script" else ("aux that is", "first")
            found |= {f"{way}: {kind}": _told(lambda: LEFT[kind](model)) for kind in kinds}  # noqa: B023
        engine.free_memory()
        assert all(block.aux is None or isinstance(block.aux, torch.Tensor) for block in model.blocks)
    return found


# ---- what embeddings give --------------------------------------------------------------------------------------------


class Masking(nn.Embedding):
    def forward(self, ids_BT: torch.Tensor) -> Any:
        return super().forward(ids_BT), ids_BT != 1


class Masked(Failing):
    """Has an embedding that gives a mask too, which is used in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.embedding = way, Masking(VOCAB, 8)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD, mask_BT = self.embedding(ids_BT)
        ones_BT = torch.ones_like(x_BTD[..., 0]) + x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.int64).float()
        if self.way == "asked" and mask_BT.all():
            return self.head(x_BTD).mean()
        if self.way == "compared":
            mask_BT = x_BTD.sum(-1) != 0
        for block in self.blocks:
            x_BTD = block(x_BTD)
        found_BT = self.head(x_BTD).squeeze(-1) * ones_BT
        if self.way in ("chosen", "compared"):
            found_BT = torch.where(mask_BT, found_BT, 0.0)
        if self.way == "counted":
            return found_BT.sum() / mask_BT.sum()
        if self.way == "indexed":
            return found_BT[mask_BT].mean()
        if self.way == "written":
            weights_BT = torch.ones(ids_BT.shape, dtype=torch.int64)
            weights_BT[:, :] = mask_BT
            return (found_BT * weights_BT).mean()
        return found_BT.mean()


WAYS = ("asked", "compared", "chosen", "counted", "indexed", "written")


def masks() -> dict[str, Any]:
    """Use what an embedding of another stage gives, in ways that need its numbers, and in one that needs its shape."""
    ids_BT = torch.arange(12).view(4, 3) % 5
    found: dict[str, Any] = {}
    for way in (*WAYS, "shape"):
        engine = distui.Engine(strategy={"pipeline_parallel": 2}, batch={"accumulation": 2})
        torch.manual_seed(0)
        model = Masked(way)
        expected = float(model(ids_BT).detach())
        model = engine.prepare(model)
        if way == "shape":
            found[way] = abs(float(model(ids_BT).detach()) - expected)
        else:
            found[way] = _told(lambda: model(ids_BT))  # noqa: B023
        engine.free_memory()
    return found
