"""Weights from safetensors: those of load_state_dict, of which each rank reads its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import distui
from distui.core.checkpoint.export import write_safetensors
from distui.core.errors import UserError
from tests.dist.sharding.start_models import DIM, Model, prepared, step

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _saved(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Write another model's weights in several files with an index, a tied one once; return all of them."""
    torch.manual_seed(77)
    state = {name: value.clone() for name, value in Model().state_dict().items()}
    state["norm.running_mean"] += 3
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    write_safetensors({name: value for name, value in state.items() if name != "head.weight"}, folder, 600)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return state


def _from_files(folder: str, state: dict[str, torch.Tensor], stages: tuple[int, ...]) -> None:
    for kind, stage, late in [(k, s, late) for k in ("cpu", "meta") for s in stages for late in (False, True)]:
        engine, model, optimizer, _ = prepared(kind, stage, None if late else folder)
        if late:
            engine.load_weights(model, folder)
        found = engine.get_state_dict(model)
        for name, value in state.items():
            assert torch.equal(found[name].to(value.dtype), value), (kind, stage, late, name)
        plain = Model()
        plain.load_state_dict(state)
        ids_B = torch.arange(12) % 13
        model.eval()
        plain.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids_B), plain(ids_B), atol=1e-5, rtol=1e-5)
        step(engine, model, optimizer)
        engine.free_memory()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_weights_from_files_are_those_of_load_state_dict(run_ranks: RunRanks, tmp_path: Path, num_ranks: int) -> None:
    state = _saved(tmp_path)
    run_ranks(_from_files, num_ranks, str(tmp_path), state, (0, 1, 2, 3))


def _masters(folder: str, state: dict[str, torch.Tensor]) -> None:
    for kind, stage, late in [(k, s, late) for k in ("cpu", "meta") for s in (0, 1, 3) for late in (False, True)]:
        engine, model, _, _ = prepared(kind, stage, None if late else folder, "bf16")
        if late:
            engine.load_weights(model, folder)
        found = engine.get_state_dict(model)
        for name, value in state.items():
            if not name.startswith("frozen"):
                assert torch.equal(found[name], value), (kind, stage, late, name)
            else:
                assert torch.equal(found[name], value.bfloat16().to(found[name].dtype)), (kind, stage, late, name)
        engine.free_memory()


def test_bf16_masters_take_the_precision_of_the_files(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(_masters, 2, str(tmp_path), _saved(tmp_path))


def _bytes_read(folder: str) -> tuple[int, int]:
    from distui.core.sharding.start.weight_files import WeightFiles

    numel = []
    own = WeightFiles.read

    def counting(files: WeightFiles, tensor: torch.Tensor, low: int = 0, high: int | None = None) -> torch.Tensor:
        found = own(files, tensor, low, high)
        numel.append(found.numel())
        return found

    with mock.patch.object(WeightFiles, "read", counting), mock.patch.object(dist, "broadcast") as broadcast:
        _, model, _, _ = prepared("meta", 3, folder)
        # The names travel, and the tables that are in no file; no weight does.
        sent = sum(call.args[0].numel() for call in broadcast.call_args_list if call.args[0].is_floating_point())
    assert sent == 3 * DIM
    return sum(numel), sum(param.numel() for param in nn.Module.parameters(model))


def test_a_rank_reads_only_its_part(run_ranks: RunRanks, tmp_path: Path) -> None:
    _saved(tmp_path)
    found = run_ranks(_bytes_read, 3, str(tmp_path))
    buffers = 3 * (2 * DIM + 1)
    assert sum(read for read, _ in found) == found[0][1] + buffers


def _misfits(folder: str) -> list[str]:
    texts = []
    for name, change in (("lacks", "head.bias"), ("extra", "foreign"), ("shape", "norm.weight")):
        state = {key: value.clone() for key, value in Model().state_dict().items() if key != "head.weight"}
        if name == "lacks":
            del state[change]
        else:
            state[change] = torch.ones(3)
        path = Path(folder) / f"{name}{dist.get_rank()}.safetensors"
        save_file(state, path)
        with pytest.raises(UserError) as refused:
            prepared("meta", 3, str(path))
        texts.append(str(refused.value))
    with pytest.raises(UserError, match="no such file or folder"):
        prepared("meta", 3, str(Path(folder) / "nowhere") if dist.get_rank() else str(path.with_name("nothing")))
    with distui.init_empty_weights():
        model = Model()
    engine = distui.Engine(strategy={"zero_stage": 3})
    engine.prepare_model(model, weights=str(path.with_name(f"lacks{dist.get_rank()}.safetensors")), strict=False)
    assert engine.get_state_dict(model)["head.bias"].isfinite().all()
    return texts


def test_files_that_do_not_fit(run_ranks: RunRanks, tmp_path: Path) -> None:
    for lacks, extra, shape in run_ranks(_misfits, 2, str(tmp_path)):
        assert "they lack head.bias" in lacks
        assert "the model lacks foreign" in extra
        assert "norm.weight is [3] in them and [10] in the model" in shape


@pytest.mark.parametrize("homes", [("nvme", "nvme"), ("cpu", "none")])
def test_offloaded_states_start_alike(run_ranks: RunRanks, tmp_path: Path, homes: tuple[str, str]) -> None:
    (tmp_path / "weights").mkdir()
    state = _saved(tmp_path / "weights")
    run_ranks(_offloaded, 2, str(tmp_path), state, homes)


def _offloaded(folder: str, state: dict[str, torch.Tensor], homes: tuple[str, str]) -> None:
    offload = {"optimizer": homes[0], "params": homes[1], "nvme_path": folder}
    for kind, weights in (("cpu", None), ("meta", None), ("meta", f"{folder}/weights")):
        engine, model, _, _ = prepared(kind, 3, weights, "bf16", offload)
        found = engine.get_state_dict(model)
        engine.free_memory()
        other, plain, _, _ = prepared(kind, 3, weights, "bf16")
        expected = other.get_state_dict(plain)
        assert all(torch.equal(value, expected[name]) for name, value in found.items()), (kind, weights)
        if weights is not None:
            assert torch.equal(found["blocks.1.scale"], state["blocks.1.scale"])
        other.free_memory()
