"""The loss of a causal language model without its whole logits: of a part of the tokens at a time, of a part of the
vocabulary a rank, or both.

Whole logits, [tokens, vocabulary] in float32 with their gradient, are the largest tensors of a training. So where the
model is given labels in training, its head gives back what it was given, as `Later`, and the model's loss function
multiplies it tile by tile, and again in backward (ALST, arXiv 2506.13996, section 3.1.1). Where tensor-parallel ranks
have cut the head, each computes with its logits; three numbers a token travel (Shoeybi et al., arXiv 1909.08053,
section 3). `output.logits` is None then.

Legend: N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from distui.core.axes.cut import part_of
from distui.core.errors import UserError


class Later(torch.Tensor):
    """What stands for logits until the loss is computed: `hidden` is what the head was given.

    Any other use of it multiplies, so that a model that scales or caps its logits is right, at the price of them all.
    """

    hidden: torch.Tensor
    whole: Callable[[], torch.Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.float):  # as they come to the loss in any case
            return args[0]

        def real(value: Any) -> Any:
            if type(value) is Later:
                return value.whole()
            if isinstance(value, tuple | list):
                return type(value)(map(real, value))
            return value

        return func(*map(real, args), **{key: real(value) for key, value in (kwargs or {}).items()})


class HeadLoss:
    """Stands for the loss function of one model, its head's forward and its own, until `remove`."""

    def __init__(self, model: Any, head: nn.Linear, tile: int, group: dist.ProcessGroup | None) -> None:
        """`tile` is tokens at a time, 0 all; `group` the ranks that may cut the head."""
        self.model, self.head, self.tile, self.group = model, head, tile, group
        self.total = head.out_features
        self.gather: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits
        """Makes whole logits of a rank's; set by whoever cuts the head."""
        self._wanted = False
        self._plain_loss = model.loss_function
        self._before = model.__dict__.get("forward"), head.__dict__.get("forward")
        self._own_forward, self._own_head = model.forward, head.forward
        self._names = list(inspect.signature(model.forward).parameters)
        model.loss_function = self._loss
        head.forward = self._head  # type: ignore[method-assign,assignment]
        forward = functools.partial(self._forward)
        model.forward = functools.update_wrapper(forward, self._own_forward)  # libraries look up what it takes
        vars(head)[_MARK] = self

    @property
    def is_cut(self) -> bool:
        """Whether this rank has a part of the vocabulary."""
        return self.group is not None and self.head.weight.shape[0] != self.total

    def remove(self) -> None:
        """Give the model back what was its own."""
        self.model.loss_function = self._plain_loss
        for module, before in zip((self.model, self.head), self._before, strict=True):
            if "forward" in vars(module):
                del module.forward
            if before is not None:
                module.forward = before
        vars(self.head).pop(_MARK, None)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        labelled = given.get("labels") is not None
        self._wanted = labelled and self.model.training and torch.is_grad_enabled() and (self.tile > 0 or self.is_cut)
        try:
            output = self._own_forward(*args, **kwargs)
        finally:
            self._wanted = False
        if isinstance(output, tuple):
            return tuple(None if type(part) is Later else part for part in output)
        if type(getattr(output, "logits", None)) is Later:
            output.logits = None
            if isinstance(output, OrderedDict):  # transformers' outputs are both
                OrderedDict.__delitem__(output, "logits")
        return output

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self._wanted:
            return self._own_head(hidden)
        found = torch.Tensor._make_subclass(Later, hidden.new_empty(0))
        found.hidden, found.whole = hidden, lambda: self._multiplied(hidden)
        return found

    def _multiplied(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.tile:
            raise UserError(
                f"{type(self.model).__name__} does something to its logits before the loss",
                "activation_checkpointing.loss_tile computes them a part of the tokens at a time, in the loss itself",
                "set activation_checkpointing.loss_tile to 0",
            )
        return self.gather(self._own_head(hidden))

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return what transformers' ForCausalLMLoss does: the mean over valid tokens, or the sum by `num_items`."""
        if type(logits) is not Later or vocab_size != self.total:
            given = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, **kwargs}
            whole = logits.whole() if type(logits) is Later else logits
            loss: torch.Tensor = self._plain_loss(whole, labels, vocab_size, shift_labels=shift_labels, **given)
            return loss
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden_NH = logits.hidden.flatten(0, -2)
        target_N = shift_labels.reshape(-1).to(hidden_NH.device)
        size = self.tile or max(1, len(target_N))
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        for hidden, target in zip(hidden_NH.split(size), target_N.split(size), strict=True):
            if self.tile and len(target_N) > size:
                total = total + checkpoint(self._sum, hidden, target, ignore_index, use_reentrant=False)
            else:
                total = total + self._sum(hidden, target, ignore_index)
        if num_items_in_batch is None:
            num_items_in_batch = (target_N != ignore_index).sum()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def _sum(self, hidden_NH: torch.Tensor, target_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
        logits_NV = self._own_head(hidden_NH).float()
        if not self.is_cut:
            return F.cross_entropy(logits_NV, target_N, ignore_index=ignore_index, reduction="sum")
        found: torch.Tensor = _CutEntropy.apply(logits_NV, target_N, self.total, ignore_index, self.group)
        return found


class _CutEntropy(torch.autograd.Function):
    """The sum of cross entropies of logits of which each rank has its part of the vocabulary; the same on all ranks."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, target_N: torch.Tensor, total: int, ignored: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        low, high = part_of(total, dist.get_world_size(group), dist.get_rank(group))
        counts_N = target_N != ignored
        torch._assert_async((~counts_N | ((target_N >= 0) & (target_N < total))).all(), f"a label is not below {total}")
        most_N = logits_NV.amax(-1) if high > low else logits_NV.new_full(target_N.shape, -torch.inf)
        dist.all_reduce(most_N, op=dist.ReduceOp.MAX, group=group)
        shifted_NV = logits_NV - most_N[:, None]
        here_N = counts_N & (target_N >= low) & (target_N < high)
        rows = here_N.nonzero().squeeze(1)
        columns = target_N[rows] - low
        picked_N = torch.zeros_like(most_N)
        picked_N[rows] = shifted_NV[rows, columns]
        sums = torch.stack([shifted_NV.exp_().sum(-1), picked_N])
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(shifted_NV.div_(sums[0][:, None]), counts_N, rows, columns)
        return ((sums[0].log() - sums[1]) * counts_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        softmax_NV, counts_N, rows, columns = ctx.saved_tensors
        found_NV = softmax_NV * grad
        found_NV[rows, columns] -= grad
        # Filled, not multiplied: where no label is valid, the mean's gradient is infinite.
        return found_NV.masked_fill_(~counts_N[:, None], 0.0), None, None, None, None


_MARK = "distui_head_loss"


def head_loss_of(module: nn.Module) -> HeadLoss | None:
    """Return what stands for the loss whose head `module` is."""
    return vars(module).get(_MARK)


def spread_loss(model: Any, tile: int, group: dist.ProcessGroup | None) -> HeadLoss | None:
    """Have the loss of `model` computed `tile` tokens at a time (0: all), and over the ranks that cut its head.

    Returns None where neither is, or where the loss is not known: then logits are whole as ever.

    Raises: UserError where tiles are asked for, and the loss of the model is not known.
    """
    if not tile and group is None:
        return None
    if isinstance(why := _head_of(model), nn.Linear):
        return HeadLoss(model, why, tile, group)
    if not tile:
        return None
    raise UserError(
        f"activation_checkpointing.loss_tile={tile} for {type(model).__name__}",
        f"{why}; the loss of transformers' causal language models is known",
        "set activation_checkpointing.loss_tile to 0",
    )


def _head_of(model: Any) -> nn.Linear | str:
    """Return the head whose output goes to transformers' causal loss and nowhere else, or why there is none."""
    if not type(model).__module__.startswith("transformers.") or not hasattr(model, "loss_function"):
        return "it is none of transformers' models"
    from transformers.loss.loss_utils import ForCausalLMLoss

    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) or model.loss_function is not ForCausalLMLoss:
        return "its loss is not transformers' ForCausalLMLoss"
    if "labels" not in inspect.signature(model.forward).parameters:
        return "its forward takes no labels"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        return f"its head is a {type(head).__name__}"
    return head
