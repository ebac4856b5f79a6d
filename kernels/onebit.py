"""One bit an element: signs packed eight to a byte, with error feedback.

    c     <- x + error
    scale <- mean |c|                   (of each block, or of all)
    bits  <- c >= 0
    error <- c - scale * sign(c)        (sign(0) = 1)

The mean magnitude is the scale that leaves the least error. Where `c` is not finite, neither is the scale, and so
neither is anything that is unpacked with it.

Source: Tang et al., arXiv 2102.02888, section 3 (error-compensated 1-bit compression); Karimireddy et al.,
arXiv 1901.09847 (the scale). Bytes: 12 1/8 an fp32 element (read x and error; write error and a bit).
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

TILE = 1024
MAX_BLOCK = 8192
_GATHER_BITS = 0x0102040810204080
"""Eight bytes of 0 or 1 times this have their bits, in order, in the top byte."""
_tables: dict[torch.device, torch.Tensor] = {}


def _sign_table(device: torch.device) -> torch.Tensor:
    table = _tables.get(device)
    if table is None:
        codes = torch.arange(256, device=device).unsqueeze(1)
        table = _tables[device] = ((codes >> torch.arange(8, device=device)) & 1).float() * 2.0 - 1.0
    return table


def pack_signs_reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain torch operations."""
    num_bytes = -(-x.numel() // 8)
    flags = torch.zeros(num_bytes * 8, dtype=torch.bool, device=x.device)
    torch.ge(x, 0, out=flags[: x.numel()])
    return ((flags.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_signs_reference(bits: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, block: int) -> None:
    """The same in plain torch operations."""
    signs = _sign_table(bits.device)[bits.int()].view(-1)[: out.numel()]
    out.copy_(_times(signs, scale, block))


def _times(signs: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    if scale.numel() == 1:
        return signs.mul_(scale)
    whole = signs.numel() // block
    signs[: whole * block].view(-1, block).mul_(scale[:whole].unsqueeze(1))
    signs[whole * block :].mul_(scale[whole:])
    return signs


def block_scales(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return the mean magnitude of each block of `x`, of which the last may be shorter."""
    magnitude = x.abs()
    whole = x.numel() // block
    scales = magnitude[: whole * block].view(-1, block).mean(1)
    if whole * block == x.numel():
        return scales
    return torch.cat([scales, magnitude[whole * block :].mean().view(1)])


if triton is not None:

    @triton.jit
    def _pack_kernel(
        x_ptr,
        error_ptr,
        scale_ptr,
        bits_ptr,
        numel,
        FEEDBACK: tl.constexpr,
        OWN_SCALE: tl.constexpr,
        BLOCK_SIZE: tl.constexpr,
    ):
        program = tl.program_id(0)
        bytes_at = program.to(tl.int64) * (BLOCK_SIZE // 8) + tl.arange(0, BLOCK_SIZE // 8)
        lane = tl.arange(0, 8)
        offsets = bytes_at[:, None] * 8 + lane[None, :]
        mask = offsets < numel
        value = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if FEEDBACK:
            value += tl.load(error_ptr + offsets, mask=mask, other=0.0)
        positive = (value >= 0.0) & mask
        packed = tl.sum(positive.to(tl.int32) << lane[None, :], axis=1)
        tl.store(bits_ptr + bytes_at, packed.to(tl.uint8), mask=bytes_at * 8 < numel)
        if FEEDBACK:
            if OWN_SCALE:
                held = tl.minimum(numel - program.to(tl.int64) * BLOCK_SIZE, BLOCK_SIZE)
                total = tl.sum(tl.sum(tl.where(mask, tl.abs(value), 0.0), axis=1), axis=0)
                scale = total / held.to(tl.float32)
                tl.store(scale_ptr + program, scale)
            else:
                scale = tl.load(scale_ptr)
            tl.store(error_ptr + offsets, value - tl.where(positive, scale, -scale), mask=mask)

    @triton.jit
    def _unpack_kernel(bits_ptr, scale_ptr, out_ptr, numel, block, ONE_SCALE: tl.constexpr, TILE: tl.constexpr):
        offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        mask = offsets < numel
        byte = tl.load(bits_ptr + offsets // 8, mask=mask, other=0).to(tl.int32)
        if ONE_SCALE:
            scale = tl.load(scale_ptr + offsets * 0, mask=mask, other=0.0)
        else:
            scale = tl.load(scale_ptr + offsets // block, mask=mask, other=0.0)
        value = tl.where(((byte >> (offsets % 8).to(tl.int32)) & 1) == 1, scale, -scale)
        tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def _flat(*tensors: torch.Tensor) -> None:
    if any(tensor.dim() != 1 or not tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"flat contiguous tensors are needed, got {[tuple(tensor.shape) for tensor in tensors]}")


def pack_signs(x: torch.Tensor, use_triton: bool | None = None) -> torch.Tensor:
    """Return the signs of `x`, bit i % 8 of byte i // 8 set where x[i] >= 0; bits behind the end are 0.

    Shapes: x [n], contiguous, any floating format; the result [ceil(n / 8)] uint8.
    """
    _flat(x)
    if use_triton is None:
        use_triton = triton is not None and x.is_cuda
    if not use_triton or not x.numel():
        return pack_signs_reference(x)
    bits = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    grid = (triton.cdiv(x.numel(), TILE),)
    _pack_kernel[grid](x, x, x, bits, x.numel(), FEEDBACK=False, OWN_SCALE=False, BLOCK_SIZE=TILE)
    return bits


def unpack_signs(
    bits: torch.Tensor,
    numel: int,
    scale: torch.Tensor | float,
    out: torch.Tensor | None = None,
    block: int | None = None,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Return +scale where a bit is set and -scale elsewhere; written to `out` where that is given.

    Shapes: bits [ceil(n / 8)] uint8; scale a number, or [ceil(n / block)] fp32; out [n], any floating format.

    Raises: ValueError where sizes do not fit.
    """
    if out is None:
        out = torch.empty(numel, dtype=torch.float32, device=bits.device)
    _flat(bits, out)
    scales = torch.as_tensor(scale, dtype=torch.float32, device=bits.device).reshape(-1)
    num_scales = 1 if block is None else -(-numel // block)
    if bits.numel() != -(-numel // 8) or out.numel() != numel or scales.numel() != num_scales:
        raise ValueError(
            f"{numel} elements need {-(-numel // 8)} bytes, {num_scales} scales and an output of the same size, got "
            f"{bits.numel()}, {scales.numel()} and {out.numel()}"
        )
    if use_triton is None:
        use_triton = triton is not None and bits.is_cuda
    if not use_triton or not numel:
        unpack_signs_reference(bits, scales, out, block or numel)
        return out
    grid = (triton.cdiv(numel, TILE),)
    one = scales.numel() == 1
    _unpack_kernel[grid](bits, scales, out, numel, block or numel, ONE_SCALE=one, TILE=TILE)
    return out


def compress_onebit(
    x: torch.Tensor, error: torch.Tensor, block: int | None = None, use_triton: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the signs of `x + error` and their scale, and leave in `error` what they do not say.

    Shapes: x [n], contiguous, any floating format; error [n] fp32; bits [ceil(n / 8)] uint8; scale [1], or
    [ceil(n / block)]. `block` must be a multiple of 8; the kernel takes powers of two up to 8192.

    Raises: ValueError where sizes or formats do not fit.
    """
    _flat(x, error)
    if error.numel() != x.numel() or error.dtype != torch.float32 or (block is not None and block % 8):
        raise ValueError(
            f"an fp32 error of {x.numel()} elements and a block that 8 divides are needed, got {error.dtype}, "
            f"{error.numel()} and {block}"
        )
    if use_triton is None:
        fits = block is None or (block <= MAX_BLOCK and block & (block - 1) == 0)
        use_triton = triton is not None and x.is_cuda and fits
    if not use_triton or not x.numel():
        error.add_(x)
        scale = error.abs().mean().view(1) if block is None else block_scales(error, block)
        bits = pack_signs_reference(error)
        error.sub_(unpack_signs(bits, x.numel(), scale, block=block, use_triton=False))
        return bits, scale
    bits = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    if block is None:
        scale = (x.float() + error).abs().mean().view(1)
    else:
        scale = torch.empty(triton.cdiv(x.numel(), block), dtype=torch.float32, device=x.device)
    size = block or TILE
    grid = (triton.cdiv(x.numel(), size),)
    _pack_kernel[grid](x, error, scale, bits, x.numel(), FEEDBACK=True, OWN_SCALE=block is not None, BLOCK_SIZE=size)
    return bits, scale
