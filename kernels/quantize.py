"""Block-wise quantisation of a flat tensor to 8 bits, and back.

    scale_b <- max |x_b| / Q          (Q = 127 for int8, 448 for fp8 e4m3)
    q_b     <- round(x_b / scale_b)   (to nearest, ties to even; for fp8 to the nearest e4m3 number)
    x_b     ~= q_b * scale_b

The error of an int8 element is at most scale_b / 2. A block that holds NaN or an infinity gets the scale NaN, so that
all of it comes back as NaN: whoever looks for an overflow still finds it.

Source: Dettmers et al., arXiv 2110.02861, section 2 (block-wise quantisation); ZeRO++, arXiv 2306.10209, section 3.1.
Bytes: 5 read and 1 written an fp32 element (a second read of the block comes from the cache), 4 a block.
"""

from __future__ import annotations

from typing import Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

Format = Literal["int8", "fp8"]
TORCH_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
MAX_BLOCK = 8192


def quantize_blockwise_reference(
    x: torch.Tensor, block: int = 256, dtype: Format = "int8"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch operations."""
    numel = x.numel()
    q = torch.empty(numel, dtype=TORCH_DTYPES[dtype], device=x.device)
    scales = torch.empty(-(-numel // block), dtype=torch.float32, device=x.device)
    whole = numel // block
    for first, last, at in ((0, whole * block, slice(0, whole)), (whole * block, numel, slice(whole, None))):
        if first == last:
            continue
        blocks = x[first:last].view(-1, min(block, last - first)).float()
        scale = blocks.abs().amax(1).mul_(1.0 / LARGEST[dtype])
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        scales[at] = scale
        divisor = torch.where(scale > 0, scale, torch.inf)  # of zeros and of what is not finite nothing is kept
        scaled = (blocks / divisor.unsqueeze(1)).clamp_(-LARGEST[dtype], LARGEST[dtype]).nan_to_num_(0.0)
        q[first:last] = (scaled.round_() if dtype == "int8" else scaled).to(q.dtype).view(-1)
    return q, scales


def dequantize_blockwise_reference(q: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int) -> None:
    """The same in plain torch operations."""
    numel = q.numel()
    whole = numel // block
    for first, last, at in ((0, whole * block, slice(0, whole)), (whole * block, numel, slice(whole, None))):
        if first == last:
            continue
        shape = (-1, min(block, last - first))
        values = q[first:last].view(shape)
        values = values if q.dtype == torch.int8 else values.float()
        factors, target = scales[at].unsqueeze(1), out[first:last].view(shape)
        if out.dtype == torch.float32:
            torch.mul(values, factors, out=target)
        else:
            target.copy_(values * factors)


if triton is not None:

    @triton.jit
    def _quantize_kernel(
        x_ptr,
        q_ptr,
        scales_ptr,
        numel,
        largest,
        FP8: tl.constexpr,
        BLOCK_SIZE: tl.constexpr,
    ):
        program = tl.program_id(0)
        offsets = program.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offsets < numel
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        magnitude = tl.abs(x)
        finite = magnitude < float("inf")  # false for NaN
        x = tl.where(finite, x, 0.0)
        bad = tl.sum(finite.to(tl.int32), axis=0) < BLOCK_SIZE
        scale = tl.max(tl.abs(x), axis=0) * (1.0 / largest)
        scale = tl.where(bad, float("nan"), scale)
        tl.store(scales_ptr + program, scale)
        divisor = tl.where(scale > 0.0, scale, float("inf"))
        scaled = tl.div_rn(x, tl.zeros_like(x) + divisor)
        scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
        if FP8:
            # By hand, because cards before compute capability 8.9 cannot convert: e4m3 has bias 7, fp32 127.
            bits = tl.abs(scaled).to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
            tiny = ((tl.abs(scaled) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
            code = tl.where(tl.abs(scaled) < 0.015625, tiny, rounded - (120 << 3))
            negative = (scaled.to(tl.int32, bitcast=True) >> 31) & 1
            tl.store(q_ptr + offsets, (code | (negative << 7)).to(tl.uint8), mask=mask)
        else:
            # Adding and taking 1.5 * 2^23 away rounds to the nearest integer, ties to even.
            tl.store(q_ptr + offsets, ((scaled + 12582912.0) - 12582912.0).to(tl.int8), mask=mask)

    @triton.jit
    def _dequantize_kernel(q_ptr, scales_ptr, out_ptr, numel, FP8: tl.constexpr, BLOCK_SIZE: tl.constexpr):
        program = tl.program_id(0)
        offsets = program.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offsets < numel
        scale = tl.load(scales_ptr + program)
        if FP8:
            code = tl.load(q_ptr + offsets, mask=mask, other=0).to(tl.int32)
            magnitude = code & 0x7F
            normal = ((magnitude + (120 << 3)) << 20).to(tl.float32, bitcast=True)
            value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
            value = tl.where(code > 127, -value, value)
        else:
            value = tl.load(q_ptr + offsets, mask=mask, other=0).to(tl.float32)
        tl.store(out_ptr + offsets, (value * scale).to(out_ptr.dtype.element_ty), mask=mask)


def _fits_kernel(block: int) -> bool:
    return block <= MAX_BLOCK and block & (block - 1) == 0


def quantize_blockwise(
    x: torch.Tensor, block: int = 256, dtype: Format = "int8", use_triton: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` in 8 bits, and a scale for each `block` elements.

    Shapes: x [n], contiguous, any floating format; q [n] int8 or float8_e4m3fn; scales [ceil(n / block)] fp32.
    `use_triton` None takes the kernel on a GPU where `block` is a power of two up to 8192, and the reference elsewhere.

    Raises: ValueError where `x` is not flat.
    """
    if x.dim() != 1 or not x.is_contiguous() or block < 1:
        raise ValueError(f"a flat contiguous tensor and a positive block are needed, got {tuple(x.shape)}, {block}")
    if use_triton is None:
        use_triton = triton is not None and x.is_cuda and _fits_kernel(block)
    if not use_triton or not x.numel():
        return quantize_blockwise_reference(x, block, dtype)
    q = torch.empty(x.numel(), dtype=TORCH_DTYPES[dtype], device=x.device)
    scales = torch.empty(triton.cdiv(x.numel(), block), dtype=torch.float32, device=x.device)
    fp8 = dtype == "fp8"
    target = q.view(torch.uint8) if fp8 else q
    _quantize_kernel[(scales.numel(),)](x, target, scales, x.numel(), LARGEST[dtype], FP8=fp8, BLOCK_SIZE=block)
    return q, scales


def dequantize_blockwise(
    q: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor | None = None,
    block: int = 256,
    dtype: torch.dtype = torch.float32,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Return what `quantize_blockwise` was given, as near as 8 bits hold it; written to `out` where that is given.

    Shapes: q [n]; scales [ceil(n / block)]; out [n], contiguous, any floating format.

    Raises: ValueError where sizes do not fit.
    """
    if out is None:
        out = torch.empty(q.numel(), dtype=dtype, device=q.device)
    if scales.numel() != -(-q.numel() // block) or out.numel() != q.numel() or not out.is_contiguous():
        raise ValueError(
            f"{q.numel()} elements in blocks of {block} need {-(-q.numel() // block)} scales and a contiguous output "
            f"of the same size, got {scales.numel()} and {out.numel()}"
        )
    if use_triton is None:
        use_triton = triton is not None and q.is_cuda and _fits_kernel(block)
    if not use_triton or not q.numel():
        dequantize_blockwise_reference(q, scales, out, block)
        return out
    fp8 = q.dtype == torch.float8_e4m3fn
    source = q.view(torch.uint8) if fp8 else q
    _dequantize_kernel[(scales.numel(),)](source, scales, out, q.numel(), FP8=fp8, BLOCK_SIZE=block)
    return out
