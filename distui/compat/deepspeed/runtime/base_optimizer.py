"""`deepspeed.runtime.base_optimizer`: the classes of the optimizers that `initialize` returns."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from distui.compat.deepspeed.utils.z3_leaf_module import get_z3_leaf_modules
from distui.core.engine.engine import Engine
from distui.core.sharding.optim.prepared import PreparedOptimizer as DeepSpeedOptimizer


class ZeROOptimizer(DeepSpeedOptimizer):
    """What scripts ask the optimizer of a `DeepSpeedEngine` at stages 1 to 3; it steps as its backend's does."""

    _of_engine: Engine
    leaf_parameters: dict[nn.Module, list[nn.Parameter]]
    """Marked module -> its parameters; marks change nothing."""

    def needs_scaler(self) -> bool:
        """Return whether a loss must be scaled before its backward: under fp16."""
        return self._of_engine.scaler is not None

    @property
    def cur_scale(self) -> float:
        """The loss scale, 1 without one."""
        scaler = self._of_engine.scaler
        return float(scaler.scale) if scaler is not None else 1.0

    @property
    def overflow(self) -> bool:
        """Whether the last step was left out, for gradients that were not finite."""
        return self.step_was_skipped


DeepSpeedZeroOptimizer = DeepSpeedZeroOptimizer_Stage3 = ZeROOptimizer
BF16_Optimizer = FP16_Optimizer = FP16_UnfusedOptimizer = DeepSpeedOptimizer


def answers_as_zero(optimizer: Any, engine: Engine, model: nn.Module) -> None:
    """Make what `engine` prepared one that answers DeepSpeed's questions too."""
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (ZeROOptimizer, kind), {"__module__": kind.__module__})
    optimizer._of_engine = engine
    optimizer.leaf_parameters = defaultdict(list)
    for module in get_z3_leaf_modules(model):
        optimizer.leaf_parameters[module] = list(nn.Module.parameters(module))


__all__ = ["DeepSpeedOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "ZeROOptimizer"]
