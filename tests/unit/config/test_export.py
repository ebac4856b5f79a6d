"""What is exported comes back, and what has no place is said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distui.core.config.export import export, to_text
from distui.core.config.imports.files import import_file
from distui.core.config.schema import Config, keys


def _config(values: dict[str, Any]) -> Config:
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return Config.model_validate(tables)


HOMES = st.sampled_from(["none", "cpu", "nvme"])


@settings(max_examples=60)
@given(
    stage=st.integers(1, 3),
    dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
    optimizer=HOMES,
    params=HOMES,
    accumulation=st.integers(1, 64),
    norm=st.sampled_from([0.5, 1.0, 2.0]),
    nproc=st.integers(1, 8),
    tool=st.sampled_from(["deepspeed", "accelerate"]),
)
def test_what_is_exported_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    stage: int,
    dtype: str,
    optimizer: str,
    params: str,
    accumulation: int,
    norm: float,
    nproc: int,
    tool: str,
) -> None:
    values = {
        "strategy.zero_stage": stage,
        "precision.dtype": dtype,
        "offload.optimizer": optimizer,
        "offload.params": params if stage == 3 else "none",
        "batch.accumulation": accumulation,
        "optimizer.max_grad_norm": norm,
        "cluster.nproc": nproc,
    }
    if "nvme" in (values["offload.optimizer"], values["offload.params"]):
        values["offload.nvme_path"] = "/nvme"
    config = _config(values)
    table, notes = export(config, tool)
    path = tmp_path_factory.mktemp("out") / ("out.json" if tool == "deepspeed" else "out.yaml")
    path.write_text(to_text(table, tool))
    back = _config(import_file(path).values)
    lost = {note.key for note in notes}
    assert lost <= {"cluster.nproc"}
    for key in keys():
        section, _, name = key.partition(".")
        if key not in lost:
            assert getattr(getattr(back, section), name) == getattr(getattr(config, section), name), key


def test_export_says_what_has_no_place() -> None:
    config = _config({"checkpoint.every_steps": 100, "compression.gradients": "onebit", "strategy.backend": "fsdp2"})
    _, notes = export(config, "accelerate")
    assert {note.key for note in notes} == {"checkpoint.every_steps", "compression.gradients", "strategy.backend"}
