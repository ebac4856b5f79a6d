"""Transformers' Trainer on ranks that share a batch: what plain Trainer computes in one process."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.dist.compat.test_trainer import _install, _outcome, _plain, _same, _trainer

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="Trainer needs Accelerate installed"
)


def _shared(folder: str, rows: int, config: str, sizes: dict[str, int] | None) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    _install(folder, config)
    options: dict[str, Any] = {}
    if sizes is not None:
        options["parallelism_config"] = importlib.import_module("accelerate").ParallelismConfig(**sizes)
    trainer = _trainer(
        folder,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=2,
        **options,
    )
    shared = trainer.accelerator.parallelism_config.tp_size
    assert trainer.get_total_train_batch_size(trainer.args) == 4 * 2
    trainer.train()
    return {**_outcome(trainer, folder), "shared": shared}


SHARED: list[tuple[int, int, str, dict[str, int] | None]] = [
    (2, 4, "", {"tp_size": 2}),
    (2, 4, "", {"cp_size": 2}),
    (2, 4, "[strategy]\ntensor_parallel = 2\nzero_stage = 1", None),
    (4, 2, "", {"tp_size": 2, "dp_shard_size": 2}),
    (4, 2, "", {"sp_size": 2}),
]


def test_ranks_that_share_a_batch_train_as_one(run_ranks: RunRanks, tmp_path: Path) -> None:
    plain = _plain(str(tmp_path / "plain"))
    for number, (ranks, rows, config, sizes) in enumerate(SHARED):
        found, *_ = run_ranks(_shared, ranks, str(tmp_path / str(number)), rows, config, sizes)
        assert found.pop("shared") == 2
        _same(found, plain)


def _pipelined(folder: str) -> str:
    warnings.simplefilter("ignore")
    _install(folder, "[strategy]\npipeline_parallel = 2")
    from distui.core.errors import UserError

    with pytest.raises(UserError) as caught:
        _trainer(folder)
    return str(caught.value)


def test_a_pipeline_under_trainer_is_refused(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert "pipeline_parallel=2 under transformers' Trainer" in run_ranks(_pipelined, 2, str(tmp_path))[0]
