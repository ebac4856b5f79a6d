"""The native backend under backward passes and optimizers of the script's own."""

from __future__ import annotations

import torch

from distui.core.backends.beside import Beside
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.units.guarded import place_of
from distui.core.sharding.units.unit import Unit


class NativeBeside(Beside):
    """Weighs what arrives in the units, which keep it until it is reduced."""

    weighs = True
    _weight = 1.0
    _models: dict[int, ShardedModel]

    def why_not_left_out(self, param: torch.Tensor) -> str:
        """Return why only a prepared optimizer may step `param`."""
        place = place_of(param)
        unit = place[0] if place is not None else None
        if isinstance(unit, Unit):
            if unit.placement.effective_stage:
                return f"at zero_stage={unit.placement.stage} its gradients and states are cut among the ranks"
            if unit.has_master:
                return f"it would step weights in {unit.dtype}, and their fp32 copies are what is trained"
        if unit is None and self._is_added(param):
            return "it was added to the model after engine.prepare, and its gradient is of this rank's batch alone"
        return super().why_not_left_out(param)

    def _is_added(self, param: torch.Tensor) -> bool:
        """Tell whether other ranks train `param` too, and nobody sums its gradients."""
        frozen = {id(known) for sharded in self._models.values() for _, known in sharded.frozen}
        shared = any(sharded.placement.num_averaged > 1 for sharded in self._models.values())
        return shared and param.requires_grad and id(param) not in frozen

    def weigh(self, factor: float) -> None:
        """Multiply by `factor` what the backward passes from now on bring."""
        self._weight = factor
        for sharded in self._models.values():
            sharded.schedule.weigh(factor)

    def reduce_kept(self) -> None:
        """Reduce what was kept; stages 2 and 3 have done so. Collective."""
        for sharded in self._models.values():
            sharded.schedule.reduce_kept()
