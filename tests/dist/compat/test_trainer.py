"""Transformers' Trainer on distui's engine: what plain Trainer computes in one process, at every stage."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distui.compat.deepspeed.lr_schedules import WarmupDecayLR
from distui.core.paths import JOB_ENV

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="Trainer needs Accelerate installed"
)
STEPS = 4


class Texts(torch.utils.data.Dataset[Any]):
    """Token ids whose number of labels differs between samples."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 5] = -100
        return {"input_ids": ids, "labels": labels}


def _trainer(folder: str, model: Any = None, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(3)
    model = model or LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    arguments = TrainingArguments(
        output_dir=folder,
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        warmup_steps=2,
        max_grad_norm=0.5,
        max_steps=STEPS,
        save_steps=2,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts())


def _outcome(trainer: Any, folder: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(folder)
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "log": [[row["loss"], float(row["grad_norm"]), row["learning_rate"]] for row in log],
        "evaluated": evaluated,
        "weights": load_file(Path(folder) / "model.safetensors") if trainer.args.should_save else {},
    }


def _plain(folder: str, deepspeeds: bool = False) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        trainer = _trainer(
            folder, per_device_train_batch_size=4, per_device_eval_batch_size=4, gradient_accumulation_steps=2
        )
        if deepspeeds:  # the optimizer and the schedule that DeepSpeed would make of DEEPSPEED
            trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2, weight_decay=0.0)
            trainer.lr_scheduler = WarmupDecayLR(trainer.optimizer, STEPS, 0.0, 1e-2, 2, warmup_type="linear")
        trainer.train()
        return _outcome(trainer, folder)


def _install(folder: str, config: str) -> None:
    """Do what a launched rank does: find the configuration in the run's folder, and drive Trainer."""
    run = Path(folder) / f"run{os.environ['RANK']}"
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(f"{config}\n[telemetry]\nenabled = false\n")
    os.environ[JOB_ENV] = str(run)

    from distui.compat.accelerate import beside, state
    from distui.compat.transformers import install

    for kind in (importlib.import_module("accelerate.state"), state):
        kind.GradientState._reset_state()
        kind.AcceleratorState._reset_state(True)
    trainer = importlib.import_module("transformers.trainer")
    if not trainer.Accelerator.__module__.startswith("distui"):
        beside.install(importlib.import_module("accelerate.state"))
        install.install_arguments(importlib.import_module("transformers.training_args"))
        install.install_trainer(trainer)


def _rank(folder: str, stage: int, resume: str | None, backend: str = "native") -> dict[str, Any]:
    warnings.simplefilter("ignore")  # transformers' own
    # The script's own accumulation is 1.
    _install(folder, f"strategy.zero_stage = {stage}\nstrategy.backend = '{backend}'\nbatch.accumulation = 2")
    trainer = _trainer(
        folder, per_device_train_batch_size=2, per_device_eval_batch_size=2, load_best_model_at_end=False
    )
    assert trainer.accelerator.engine.config.strategy.zero_stage == stage
    if stage == 1:
        trainer.evaluate()  # before the training: on whole weights
    trainer.train(resume_from_checkpoint=resume)
    return _outcome(trainer, folder)


def _same(found: dict[str, Any], plain: dict[str, Any]) -> None:
    torch.testing.assert_close(torch.tensor(found["log"]), torch.tensor(plain["log"]), rtol=1e-4, atol=1e-5)
    assert found["evaluated"] == pytest.approx(plain["evaluated"], rel=1e-4)
    assert found["weights"].keys() == plain["weights"].keys()
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, plain["weights"][name], rtol=1e-3, atol=2e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Trainer with its own Accelerate does with the same global batches."""
    return _plain(str(tmp_path_factory.mktemp("plain")))


def test_every_stage_trains_and_resumes_at_another_or_on_another_backend_as_one_process_does(
    run_ranks: RunRanks, plain: dict[str, Any], tmp_path: Path
) -> None:
    for stage in (1, 3):
        found, _ = run_ranks(_rank, 2, str(tmp_path / str(stage)), stage, None)
        _same(found, plain)
    for stage, saved_at, backend in ((0, 3, "native"), (2, 1, "native"), (0, 3, "ddp"), (3, 1, "fsdp2")):
        checkpoint = str(tmp_path / str(saved_at) / "checkpoint-2")
        found, _ = run_ranks(_rank, 2, str(tmp_path / f"{backend}{stage}"), stage, checkpoint, backend)
        _same(found, plain)


def _twice(folder: str, stage: int) -> list[float]:
    warnings.simplefilter("ignore")  # transformers' own
    _install(
        folder,
        f"strategy.zero_stage = {stage}\nbatch.global_size = 8\nprecision.dtype = 'bf16'\n"
        "optimizer.max_grad_norm = 0.25\ncheckpoint.every_steps = 1\ncheckpoint.keep = 2",
    )
    trainer = _trainer(
        folder,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
    )
    assert trainer.args.gradient_accumulation_steps == 2  # 8 = 2 x 2 ranks x 2
    assert trainer.args.max_grad_norm == 0.25
    losses = []
    for _ in range(2):
        trainer.train()
        losses += [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = trainer.evaluate()["eval_loss"]
    assert best == pytest.approx(trainer.state.best_metric, rel=5e-3)
    assert trainer.model.lm_head.weight.dtype == torch.bfloat16
    return losses


def test_training_goes_on_in_a_second_call_with_what_the_configuration_sets(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    for stage in (0, 3):
        losses, others = run_ranks(_twice, 2, str(tmp_path / str(stage)), stage)
        assert losses == others
        assert losses[-1] < losses[STEPS - 1] < losses[0]
        saved = [path.name for path in (tmp_path / str(stage)).glob("checkpoint-*")]
        assert 2 <= len(saved) <= 3, saved  # the newest two, and the best


def _refused(folder: str) -> str:
    warnings.simplefilter("ignore")
    _install(folder, "")
    (Path(folder) / "checkpoint-2").mkdir(parents=True, exist_ok=True)
    trainer = _trainer(folder)
    from distui.compat.transformers import install
    from distui.core.errors import UserError

    (Path(folder) / "checkpoint-2" / "optimizer.pt").touch()
    with pytest.raises(UserError) as caught:
        install._load_states(None, trainer, str(Path(folder) / "checkpoint-2"))
    axes: Any = importlib.import_module("accelerate").ParallelismConfig
    told = [caught.value.what]
    with pytest.raises(UserError) as caught:
        importlib.import_module("transformers").TrainingArguments(folder, parallelism_config=axes(dp_shard_size=3))
    told.append(str(caught.value))
    return " ".join(told)


def test_what_another_engine_saved_or_chose_is_refused(run_ranks: RunRanks, tmp_path: Path) -> None:
    text, _ = run_ranks(_refused, 2, str(tmp_path))
    assert "saved by Trainer without distui" in text
    assert "total_size (3) does not match num_processes (2)" in text


DEEPSPEED = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
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
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def _given(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    _install(folder, "")
    if axes := options.get("parallelism_config"):
        options["parallelism_config"] = importlib.import_module("accelerate").ParallelismConfig(**axes)
    trainer = _trainer(
        folder,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        **options,
    )
    config = trainer.accelerator.engine.config
    chosen = (config.strategy.backend, config.strategy.zero_stage, config.offload.optimizer)
    assert chosen == ("native", 3, "none" if axes else "cpu"), chosen
    trainer.train()
    return {**_outcome(trainer, folder), "scheduler": type(trainer.lr_scheduler).__name__}


def test_what_arguments_ask_of_another_engine_is_obeyed_by_this_one(
    run_ranks: RunRanks, plain: dict[str, Any], tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = [
        {"deepspeed": DEEPSPEED},
        {"fsdp": True, "fsdp_config": {"reshard_after_forward": True, "cpu_offload": True}},
        {"parallelism_config": {"dp_shard_size": 2}},
    ]
    for number, options in enumerate(asked):
        found, _ = run_ranks(_given, 2, str(tmp_path / str(number)), options)
        assert found.pop("scheduler") == ("LambdaLR", "WarmupDecayLR")[number == 0]
        _same(found, _plain(str(tmp_path / "json"), deepspeeds=True) if number == 0 else plain)


def _contradicts(folder: str) -> str:
    from distui.compat.transformers.arguments import plugin_of
    from distui.core.errors import UserError

    warnings.simplefilter("ignore")
    _install(folder, "")
    arguments = importlib.import_module("transformers").TrainingArguments(
        folder, deepspeed={"gradient_clipping": 2.0, "zero_optimization": {"stage": 2}}, use_cpu=True
    )
    assert arguments.deepspeed is None
    with pytest.raises(UserError) as caught:
        plugin_of(arguments)
    return caught.value.why


def test_a_json_that_contradicts_the_arguments_is_refused(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(_contradicts, 2, str(tmp_path))[0] == "gradient_clipping=2.0 here, 1.0 in TrainingArguments"


def _from_files(folder: str, saved: str, stage: int | None) -> dict[str, Any]:
    from distui.compat.transformers import pretrained
    from distui.core.sharding.start.unread import _Unread
    from distui.core.sharding.start.weight_files import WeightFiles

    warnings.simplefilter("ignore")
    if stage is not None:
        _install(folder, f"strategy.zero_stage = {stage}\nbatch.accumulation = 2")
        pretrained.install(importlib.import_module("transformers.modeling_utils"))
    transformers: Any = importlib.import_module("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    unread = [name for name, param in model.named_parameters() if isinstance(param, _Unread)]
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)  # an edit before anything is prepared
    if os.environ.get("RANK") == "1":
        float(model.model.layers[0].mlp.up_proj.weight.sum())  # read on one rank only
    assert model.device.type == "cpu"
    num_read: list[int] = []
    read = WeightFiles.read

    def counted(files: Any, tensor: Any, low: int = 0, high: int | None = None) -> torch.Tensor:
        part = read(files, tensor, low, high)
        num_read.append(part.numel())
        return part

    WeightFiles.read = counted  # type: ignore[assignment,method-assign]
    try:
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} if stage is None else {}
        trainer = _trainer(
            folder, **(options or {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}), model=model
        )
        in_files = sum(isinstance(param, _Unread) for param in model.parameters())
        trainer.train()
    finally:
        WeightFiles.read = read  # type: ignore[method-assign]
    total = sum(math.prod(shape) for shape in _shapes(saved))
    return {**_outcome(trainer, folder), "unread": len(unread), "left": in_files, "part": sum(num_read) / total}


def _shapes(saved: str) -> list[tuple[int, ...]]:
    from safetensors.torch import load_file

    return [tuple(value.shape) for value in load_file(Path(saved) / "model.safetensors").values()]


def test_weights_come_from_their_files_a_part_to_each_rank(run_ranks: RunRanks, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    _trainer(str(tmp_path / "made")).model.save_pretrained(saved)
    plain = _from_files(str(tmp_path / "plain"), saved, None)
    assert plain.pop("unread") == 0
    for stage in (2, 3):
        found, second = run_ranks(_from_files, 2, str(tmp_path / str(stage)), saved, stage)
        unread, left = (found.pop(name) for name in ("unread", "left"))
        if stage == 3:
            assert unread == len(_shapes(saved))
            assert left == unread - 1  # what was edited is read; Trainer moved nothing
            # Rank 0 reads for all what a script has read a part of; the other its part of the rest.
            assert second["part"] < 0.5 < found.pop("part")
        else:
            assert unread == 0
        _same(found, plain)
