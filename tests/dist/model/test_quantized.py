"""Frozen weights that are tensor subclasses: sharded as the plain tensors that they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from distui.core.engine.engine import Engine
from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

WIDTH, BATCH, STEPS = 16, 4, 3


class Coded(torch.Tensor):
    """A matrix as int8 codes and a scale a row, as quantization libraries hold it."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Coded:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> Coded:
        return Coded(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Coded(args[0].codes, args[0].scale)

        def whole(value: Any) -> Any:
            return value.codes.to(value.scale.dtype) * value.scale if isinstance(value, Coded) else value

        return func(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


class Adapted(nn.Module):
    """A frozen matrix and a low-rank one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.base(x) + self.up(self.down(x)))


def _model(is_coded: bool = True) -> Any:
    torch.manual_seed(4)
    model: Any = nn.Sequential(*(Adapted() for _ in range(3)))
    for block in model:
        weight = block.base.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        coded = Coded((weight / scale).round().to(torch.int8), scale)
        plain = coded.codes * coded.scale
        block.base.weight = nn.Parameter(coded if is_coded else plain, requires_grad=False)
    return model


def _input(rank: int, step: int) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def _trained(model: nn.Module) -> list[torch.nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _train(stage: int, folder: Path) -> None:
    engine = Engine(strategy={"zero_stage": stage}, telemetry={"enabled": False})
    model = _model()
    optimizer: Any = torch.optim.AdamW(_trained(model), lr=1e-2)
    model, optimizer = engine.prepare(model, optimizer)
    plain = _model(is_coded=False)
    expected = torch.optim.AdamW(_trained(plain), lr=1e-2)
    for step in range(STEPS):
        engine.backward(model(_input(engine.process_index, step)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        for rank in range(engine.num_processes):
            (plain(_input(rank, step)).pow(2).mean() / engine.num_processes).backward()
        expected.step()
        expected.zero_grad()
    if stage == 3:  # no rank keeps all codes
        backend: Any = engine.backend
        shards = [unit.shard for unit in backend._models[id(model)].units]
        assert sum(shard.numel() for shard in shards if shard.dtype == torch.int8) == 3 * WIDTH * WIDTH // 2
        with engine.full_parameters(model):
            assert isinstance(model[0].base.weight, Coded)
    torch.testing.assert_close(model(_input(7, 7)), plain(_input(7, 7)), rtol=1e-4, atol=1e-6)
    engine.save_state(str(folder / str(stage)))
    state = engine.get_state_dict(model)
    assert {str(value.dtype) for name, value in state.items() if name.endswith("original0")} == {"torch.int8"}
    again = Engine(strategy={"zero_stage": 3 - stage}, telemetry={"enabled": False})
    other = _model()
    with torch.no_grad():
        for param in _trained(other):
            param.zero_()
    other, _ = again.prepare(other, torch.optim.AdamW(_trained(other), lr=1e-2))
    again.load_state(str(folder / str(stage)))
    torch.testing.assert_close(other(_input(7, 7)), plain(_input(7, 7)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_coded_base_gives_what_the_plain_one_gives(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    run_ranks(_train, 2, stage, tmp_path)


def test_a_trained_one_is_refused() -> None:
    model = _model()
    model[1].base.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"1\.base\.weight is a Coded and is trained"):
        Engine(telemetry={"enabled": False}).prepare(model)
    assert isinstance(model[0].base.weight, Coded) and not hasattr(model[0].base, "parametrizations")
    assert F.linear(torch.ones(1, WIDTH), model[0].base.weight).shape == (1, WIDTH)


def _offloaded(folder: Path) -> None:
    """bf16, with weights in host memory: codes are not cast, and come from their home."""
    home: dict[str, Any] = {"params": "cpu", "optimizer": "cpu"}
    engine = Engine(
        strategy={"zero_stage": 3}, precision={"dtype": "bf16"}, offload=home, telemetry={"enabled": False}
    )
    model = _model()
    model, optimizer = engine.prepare(model, torch.optim.AdamW(_trained(model), lr=1e-2))
    plain = _model(is_coded=False)
    for step in range(2):
        out = model(_input(engine.process_index, step))
        torch.testing.assert_close(out.float(), plain(_input(engine.process_index, step)), rtol=0.03, atol=0.03)
        engine.backward(out.float().pow(2).mean())
    optimizer.zero_grad()
    state = engine.get_state_dict(model)
    assert torch.equal(state["0.base.parametrizations.weight.original0"], _model()[0].base.weight.codes)


def test_codes_keep_their_format_in_any_home(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(_offloaded, 2, tmp_path)
