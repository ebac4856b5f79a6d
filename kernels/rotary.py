"""Rotary position embedding in the rotate-half form, forward and backward.

    y1 = x1 * cos1 - x2 * sin1        y2 = x2 * cos2 + x1 * sin2          (x1, x2: the two halves of a head)
    dx1 = dy1 * cos1 + dy2 * sin2     dx2 = dy2 * cos2 - dy1 * sin1

Plain torch writes four temporaries of x's size for it. The cosines and sines are read once for all heads of a position,
and x by its own strides, so the transposed view that attention makes is not copied.

Source: Su et al., arXiv 2104.09864, equation 34, with the halves of GPT-NeoX and Llama instead of adjacent pairs.
Bytes: one read and one write of x, and one read of cos and sin.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int = 1) -> torch.Tensor:
    """The same in plain torch operations."""
    x1, x2 = x.chunk(2, dim=-1)
    rotated = torch.cat((-x2, x1), dim=-1)
    return x * cos.unsqueeze(head_dim) + rotated * sin.unsqueeze(head_dim)


if triton is not None:

    @triton.jit
    def _rotary_kernel(
        x_ptr,
        cos_ptr,
        sin_ptr,
        out_ptr,
        x_batch,
        x_head,
        x_position,
        out_batch,
        out_head,
        out_position,
        table_batch,
        num_positions,
        num_heads,
        half,
        BACKWARD: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_HALF: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        batch, position = program // num_positions, program % num_positions
        heads, dims = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_HALF)
        in_half = dims < half
        mask = (heads[:, None] < num_heads) & in_half[None, :]
        table = batch * table_batch + position * (2 * half) + dims
        cos1 = tl.load(cos_ptr + table, mask=in_half, other=0.0).to(tl.float32)[None, :]
        cos2 = tl.load(cos_ptr + table + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sin1 = tl.load(sin_ptr + table, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sin2 = tl.load(sin_ptr + table + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
        at = x_ptr + batch * x_batch + position * x_position + heads[:, None] * x_head + dims[None, :]
        x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            y1 = x1 * cos1 + x2 * sin2
            y2 = x2 * cos2 - x1 * sin1
        else:
            y1 = x1 * cos1 - x2 * sin1
            y2 = x2 * cos2 + x1 * sin2
        to = out_ptr + batch * out_batch + position * out_position + heads[:, None] * out_head + dims[None, :]
        tl.store(to, y1.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(to + half, y2.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int, dtype: torch.dtype, backward: bool
) -> torch.Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    position_dim = 3 - head_dim
    num_positions, num_heads, half = x.shape[position_dim], x.shape[head_dim], x.shape[-1] // 2
    _rotary_kernel[(x.shape[0] * num_positions,)](
        x,
        cos,
        sin,
        out,
        x.stride(0),
        x.stride(head_dim),
        x.stride(position_dim),
        out.stride(0),
        out.stride(head_dim),
        out.stride(position_dim),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        num_positions,
        num_heads,
        half,
        BACKWARD=backward,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_HALF=triton.next_power_of_2(half),
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.head_dim, ctx.dtype = head_dim, x.dtype
        return _launch(x, cos, sin, head_dim, torch.promote_types(x.dtype, cos.dtype), backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _launch(grads[0], cos, sin, ctx.head_dim, ctx.dtype, backward=True), None, None, None


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int = 1, *, use_triton: bool | None = None
) -> torch.Tensor:
    """Return x turned by its positions; differentiable in x.

    Shapes: x [batch, heads, positions, d] (`head_dim` 1) or [batch, positions, heads, d] (2), any strides; cos and sin
    [batch or 1, positions, d]. The result has x's shape, in the wider of the formats.
    `use_triton` None takes the kernel on a GPU and the reference elsewhere, and where cos or sin need a gradient.

    Raises: ValueError where sizes do not fit.
    """
    if head_dim not in (1, 2) or x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(
            f"x of shape {tuple(x.shape)} with heads at {head_dim}: 4 dimensions, an even last one, 1 or 2"
        )
    table = (x.shape[3 - head_dim], x.shape[-1])
    if cos.shape != sin.shape or cos.shape[1:] != table or cos.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}: [1 or {x.shape[0]}, {table[0]}, {table[1]}]"
        )
    differentiable_tables = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if use_triton is None:
        use_triton = triton is not None and x.is_cuda and x.dtype != torch.float64
    if not use_triton or differentiable_tables or not x.numel():
        return rotary_reference(x, cos, sin, head_dim)
    out: torch.Tensor = _Rotary.apply(x, cos, sin, head_dim)
    return out
