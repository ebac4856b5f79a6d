"""Saved states through the faces of Accelerate and DeepSpeed: hooks, registered objects, tags, tied weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


class Tied(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


class Counter:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def _accelerate(own: bool) -> Any:
    """Return distui's face, or with `own` the real library."""
    if own:
        import accelerate  # type: ignore[import-untyped]

        accelerate.state.AcceleratorState._reset_state(True)
        return accelerate
    from distui.compat import accelerate as face
    from distui.compat.accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    return face


def _hooks(own: bool, folder: str) -> dict[str, Any]:
    """Save and load as a script with adapters does: its hooks keep the second model's weights themselves."""
    library = _accelerate(own)
    seen: list[Any] = []

    def prepared(seed: int) -> tuple[Any, ...]:
        accelerator = library.Accelerator(cpu=True, gradient_accumulation_steps=3)
        torch.manual_seed(seed)
        one, two = nn.Linear(3, 3), nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
        one, two, optimizer = accelerator.prepare(one, two, optimizer)
        counter = Counter(seed)
        accelerator.register_for_checkpointing(counter)

        def on_save(models: list[Any], weights: list[Any], output_dir: str) -> None:
            seen.append(("save", len(models), [sorted(each) for each in weights], Path(output_dir).name))
            torch.save(weights.pop(), Path(output_dir) / "adapter.bin")
            (Path(output_dir) / "sub").mkdir(exist_ok=True)
            (Path(output_dir) / "sub" / "config.json").write_text("{}")

        def on_load(models: list[Any], input_dir: str) -> None:
            seen.append(("load", len(models), sorted(p.name for p in Path(input_dir).iterdir() if p.name in KEPT)))
            models.pop().load_state_dict(torch.load(Path(input_dir) / "adapter.bin"))

        accelerator.register_save_state_pre_hook(on_save)
        accelerator.register_load_state_pre_hook(on_load)
        return accelerator, one, two, optimizer, counter

    accelerator, one, two, optimizer, counter = prepared(1)
    for _ in range(3):
        with accelerator.accumulate(one):
            accelerator.backward(one(torch.ones(2, 3)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    with accelerator.accumulate(one):  # a micro-batch of the next step
        pass
    returned = accelerator.save_state(folder)
    kept = [value.clone() for model in (one, two) for value in accelerator.unwrap_model(model).state_dict().values()]
    library = _accelerate(own)
    accelerator, one, two, optimizer, counter = prepared(2)
    accelerator.load_state(folder)
    found = [value for model in (one, two) for value in accelerator.unwrap_model(model).state_dict().values()]
    told = ""
    accelerator.register_for_checkpointing(Counter())
    try:
        accelerator.load_state(folder)
    except RuntimeError as error:
        told = str(error).splitlines()[0]
    return {
        "seen": seen,
        "returned": str(returned),
        "same": [torch.equal(one, other) for one, other in zip(kept, found, strict=True)],
        "counter": counter.value,
        "step": accelerator.step,
        "files": sorted(path.name for path in Path(folder).iterdir() if path.name in KEPT),
        "told": told,
    }


KEPT = ("adapter.bin", "sub")


@pytest.mark.filterwarnings("ignore")
def test_hooks_and_registered_objects_are_as_in_accelerate(tmp_path: Path) -> None:
    real = _hooks(True, str(tmp_path / "ckpt"))
    for path in (tmp_path / "ckpt").iterdir():
        if path.name in KEPT:
            assert path.exists()
    (tmp_path / "ckpt").rename(tmp_path / "real")
    ours = _hooks(False, str(tmp_path / "ckpt"))
    assert ours == real
    assert real["same"] == [True] * 4 and real["files"] == ["adapter.bin", "sub"] and real["step"] == 4


def _hooks_on_ranks(folder: str, stage: int) -> tuple[list[bool], list[str]]:
    face = _accelerate(False)
    from distui.compat.accelerate.utils import FullyShardedDataParallelPlugin

    def prepared(seed: int) -> tuple[Any, ...]:
        plugin = FullyShardedDataParallelPlugin(sharding_strategy="FULL_SHARD") if stage == 3 else None
        accelerator = face.Accelerator(fsdp_plugin=plugin)
        torch.manual_seed(seed)
        net: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
        accelerator.backward(net(torch.ones(2, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        return accelerator, net

    def keep(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            torch.save(weights[0], Path(output_dir) / "own.bin")
        weights.clear()

    def bring(models: list[Any], input_dir: str) -> None:
        state = torch.load(Path(input_dir) / "own.bin")
        accelerator.engine.load_state_dict(models.pop(), state)

    accelerator, net = prepared(1)
    accelerator.register_save_state_pre_hook(keep)
    accelerator.save_state(folder)
    kept = accelerator.get_state_dict(net)
    face = _accelerate(False)
    accelerator, net = prepared(2)
    with pytest.raises(Exception, match="it has nothing for 4 of 4 tensors"):
        accelerator.load_state(folder)
    accelerator.register_load_state_pre_hook(bring)
    accelerator.load_state(folder)
    found = accelerator.get_state_dict(net)
    return [torch.equal(kept[name], found[name]) for name in kept], sorted(p.name for p in Path(folder).iterdir())


@pytest.mark.parametrize("stage", [0, 3])
def test_hooks_that_keep_the_weights_on_ranks(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    for same, names in run_ranks(_hooks_on_ranks, 2, str(tmp_path / "ckpt"), stage):
        assert all(same) and names[1:] == ["manifest.json", "own.bin"]


def _save_models(own: bool, folder: str) -> list[dict[str, Any]]:
    accelerator = _accelerate(own).Accelerator(cpu=True)
    found = []
    torch.manual_seed(0)
    for name, model in (("plain", Tied()), ("prepared", accelerator.prepare(Tied()))):
        accelerator.save_model(model, f"{folder}/{name}", max_shard_size=200)
        accelerator.save_model(model, f"{folder}/{name}")  # in fewer files than before
        found.append({key: value.tolist() for key, value in load_file(f"{folder}/{name}/model.safetensors").items()})
        assert own or len(list(Path(f"{folder}/{name}").iterdir())) == 1, "an index would lead to the old shards"
    return found


@pytest.mark.filterwarnings("ignore")
def test_models_are_saved_as_accelerate_does_prepared_or_not(tmp_path: Path) -> None:
    ours, real = _save_models(False, str(tmp_path / "ours")), _save_models(True, str(tmp_path / "real"))
    for mine, theirs in zip(ours, real, strict=True):
        assert mine.keys() == theirs.keys() and mine == theirs


def _triggered(folder: str) -> tuple[list[float], list[float]]:
    """An Accelerator whose configuration saves every second step, with a loader that reads ahead and draws."""

    def job(every: int, seed: int) -> tuple[Any, ...]:
        face = _accelerate(False)
        accelerator = face.Accelerator(
            gradient_accumulation_steps=2,
            dataloader_config=face.DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True),
        )
        accelerator.engine.config.checkpoint.every_steps = every
        accelerator.engine.config.checkpoint.dir = folder
        torch.manual_seed(seed)
        model: Any = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        data = TensorDataset(torch.randn(40, 3, generator=torch.Generator().manual_seed(4)))
        loader = DataLoader(data, batch_size=2, shuffle=True, collate_fn=_noisy)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler, loader)

    def train(job: tuple[Any, ...], until: int) -> list[float]:
        accelerator, model, optimizer, scheduler, loader = job
        losses: list[float] = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item() + scheduler.get_last_lr()[0])
            if len(losses) == until:
                break
        return losses

    whole = train(job(0, 0), 10)
    broken = job(2, 0)
    train(broken, 7)
    broken[0].engine.saver.join()
    resumed = job(0, 9)
    resumed[0].load_state(f"{folder}/step_00000002")
    return train(resumed, 6), whole[4:]


def _noisy(samples: list[tuple[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([sample + torch.rand(3) for (sample,) in samples])


@pytest.mark.parametrize("world", [1, 2])
def test_a_triggered_save_under_accelerate_is_exact(run_ranks: RunRanks, tmp_path: Path, world: int) -> None:
    for resumed, expected in run_ranks(_triggered, world, str(tmp_path)):
        assert resumed == expected and len(resumed) == 6


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------


def _deepspeed(tag_validation: str = "Warn", stage: int = 1) -> Any:
    from distui.compat import deepspeed

    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"tag_validation": tag_validation},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    }
    return deepspeed.initialize(model=Tied(), config=config)[0]


def _tags(folder: str, mode: str) -> tuple[str, list[str]]:
    engine = _deepspeed(mode)
    told = ""
    try:
        engine.save_checkpoint(folder, tag=f"rank{engine.engine.process_index}")
    except (AssertionError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
    engine.save_checkpoint(folder, tag="same") if mode == "FAIL" else None
    return told, sorted(path.name for path in Path(folder).glob("*"))


@pytest.mark.parametrize("mode", ["FAIL", "Warn", "ignore", "often"])
def test_tags_that_differ_are_told_as_the_json_says(run_ranks: RunRanks, tmp_path: Path, mode: str) -> None:
    for told, names in run_ranks(_tags, 2, str(tmp_path), mode):
        if mode == "FAIL":
            assert told.startswith("AssertionError") and "not consistent across all ranks" in told
            assert names == ["latest", "same"]
        elif mode == "often":
            assert told.startswith("ValueError") and "invalid tag_validation value of OFTEN" in told
        else:
            assert not told and names == ["latest", "rank0"], "rank 0's tag is everybody's"


def _weights_of(folder: str, stage: int) -> tuple[dict[str, Any], dict[str, Any]]:
    engine = _deepspeed(stage=stage)
    engine.save_checkpoint(folder)
    return engine.module_state_dict(), dict(engine.module_state_dict())


@pytest.mark.parametrize("stage", [0, 3])
def test_weights_come_under_all_their_names(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    from distui.compat.deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    expected, _ = run_ranks(_weights_of, 2, str(tmp_path), stage)[0]
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert set(found) == set(expected) == {"embedding.weight", "head.weight", "scale"}
    assert found["head.weight"] is found["embedding.weight"]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    Tied().load_state_dict(found)


# ---- scripts that end ------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, distui
engine = distui.Engine(strategy={{"zero_stage": 1}}, checkpoint={{"dir": {folder!r}, "every_steps": 4, "async_save": True}})
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
for step in range(4):
    engine.backward(model(torch.ones(2, 3)).sum())
    optimizer.step()
    optimizer.zero_grad()
if {fails}:
    raise RuntimeError("the script's own")
"""


@pytest.mark.parametrize(("world", "way", "fails"), [
    (1, "python", False), pytest.param(2, "torchrun", False, marks=pytest.mark.matrix), (2, "distui", True)
])  # fmt: skip
def test_what_the_last_step_asked_for_is_written_when_the_script_ends_well(
    tmp_path: Path, world: int, way: str, fails: bool
) -> None:
    import os
    import subprocess

    from distui.core.checkpoint import folder as folders

    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path / "ckpt"), fails=fails))
    starters: dict[str, list[str]] = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--no-python",
                     sys.executable],
        "distui": [sys.executable, "-m", "distui", "launch", "--no-tui", "--nproc", str(world)],
    }  # fmt: skip
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "DISTUI_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*starters[way], str(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert bool(ended.returncode) == fails, ended.stderr
    path = tmp_path / "ckpt" / "step_00000004"
    if fails:
        assert not (path / folders.MANIFEST).exists(), "a rank that failed waits for nobody"
    else:
        assert folders.verify(path)["world_size"] == world, ended.stderr
