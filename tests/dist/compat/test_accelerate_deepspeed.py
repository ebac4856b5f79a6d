"""What scripts use of Accelerate's DeepSpeed and FSDP helpers, against plain torch on the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from distui.compat.deepspeed.lr_schedules import WarmupDecayLR

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

JSON = {
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
    "gradient_clipping": 0.1,
    "train_micro_batch_size_per_gpu": "auto",
}
STEPS = 5


def _model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def _data() -> Any:
    return torch.randn(8 * STEPS, 6, generator=torch.Generator().manual_seed(1))


def _accelerator(**options: Any) -> Any:
    from distui.compat.accelerate import Accelerator, state

    state.GradientState._reset_state()
    state.AcceleratorState._reset_state(True)
    return Accelerator(**options)


def _dummies() -> dict[str, Any]:
    from distui.compat.accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, GatheredParameters

    accelerator = _accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=JSON))
    model = _model()
    optimizer = DummyOptim(model.parameters(), lr=0.05, weight_decay=0.01)
    schedule = DummyScheduler(optimizer, total_num_steps=STEPS * accelerator.num_processes, warmup_num_steps=2)
    loader = torch.utils.data.DataLoader(_data(), batch_size=4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    assert accelerator.engine.config.strategy.zero_stage == 3
    rates = []
    for batch in loader:
        accelerator.backward(model(batch).pow(2).mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        rates.append(schedule.get_last_lr()[0])
    params = list(model.parameters())
    with GatheredParameters(params, modifier_rank=0):
        if accelerator.is_main_process:
            params[-1].data.fill_(7.0)
    return {"rates": rates, "weights": accelerator.get_state_dict(model)}


def test_dummies_are_the_jsons_optimizer_and_schedule(run_ranks: RunRanks) -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.01)
    schedule = WarmupDecayLR(optimizer, STEPS, 0.0, 0.05, 2, warmup_type="linear")
    rates = []
    for batch in _data().split(8):
        model(batch).pow(2).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        rates.append(schedule.get_last_lr()[0])
    for found in run_ranks(_dummies, 2):
        assert found["rates"] == pytest.approx(rates)
        for name, value in model.state_dict().items():
            right = torch.full_like(value, 7.0) if name == "2.bias" else value
            torch.testing.assert_close(found["weights"][name], right)


def test_what_accelerate_refuses_of_dummies_is_refused() -> None:
    from distui.compat.accelerate.utils import DeepSpeedPlugin, DummyOptim

    model = _model()
    accelerator = _accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=0))
    with pytest.raises(ValueError, match="without specifying an optimizer in the config"):
        accelerator.prepare(model, DummyOptim(model.parameters()))
    accelerator = _accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={**JSON, "zero_optimization": {}}))
    with pytest.raises(ValueError, match="names a scheduler"):
        accelerator.prepare(model, DummyOptim(model.parameters()))
    accelerator = _accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={"optimizer": JSON["optimizer"], "zero_optimization": {}})
    )
    with pytest.raises(ValueError, match="in the config file and in the code"):
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def _saved(folder: str, kind: str) -> None:
    from distui.compat.accelerate.utils import (
        FullyShardedDataParallelPlugin,
        load_fsdp_model,
        load_fsdp_optimizer,
        merge_fsdp_weights,
        save_fsdp_model,
        save_fsdp_optimizer,
    )

    plugin = FullyShardedDataParallelPlugin(state_dict_type=kind)
    accelerator = _accelerator(fsdp_plugin=plugin)
    model = _model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))

    def step() -> None:
        accelerator.backward(model(_data()[:4]).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    save_fsdp_model(plugin, accelerator, model, folder)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    step()
    after = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    load_fsdp_model(plugin, accelerator, model, folder)
    for name, value in accelerator.get_state_dict(model).items():
        assert torch.equal(value, before[name])
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    step()
    for name, value in accelerator.get_state_dict(model).items():
        torch.testing.assert_close(value, after[name])
    accelerator.save_state(f"{folder}/state")
    for source in [f"{folder}/state"] + ([] if kind.startswith("FULL") else [f"{folder}/pytorch_model_fsdp_0"]):
        merge_fsdp_weights(source, f"{folder}/merged")
        if accelerator.is_main_process:
            from safetensors.torch import load_file

            merged = load_file(f"{folder}/merged/model.safetensors")
            for name, value in (after if source.endswith("state") else before).items():
                torch.testing.assert_close(merged[name], value)


def test_fsdps_saving_functions(run_ranks: RunRanks, tmp_path: Path) -> None:
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        run_ranks(_saved, 2, str(tmp_path / kind), kind)


def test_a_json_that_is_asked_and_a_config_that_is_written(tmp_path: Path) -> None:
    from distui.compat.accelerate.utils import HfDeepSpeedConfig, write_basic_config
    from distui.core.config.imports.files import import_file

    (tmp_path / "ds.json").write_text(json.dumps(JSON))
    for given in (JSON, str(tmp_path / "ds.json"), json.dumps(JSON)):
        config = HfDeepSpeedConfig(given)
        assert config.is_zero3()
        assert not config.is_offload()
        assert config.get_value("optimizer.params.lr") == "auto"
        assert config.get_value("fp16.enabled") is None
        config.del_config_sub_tree("optimizer.params")
        assert config.config["optimizer"] == {"type": "AdamW"}
    with pytest.raises(ValueError, match="Expected a string path"):
        HfDeepSpeedConfig("nowhere.json")
    path = write_basic_config("bf16", tmp_path / "sub" / "config.json")
    assert write_basic_config("bf16", path) is False
    assert import_file(path).values["precision.dtype"] == "bf16"
