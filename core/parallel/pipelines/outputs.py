"""What a pipelined model returns on each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distui.core.errors import UserError
from distui.core.parallel.pipelines.placeholders import is_absent


class Output:
    """What a pipelined model returns: the loss; anything else is not on this rank, and says so where it is used."""

    def __init__(self, loss: torch.Tensor | None, why: str) -> None:
        self.loss, self._why = loss, why

    def __getitem__(self, key: Any) -> Any:
        if (key == "loss" or (key == 0 and type(key) is int)) and self.loss is not None:
            return self.loss
        raise self._elsewhere(f"output[{key!r}]")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the loss."""
        return self.loss if key == "loss" else self[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._elsewhere(f"output.{name}")

    def __iter__(self) -> Any:
        raise self._elsewhere("taking the output apart")

    def _elsewhere(self, what: str) -> UserError:
        return UserError(
            f"{what} of a pipelined model",
            f"all ranks have its loss; of other outputs, {self._why}",
            "compute what you need of them in engine.prepare(..., loss=fn), or set strategy.pipeline_parallel to 1",
        )


def loss_in(output: Any) -> Any:
    """Return the loss that a model's output holds, or is; None where there is none."""
    if isinstance(output, torch.Tensor):
        return output if output.numel() == 1 else None
    if isinstance(output, dict):
        return output.get("loss")
    if isinstance(output, tuple) and output and not hasattr(output, "loss"):
        return loss_in(output[0]) if isinstance(output[0], torch.Tensor) else None
    return getattr(output, "loss", None)


_OF_ALL = ("output_router_logits", "output_hidden_states", "output_attentions")
"""What transformers' models collect of every block."""


def refuse_outputs_of_all(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a model would collect of blocks that other stages have. Raises: UserError."""
    config = getattr(model, "config", None)
    for name in _OF_ALL:
        given = kwargs.get(name)
        if given or (given is None and getattr(config, name, False) is True):
            raise UserError(
                f"{name}=True in a pipeline",
                "it is collected of all blocks, of which a rank has its own alone: a loss of it would be another",
                f"leave {name} out, or set strategy.pipeline_parallel to 1",
            )


def refuse_nan(loss: torch.Tensor, model: torch.nn.Module) -> None:
    """Refuse a first loss that is NaN: what other stages have is NaN here, or empty. Raises: UserError."""
    if is_absent(loss.detach()):
        raise UserError(
            f"the first loss of {type(model).__name__} in a pipeline is NaN",
            "what lies outside of the last stage's blocks is NaN on its rank: an embedding, an earlier hidden state, a "
            "weight that the model reads beside its blocks; or the model, or a micro-batch without labels, gives it",
            "hand it on inside the blocks' outputs, or set strategy.pipeline_parallel to 1",
        )


class Told(torch.autograd.Function):
    """The loss of a pass whose backward has run: its own backward compares what it was to be multiplied by."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, loss: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        if abs(float(grad) - ctx.factor) > 1e-6 * abs(ctx.factor):
            raise UserError(
                f"the loss of a pipelined model was multiplied by {float(grad) / ctx.factor:g} before the backward",
                f"the pass of the schedule has run its backward already, with {ctx.factor:g}",
                "give engine.backward the loss as the model returned it; scale by loss=fn in engine.prepare, or the "
                "learning rate",
            )
        return None, None, None
