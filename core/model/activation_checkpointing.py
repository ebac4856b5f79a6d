"""Recomputes blocks in backward instead of keeping their activations (Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from distui.core.config.schema import ActivationCheckpointingSection
from distui.core.errors import UserError
from distui.core.model.tiles import RECOMPUTES as _MARK
from distui.core.model.tiles import apply_tiles
from distui.core.parallel.head_loss import head_loss_of, spread_loss
from distui.core.sharding.units.partition import find_blocks


def apply_recomputation(
    model: nn.Module, section: ActivationCheckpointingSection, group: dist.ProcessGroup | None
) -> None:
    """Have feed-forwards and the loss compute in tiles, and blocks again in backward, as `section` says.

    `group` are the ranks over which the model is going to be cut: its loss is then computed by parts of the vocabulary.

    Raises: UserError where the model has nothing of what is asked for.
    """
    spread_loss(model, section.loss_tile, group)
    apply_tiles(model, section.mlp_tile)
    apply_activation_checkpointing(model, section.mode)


def apply_activation_checkpointing(model: nn.Module, mode: str) -> list[str]:
    """Make the blocks of `model` recompute: all under `full`, every second one under `selective`.

    The module stays what it is; only its `forward` runs inside a checkpoint, so hooks and names do not change. Returns
    the names of the blocks.

    Raises: UserError where the model has no repeated blocks.
    """
    if mode == "none":
        return []
    blocks = find_blocks(model)
    if not blocks:
        raise UserError(
            f"activation_checkpointing.mode={mode!r} found nothing to recompute in {type(model).__name__}",
            "it has no ModuleList or Sequential of like blocks, and no _no_split_modules",
            "keep the blocks in an nn.ModuleList, or set activation_checkpointing.mode to 'none'",
        )
    chosen = blocks if mode == "full" else blocks[::2]
    for _, block in chosen:
        block.forward = _checkpointed(block.forward)
    return [name for name, _ in chosen]


def remove_activation_checkpointing(model: nn.Module) -> None:
    """Give every block of `model` its own forward back."""
    for module in list(model.modules()):
        if (loss := head_loss_of(module)) is not None:
            loss.remove()
    for module in [*model.modules(), *(block for _, block in find_blocks(model))]:
        forward = module.__dict__.get("forward")
        if forward is None or not hasattr(forward, _MARK):
            continue
        del module.forward
        own = inspect.unwrap(forward, stop=lambda one: not hasattr(one, _MARK))
        if own != module.forward:  # the script's, on this one module
            module.forward = own


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    setattr(recomputing, _MARK, True)
    return recomputing
