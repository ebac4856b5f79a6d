"""SwiGLU's element-wise part, forward and backward.

    s = sigmoid(gate)       out = gate * s * up
    dup = dout * gate * s   dgate = dout * up * s * (1 + gate * (1 - s))

Nothing but gate and up is kept for the backward: plain torch keeps silu(gate) as well.

Source: Shazeer, arXiv 2002.05202, equation 6.
Bytes: forward two reads and one write of a tensor, backward three reads and two writes.
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

BLOCK = 1024


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The same in plain torch operations."""
    return F.silu(gate) * up


if triton is not None:

    @triton.jit
    def _forward_kernel(
        gate_ptr,
        up_ptr,
        out_ptr,
        gate_stride,
        up_stride,
        num_cols,
        blocks_a_row,
        BLOCK_SIZE: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        row = program // blocks_a_row
        cols = (program % blocks_a_row) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = cols < num_cols
        gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
        out = gate * tl.sigmoid(gate) * up
        tl.store(out_ptr + row * num_cols + cols, out.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        grad_ptr,
        gate_ptr,
        up_ptr,
        grad_gate_ptr,
        grad_up_ptr,
        gate_stride,
        up_stride,
        num_cols,
        blocks_a_row,
        BLOCK_SIZE: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        row = program // blocks_a_row
        cols = (program % blocks_a_row) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = cols < num_cols
        at = row * num_cols + cols
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        grad_up = grad * gate * s
        grad_gate = grad * up * s * (1.0 + gate * (1.0 - s))
        tl.store(grad_up_ptr + at, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)


def _pair(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as [rows, columns] with unit stride in a row: one long row where they are contiguous."""
    num_cols = gate.numel() if gate.is_contiguous() and up.is_contiguous() else gate.shape[-1]
    first, second = (
        x if x.stride(1) == 1 else x.contiguous() for x in (gate.reshape(-1, num_cols), up.reshape(-1, num_cols))
    )
    return first, second


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        gate_2d, up_2d = _pair(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        blocks = triton.cdiv(gate_2d.shape[1], BLOCK)
        _forward_kernel[(gate_2d.shape[0] * blocks,)](
            gate_2d, up_2d, out, gate_2d.stride(0), up_2d.stride(0), gate_2d.shape[1], blocks, BLOCK_SIZE=BLOCK
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        gate_2d, up_2d = _pair(gate, up)
        grad = grads[0].contiguous()
        grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        blocks = triton.cdiv(gate_2d.shape[1], BLOCK)
        _backward_kernel[(gate_2d.shape[0] * blocks,)](
            grad,
            gate_2d,
            up_2d,
            grad_gate,
            grad_up,
            gate_2d.stride(0),
            up_2d.stride(0),
            gate_2d.shape[1],
            blocks,
            BLOCK_SIZE=BLOCK,
        )
        return grad_gate, grad_up


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, use_triton: bool | None = None) -> torch.Tensor:
    """Return silu(gate) * up; differentiable in both.

    Shapes: gate and up the same, any strides (halves of one projection are read in place); returns it contiguous.
    `use_triton` None takes the kernel on a GPU and the reference elsewhere.

    Raises: ValueError where shapes or formats differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {tuple(gate.shape)} {gate.dtype}, up is {tuple(up.shape)} {up.dtype}")
    if use_triton is None:
        use_triton = triton is not None and gate.is_cuda and gate.dtype != torch.float64
    if not use_triton or not gate.numel():
        return swiglu_reference(gate, up)
    out: torch.Tensor = _SwiGLU.apply(gate, up)
    return out
