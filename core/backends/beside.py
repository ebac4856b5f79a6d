"""What a backend does for a script that trains beside it: by backward passes and optimizers of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from distui.core.config.schema import Config
from distui.core.errors import UserError


class Beside:
    """The part of `Backend` that a script's own `loss.backward()` and `torch.optim` step need."""

    name: str
    config: Config
    replaced: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = MappingProxyType({})
    """By the identity of a parameter that a model had: it, and what stands in its place."""

    weighs = False
    """Whether gradients can be weighed as they arrive, and kept local until `reduce_kept`."""

    def why_not_left_out(self, param: torch.Tensor) -> str:
        """Return why an optimizer that was not prepared may not step `param`; empty where plain torch's step is right.

        `param` is a model's, or one that another tensor stands in the place of.
        """
        if id(param) in self.replaced and self.replaced[id(param)][1] is not param:
            return "other tensors stand in the place of the parameters that it was built with"
        if self.config.precision.dtype == "fp16":
            return "gradients hold the loss scale"
        if norm := self.config.optimizer.max_grad_norm:
            return f"gradients would not be clipped at optimizer.max_grad_norm = {norm:g}"
        return ""

    def weigh(self, factor: float) -> None:
        """Multiply by `factor` what the backward passes from now on bring, whoever runs them, but not what came before.

        Raises: UserError where `weighs` is False and it is not 1.
        """
        if factor != 1.0:
            raise UserError(
                f"strategy.backend={self.name} cannot weigh gradients as they arrive",
                f"they would have to be multiplied by {factor:g}, and its own code adds them up",
                "set strategy.backend to native",
            )

    def reduce_kept(self) -> None:
        """Reduce now what backward passes with `set_sync(False)` have kept. Collective. Raises: as `weigh`."""
        raise UserError(
            f"strategy.backend={self.name} reduces gradients in a backward only",
            "the script keeps them until the step",
            "set strategy.backend to native",
        )
