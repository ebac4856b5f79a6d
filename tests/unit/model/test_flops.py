"""Counting FLOPs on one process: formulas, what cannot be counted, the table, and the peak of a device."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distui.core.hardware.host import read_cpu
from distui.core.hardware.measure import identity, save_calibration
from distui.core.model.flops import FlopMeter, device_peak_flops
from distui.core.telemetry.source import NullSource

DTYPES: list[str] = []


def _meter() -> FlopMeter:
    DTYPES.clear()
    return FlopMeter(NullSource(), dtype="fp32", on_dtype=DTYPES.append, profile=True, writes=False)


def _measure(meter: FlopMeter, model: nn.Module, *inputs: torch.Tensor, samples: int = 0) -> None:
    output = model(*inputs)
    with meter.backward():
        (output[0] if isinstance(output, tuple) else output).float().sum().backward()
    meter.end_backward(0, samples)


def test_an_mlp_is_six_times_its_weights_without_the_first_input_gradient() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    meter = _meter()
    meter.watch(model)
    _measure(meter, model, torch.randn(7, 10), samples=7)
    assert meter.tally.forward == 2 * 7 * (10 * 20 + 20 * 5)
    assert meter.tally.backward == 2 * 2 * 7 * (10 * 20 + 20 * 5) - 2 * 7 * 10 * 20
    assert meter.tally.recomputed == 0
    assert meter.of(0, 14, 2) == 2 * meter.tally.model
    assert not DTYPES


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    model[0].requires_grad_(False)
    meter = _meter()
    meter.watch(model)
    _measure(meter, model, torch.randn(7, 10))
    assert meter.tally.backward == 2 * 7 * 20 * 5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_adds_to_hardware_flops_only(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    model, meter = Checkpointed(), _meter()
    meter.watch(model)
    _measure(meter, model, torch.randn(7, 10, requires_grad=True))
    forward = 2 * 7 * (10 * 20 + 20 * 10)
    assert (meter.tally.forward, meter.tally.backward, meter.tally.recomputed) == (forward, 2 * forward, forward)
    assert meter.tally.hardware == 4 * forward


def test_evaluation_is_not_counted() -> None:
    model, meter = nn.Linear(10, 20), _meter()
    meter.watch(model)
    with torch.no_grad():
        model(torch.randn(3, 10))
    model.eval()(torch.randn(3, 10))
    model.train()
    _measure(meter, model, torch.randn(7, 10))
    assert meter.tally.forward == 2 * 7 * 10 * 20


def test_a_forward_that_raises_is_counted_when_it_is_tried_again() -> None:
    model, meter = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5)), _meter()
    meter.watch(model)
    handle = model[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(7, 10))
    handle.remove()
    _measure(meter, model, torch.randn(7, 10))
    assert meter.tally.forward == 2 * 7 * (10 * 20 + 20 * 5)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("model", "input_", "word"),
    [
        (nn.LayerNorm(4), torch.randn(3, 4), "no operation"),
        (nn.LSTM(3, 4), torch.randn(5, 2, 3), "mkldnn_rnn_layer"),
    ],
)
def test_what_has_no_formula_is_not_available(model: nn.Module, input_: torch.Tensor, word: str) -> None:
    meter = _meter()
    meter.watch(model)
    _measure(meter, model, input_)
    assert word in meter.problem
    assert meter.of(0, 3, 1) is None
    assert meter.profile is not None
    assert "FLOPs           n/a: " in meter.profile.table(meter.tally, meter.problem)


def test_a_formula_that_fails_does_not_stop_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import flop_counter

    def broken(*args: Any, **kwargs: Any) -> int:
        raise ValueError("no such shape")

    monkeypatch.setitem(flop_counter.flop_registry, torch.ops.aten.addmm, broken)
    model, meter = nn.Linear(10, 20), _meter()
    meter.watch(model)
    _measure(meter, model, torch.randn(7, 10))
    assert "no such shape" in meter.problem
    assert model.weight.grad is not None


def test_flops_in_another_format_than_configured_are_told() -> None:
    model, meter = nn.Linear(10, 20), _meter()
    meter.watch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _measure(meter, model, torch.randn(7, 10))
    assert DTYPES == ["bf16"]


def test_the_table_sums_to_the_whole_and_times_every_module() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(4, 8), nn.ModuleList([shared])[0], nn.Sequential(shared, nn.Linear(8, 2)))
    meter = _meter()
    meter.watch(model)
    _measure(meter, model, torch.randn(5, 4))
    profile = meter.profile
    assert profile is not None
    profile.begin()
    for _ in range(2):
        model(torch.randn(5, 4)).sum().backward()
    profile.end(2)
    rows = profile.rows()
    assert sum(row.own_flops for row in rows) == meter.tally.forward == 2 * 5 * (32 + 64 + 64 + 16)
    whole = rows[0]
    assert (whole.name, whole.flops, whole.num_parameters) == ("Sequential", meter.tally.forward, 40 + 72 + 18)
    assert sum(row.flops for row in rows if row.depth == 1) == whole.flops
    assert whole.forward_s is not None
    assert 0 < sum(row.forward_s or 0 for row in rows if row.depth == 1) <= whole.forward_s
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    table = profile.table(meter.tally, "")
    assert "100.0%" in table and "n/a" not in table


def test_the_peak_of_a_cpu_is_what_was_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("DISTUI_STATE_DIR", str(Path(folder)))
        monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "4")
        device = torch.device("cpu")
        assert device_peak_flops(device, "fp32") is None
        save_calibration(cpu=identity(read_cpu()), peak_flops={"fp32": 8e10})
        assert device_peak_flops(device, "fp32") == 2e10
        assert device_peak_flops(device, "bf16") is None


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", False, 19.5e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", False, None),
        ("Tesla T4", "bf16", False, None),
        ("A card of tomorrow", "bf16", False, None),
    ],
)
def test_the_peak_of_a_gpu_is_the_datasheets(
    name: str, dtype: str, tf32: bool, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr("distui.core.model.flops._tf32", lambda: tf32)
    assert device_peak_flops(torch.device("cuda", 0), dtype) == peak
