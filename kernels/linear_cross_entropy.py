"""Cross-entropy of a linear layer's logits, without ever holding all of them.

    z = hidden @ weight^T + bias            loss_i = logsumexp_j z_ij - z_i,target
    dz_ij = softmax(z_i)_j - [j = target]   dhidden = dz @ weight    dweight = dz^T @ hidden    dbias = sum_i dz_i

The rows go through in chunks. For a mean or a sum the gradients are taken at once, while a chunk's logits are there:
they are overwritten by dz, which the two products then read. The factor of the loss (1 / rows, and whatever comes from
above) is applied to the result, so dz keeps its precision in fp16. Without a reduction the backward computes each
chunk's logits again.

Source: the chunks are those of Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2; the loss is computed in fp32 as
in torch.nn.functional.cross_entropy.
Memory: chunk x vocabulary in place of rows x vocabulary (twice, with its gradient).
Bytes of the row kernel: two reads and one write of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

MAX_BLOCK = 8192
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The same in plain torch operations, all logits at once."""
    logits = F.linear(hidden, weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target, ignore_index=ignore_index, reduction=reduction)


def _rows_reference(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, factor: torch.Tensor | None, write_grad: bool
) -> torch.Tensor:
    """Return the rows' losses, and overwrite the logits by their gradients, in plain torch operations."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    kept = target != ignore_index
    safe = target.where(kept, 0).unsqueeze(1)
    lse = wide.logsumexp(1, keepdim=True)
    losses = (lse - wide.gather(1, safe)).squeeze(1).where(kept, 0.0)
    if write_grad:
        grad = (wide - lse).exp_()
        grad.scatter_add_(1, safe, torch.full_like(lse, -1.0))
        logits.copy_(grad.mul_((kept if factor is None else factor.where(kept, 0.0)).unsqueeze(1)))
    return losses


if triton is not None:

    @triton.jit
    def _rows_kernel(
        logits_ptr,
        target_ptr,
        loss_ptr,
        factor_ptr,
        num_classes,
        ignore_index,
        HAS_FACTOR: tl.constexpr,
        WRITE_GRAD: tl.constexpr,
        BLOCK_SIZE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        start_ptr = logits_ptr + row * num_classes
        target = tl.load(target_ptr + row)
        kept = target != ignore_index
        # One pass gives the largest logit and the sum of exponentials, rescaled whenever a larger one comes.
        largest = float("-inf")
        total = 0.0
        for start in range(0, num_classes, BLOCK_SIZE):
            cols = start + tl.arange(0, BLOCK_SIZE)
            z = tl.load(start_ptr + cols, mask=cols < num_classes, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(largest, tl.max(z, axis=0))
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), axis=0)
            largest = higher
        lse = largest + tl.log(total)
        # A target outside of the classes gives NaN, never a read outside of the row.
        inside = (target >= 0) & (target < num_classes)
        z_target = tl.load(start_ptr + target, mask=inside & kept, other=float("nan")).to(tl.float32)
        tl.store(loss_ptr + row, tl.where(kept, lse - z_target, 0.0))
        if WRITE_GRAD:
            factor = 1.0
            if HAS_FACTOR:
                factor = tl.load(factor_ptr + row).to(tl.float32)
            factor = tl.where(kept, factor, 0.0)
            for start in range(0, num_classes, BLOCK_SIZE):
                cols = start + tl.arange(0, BLOCK_SIZE)
                mask = cols < num_classes
                z = tl.load(start_ptr + cols, mask=mask, other=float("-inf")).to(tl.float32)
                grad = (tl.exp(z - lse) - tl.where(cols == target, 1.0, 0.0)) * factor
                tl.store(start_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy_rows_(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    factor: torch.Tensor | None = None,
    write_grad: bool = True,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Return each row's loss; with `write_grad` overwrite its logits by their gradient, times the row's factor.

    Shapes: logits [n, classes] contiguous, target [n] integers, factor [n] or None; returns [n], fp32 (fp64 of fp64).
    """
    if use_triton is None:
        use_triton = triton is not None and logits.is_cuda and logits.dtype != torch.float64
    if not use_triton:
        return _rows_reference(logits, target, ignore_index, factor, write_grad)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(logits.shape[1]), MAX_BLOCK)
    _rows_kernel[(logits.shape[0],)](
        logits,
        target.contiguous(),
        losses,
        losses if factor is None else factor.contiguous(),
        logits.shape[1],
        ignore_index,
        HAS_FACTOR=factor is not None,
        WRITE_GRAD=write_grad,
        BLOCK_SIZE=block,
        num_warps=min(max(block // 256, 1), 16),
    )
    return losses


def _chunk_rows(num_rows: int, num_classes: int, width: int) -> int:
    """Return how many rows go at once: their logits weigh about what all hidden states do."""
    pieces = -(-num_classes // width)
    return 1 << max(0, (-(-num_rows // pieces) - 1).bit_length())


class _Gradients:
    """The sums over chunks; the weight's in fp32, since a chunk adds little to what is there."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: tuple[bool, ...]
    ) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if needs[2] and bias is not None else None

    def add(self, rows: slice, dz: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        if self.hidden is not None:
            self.hidden[rows] = dz @ weight.to(dz.dtype)
        if self.weight is not None:
            self.weight += dz.t() @ hidden.to(dz.dtype)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        ignore_index: int,
        reduction: str,
        chunk_rows: int,
        use_triton: bool | None,
        needs: tuple[bool, bool, bool],
    ) -> torch.Tensor:
        at_once = any(needs) and reduction != "none"
        found = _Gradients(hidden, weight, bias, needs) if at_once else None
        losses = []
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight, bias)
            losses.append(
                cross_entropy_rows_(
                    logits, target[rows], ignore_index=ignore_index, write_grad=at_once, use_triton=use_triton
                )
            )
            if found is not None:
                found.add(rows, logits, hidden[rows], weight)
        every = torch.cat(losses)
        ctx.options = (ignore_index, chunk_rows, use_triton, needs)
        ctx.reduction = reduction
        if reduction == "none":
            ctx.save_for_backward(hidden, weight, bias, target)
            return every
        # No row that counts: 0 / 0, which is NaN, as in torch.
        factor = (
            torch.ones_like(every[0]) if reduction == "sum" else 1.0 / (target != ignore_index).sum().to(every.dtype)
        )
        if found is not None:
            ctx.save_for_backward(factor, found.hidden, found.weight, found.bias)
        ctx.formats = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return every.sum() if reduction == "sum" else every.sum() * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        results: list[torch.Tensor | None] = []
        if ctx.reduction != "none":
            factor, *found = ctx.saved_tensors
            for tensor, dtype in zip(found, ctx.formats, strict=True):
                results.append(None if tensor is None else (tensor * (factor * grad)).to(dtype))
        else:
            hidden, weight, bias, target = ctx.saved_tensors
            ignore_index, chunk_rows, use_triton, needs = ctx.options
            sums = _Gradients(hidden, weight, bias, needs)
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                dz = F.linear(hidden[rows], weight, bias)
                cross_entropy_rows_(
                    dz, target[rows], ignore_index=ignore_index, factor=grad[rows], use_triton=use_triton
                )
                sums.add(rows, dz, hidden[rows], weight)
            for tensor, like in ((sums.hidden, hidden), (sums.weight, weight), (sums.bias, bias)):
                results.append(None if tensor is None else tensor.to(like.dtype))
        return (*results, None, None, None, None, None, None)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of hidden @ weight^T + bias; differentiable once in hidden, weight and bias.

    Shapes: hidden [n, d], weight [classes, d], bias [classes] or None, target [n] integers; returns a scalar, or [n]
    under reduction "none", in fp32 (fp64 of fp64). `chunk_rows` None balances the chunk against the hidden states.
    `use_triton` None takes the row kernel on a GPU and plain torch elsewhere; both work in chunks.

    Raises: ValueError where sizes do not fit, or for another reduction than mean, sum and none.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; one of {', '.join(REDUCTIONS)}")
    fits = hidden.dim() == 2 and target.shape == hidden.shape[:1] and weight.shape[1:] == hidden.shape[1:]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [None if t is None else tuple(t.shape) for t in (hidden, weight, target, bias)]
        raise ValueError(f"hidden [n, d], weight [classes, d], target [n], bias [classes] are needed, got {shapes}")
    if not hidden.shape[0]:
        return linear_cross_entropy_reference(
            hidden, weight, target, bias, ignore_index=ignore_index, reduction=reduction
        )
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    rows = chunk_rows or _chunk_rows(hidden.shape[0], weight.shape[0], weight.shape[1])
    loss: torch.Tensor = _LinearCrossEntropy.apply(
        hidden, weight, bias, target, ignore_index, reduction, rows, use_triton, needs
    )
    return loss
