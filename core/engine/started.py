"""What a rank tells of itself once its model is prepared."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import torch

from distui.core.axes.sizes import AXES, AxisSizes
from distui.core.config.schema import StrategySection
from distui.core.engine.job import say_own_choice
from distui.core.model.flops import device_peak_flops

if TYPE_CHECKING:
    from distui.core.engine.states import States


def say_started(engine: States, dtype: str) -> None:
    """Tell telemetry the device, its peak in `dtype`, the model's size and the strategy; its change, the terminal."""
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    num_parameters = 0
    for model in engine._models:
        cuts = engine.backend.cuts
        num_parameters += sum(cuts[id(p)].numel if id(p) in cuts else p.numel() for p in model.parameters())
    peak, strategy = device_peak_flops(device, dtype), engine.config.summary()
    told = layout_of(engine.config.strategy, engine.num_processes, engine.num_micro)
    engine.telemetry.rank_started(str(device), name, num_parameters, peak, strategy=strategy, layout=told)
    if engine.process_index == 0 and len(engine._models) == 1:
        say_own_choice(strategy)


def layout_of(strategy: StrategySection, world_size: int, num_micro: int) -> dict[str, int | str]:
    """Return the layout of the ranks as telemetry tells it."""
    sizes = AxisSizes.of(strategy, world_size)
    told: dict[str, int | str] = {axis: getattr(sizes, axis) for axis in AXES}
    if sizes.pp > 1:
        told |= {"pipeline_schedule": strategy.pipeline_schedule, "pipeline_micro_batches": num_micro}
    return told
