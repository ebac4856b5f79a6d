"""The 2-norm of a flat buffer, in two launches and without a sum that depends on timing.

    norm = sqrt(sum_i x_i^2)

Each program of the first kernel squares and sums its own strided blocks in fp32; the second adds the partial sums in
their order. So the same buffer gives the same bits every time, which atomics would not.

Source: the global norm of Pascanu et al., arXiv 1211.5063, algorithm 1; a flat buffer needs no list of tensors.
Bytes: one read of the buffer.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

BLOCK = 4096
MAX_PROGRAMS = 1024


def norm_reference(x: torch.Tensor, order: float) -> torch.Tensor:
    """Return the norm of all elements as a float32 scalar, summed in fp32, of float64 in float64."""
    return torch.linalg.vector_norm(x, order, dtype=torch.promote_types(x.dtype, torch.float32)).float()


def l2_norm_reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain torch operations."""
    return norm_reference(x, 2.0)


if triton is not None:

    @triton.jit
    def _partial_kernel(x_ptr, partial_ptr, numel, num_programs, BLOCK_SIZE: tl.constexpr):
        program = tl.program_id(0).to(tl.int64)
        total = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
        for start in range(program * BLOCK_SIZE, numel, num_programs * BLOCK_SIZE):
            offsets = start + tl.arange(0, BLOCK_SIZE)
            x = tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
            total += x * x
        tl.store(partial_ptr + program, tl.sum(total, axis=0))

    @triton.jit
    def _finish_kernel(partial_ptr, out_ptr, count, BLOCK_SIZE: tl.constexpr):
        offsets = tl.arange(0, BLOCK_SIZE)
        partial = tl.load(partial_ptr + offsets, mask=offsets < count, other=0.0)
        tl.store(out_ptr, tl.sqrt(tl.sum(partial, axis=0)))


def l2_norm(x: torch.Tensor, *, use_triton: bool | None = None) -> torch.Tensor:
    """Return the 2-norm of all elements, summed in fp32.

    Shapes: x any, contiguous for the kernel; returns a float32 scalar on x's device, without a synchronisation.
    `use_triton` None takes the kernel on a GPU and the reference elsewhere.
    """
    if use_triton is None:
        use_triton = triton is not None and x.is_cuda and x.is_contiguous()
    if not use_triton:
        return l2_norm_reference(x)
    if not x.is_contiguous():
        raise ValueError(f"a contiguous buffer is needed, got strides {x.stride()} of shape {tuple(x.shape)}")
    count = max(1, min(triton.cdiv(x.numel(), BLOCK), MAX_PROGRAMS))
    partial = torch.empty(count, dtype=torch.float32, device=x.device)
    out = torch.empty((), dtype=torch.float32, device=x.device)
    _partial_kernel[(count,)](x, partial, x.numel(), count, BLOCK_SIZE=BLOCK, num_warps=8)
    _finish_kernel[(1,)](partial, out, count, BLOCK_SIZE=triton.next_power_of_2(count))
    return out
