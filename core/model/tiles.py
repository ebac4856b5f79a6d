"""Has feed-forwards compute a part of the tokens at a time, and again in backward (ALST, arXiv 2506.13996, 3.1.2).

A feed-forward is wider than what goes into it, and treats each token alone. So of a long sequence it needs no more
memory inside than of one tile, whatever the length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distui.core.errors import UserError

RECOMPUTES = "_distui_recomputes"
"""What a forward has that stands for another one and computes it again in backward."""
_WORDS = ("mlp", "feedforward", "feed_forward", "ffn", "densereludense", "denseactdense", "densegatedactdense")
_DENSE = ("Linear", "Conv1D")


def feed_forwards(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the feed-forwards: called so, of two or three linear layers, and beside them nothing with parameters."""
    found = []
    for name, module in model.named_modules():
        words = name.rpartition(".")[2].lower(), type(module).__name__.lower()
        if any(known in word for known in _WORDS for word in words) and _is_of_linear_layers(module):
            found.append((name, module))
    return found


def _is_of_linear_layers(module: nn.Module) -> bool:
    dense = [inner for inner in module.modules() if type(inner).__name__ in _DENSE]
    own = {id(tensor) for layer in dense for tensor in layer.parameters(recurse=False)}
    held = [*module.parameters(), *module.buffers()]
    return len(dense) in (2, 3) and all(id(tensor) in own for tensor in held)


def apply_tiles(model: nn.Module, tile: int) -> list[str]:
    """Have every feed-forward of `model` compute `tile` tokens at a time (0: all); returns their names.

    Raises: UserError where there is none.
    """
    if not tile:
        return []
    found = feed_forwards(model)
    if not found:
        raise UserError(
            f"activation_checkpointing.mlp_tile={tile} found no feed-forward in {type(model).__name__}",
            "one is a module whose name or class says mlp, feed_forward or ffn, of two or three linear layers, "
            "activations and dropout",
            "set activation_checkpointing.mlp_tile to 0, or keep the feed-forward in such a module",
        )
    for name, module in found:
        module.forward = Tiled(name, module, tile)
    return [name for name, _ in found]


class Tiled:
    """Stands for the forward of one feed-forward; a copy of the module has one of its own."""

    def __init__(self, name: str, module: nn.Module, tile: int) -> None:
        functools.update_wrapper(self, module.forward)
        self.name, self.module, self.forward, self.tile = name, module, module.forward, tile
        self.is_known = False
        setattr(self, RECOMPUTES, True)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = [*args, *kwargs.values()]
        x = given[0] if given else None
        if len(given) != 1 or not isinstance(x, torch.Tensor) or x.dim() < 2:
            raise _not_alone(self.name, "it is called with more than a tensor of tokens")
        length = x.shape[-2]
        size = max(1, self.tile * length // max(1, x.numel() // x.shape[-1]))  # of each row of a batch
        if length <= size:
            found: torch.Tensor = self.forward(x)
            return found
        if not self.is_known:
            _check(self.name, self.module, self.forward, x)
            self.is_known = True
        split = [part.contiguous() for part in x.split(size, -2)]  # some make views of what they are given
        if torch.is_grad_enabled():
            parts = [checkpoint(self.forward, part, use_reentrant=False) for part in split]
        else:
            parts = [self.forward(part) for part in split]
        return torch.cat(parts, -2)


@torch.no_grad()
def _check(name: str, module: nn.Module, forward: Callable[..., Any], x: torch.Tensor) -> None:
    """Refuse a feed-forward that gives two tokens together something else than each alone."""
    if module.training and any(isinstance(inner, nn.Dropout) and inner.p > 0 for inner in module.modules()):
        return
    pair = x[..., :2, :].contiguous()
    together = forward(pair)
    if not isinstance(together, torch.Tensor) or together.shape[:-1] != pair.shape[:-1]:
        raise _not_alone(name, "it gives back something else than a tensor of as many tokens")
    alone = torch.cat([forward(token.contiguous()) for token in pair.split(1, -2)], -2)
    if not torch.allclose(together.float(), alone.float(), rtol=2e-2, atol=2e-2 * float(together.abs().max())):
        difference = float((together.float() - alone.float()).abs().max())
        raise _not_alone(name, f"two tokens together come out by {difference:.3g} otherwise than each for itself")


def _not_alone(name: str, why: str) -> UserError:
    return UserError(
        f"{name} does not treat each token alone",
        f"{why}, and activation_checkpointing.mlp_tile has it compute some at a time",
        "set activation_checkpointing.mlp_tile to 0",
    )
