"""RMSNorm over the last dimension, forward and backward.

    rstd = (mean_j x_j^2 + eps)^(-1/2)        h = x * rstd        y = h * (weight + offset)

    g  = dy * (weight + offset)
    dx = rstd * (g - h * mean_j(g_j * h_j))   dweight = sum over rows of dy * h

Everything is computed in fp32. `round_first` rounds h to x's format before the weight (Llama), else only y is rounded
(torch.nn.RMSNorm; with offset 1 Gemma).

Source: Zhang & Sennrich, arXiv 1910.07467, equation 4.
Bytes: forward one read and one write of x; backward reads x and dy and writes dx. The sums for dweight are kept by few
programs over many rows each, and added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

MAX_COLS = 65536
"""A row is held in registers by one program; a longer one takes the reference."""


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, *, eps: float, offset: float = 0.0, round_first: bool = False
) -> torch.Tensor:
    """The same in plain torch operations."""
    wide = x if x.dtype == torch.float64 else x.float()
    h = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype)
    scale = weight + offset if offset else weight
    if round_first:
        return scale * h.to(x.dtype)
    return (h * (weight.to(h.dtype) + offset)).to(x.dtype)


if triton is not None:

    @triton.jit
    def _forward_kernel(
        x_ptr,
        weight_ptr,
        out_ptr,
        rstd_ptr,
        num_cols,
        eps,
        offset,
        HAS_WEIGHT: tl.constexpr,
        ROUND_FIRST: tl.constexpr,
        BLOCK_SIZE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_SIZE)
        mask = cols < num_cols
        x = tl.load(x_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / num_cols + eps)
        tl.store(rstd_ptr + row, rstd)
        y = x * rstd
        if ROUND_FIRST:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        if HAS_WEIGHT:
            y = y * (tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + offset)
        tl.store(out_ptr + row * num_cols + cols, y.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        grad_ptr,
        x_ptr,
        weight_ptr,
        rstd_ptr,
        grad_x_ptr,
        partial_ptr,
        num_rows,
        num_cols,
        offset,
        num_programs,
        HAS_WEIGHT: tl.constexpr,
        BLOCK_SIZE: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_SIZE)
        mask = cols < num_cols
        if HAS_WEIGHT:
            scale = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + offset
            grad_weight = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
        for row in range(program, num_rows, num_programs):
            at = row * num_cols + cols
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            h = x * rstd
            if HAS_WEIGHT:
                grad_weight += g * h
                g = g * scale
            grad_x = rstd * (g - h * (tl.sum(g * h, axis=0) / num_cols))
            tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if HAS_WEIGHT:
            tl.store(partial_ptr + program * num_cols + cols, grad_weight, mask=mask)


def _num_warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


def _num_programs(x: torch.Tensor, num_rows: int) -> int:
    """Return over how many programs the rows of a backward are spread: a few on each multiprocessor."""
    if not x.is_cuda:
        return min(num_rows, 3)
    return min(num_rows, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, round_first: bool
    ) -> torch.Tensor:
        num_cols = x.shape[-1]
        x = x.contiguous()
        num_rows = x.numel() // num_cols
        dtype = torch.promote_types(x.dtype, weight.dtype) if round_first and weight is not None else x.dtype
        out = torch.empty_like(x, dtype=dtype)
        rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(num_cols)
        _forward_kernel[(num_rows,)](
            x,
            x if weight is None else weight,
            out,
            rstd,
            num_cols,
            eps,
            offset,
            HAS_WEIGHT=weight is not None,
            ROUND_FIRST=round_first,
            BLOCK_SIZE=block,
            num_warps=_num_warps(block),
        )
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad = grads[0].contiguous()
        num_rows, num_cols = rstd.numel(), x.shape[-1]
        grad_x = torch.empty_like(x)
        count = _num_programs(x, num_rows)
        partial = None
        if weight is not None:
            partial = torch.empty(count, num_cols, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(num_cols)
        _backward_kernel[(count,)](
            grad,
            x,
            x if weight is None else weight,
            rstd,
            grad_x,
            rstd if partial is None else partial,
            num_rows,
            num_cols,
            ctx.offset,
            count,
            HAS_WEIGHT=weight is not None,
            BLOCK_SIZE=block,
            num_warps=_num_warps(block),
        )
        grad_weight = None if partial is None else partial.sum(0).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Return x over its root mean square, times weight + offset; differentiable in x and weight.

    Shapes: x [..., n], weight [n] or None; returns [..., n] in x's format (with `round_first` in the wider of both).
    `use_triton` None takes the kernel on a GPU and the reference elsewhere.

    Raises: ValueError where the weight does not fit.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight of shape {tuple(weight.shape)} for rows of {x.shape[-1]}")
    if use_triton is None:
        use_triton = triton is not None and x.is_cuda and x.shape[-1] <= MAX_COLS and x.dtype != torch.float64
    if not use_triton or not x.numel():
        return rms_norm_reference(x, weight, eps=eps, offset=offset, round_first=round_first)
    out: torch.Tensor = _RMSNorm.apply(x, weight, eps, offset, round_first)
    return out
