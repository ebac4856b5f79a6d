"""AdamW on a flat shard with both moments in 8 bits, one pass, block by block.

    m, v <- decode(codes, scales)      then one step as in fused_adamw.py      codes, scales <- encode(m, v)

A block is 256 elements with one fp32 scale, its largest magnitude. Between 0 and the scale the codes are spaced by a
power, so that small values keep a relative precision of their own:

    m = scale * sign(c) * (c / 127)^2,  c in -127..127        v = scale * (c / 255)^4,  c in 0..255

Codes are rounded up or down at random with the chances that make the mean right. Rounding to the nearest would freeze
v: at beta2 = 0.999 a step changes it by a tenth of a percent, a code by some percent. The chance comes from a hash of
step and element, so a run can be repeated and needs no generator's state. A v that is not 0 never becomes 0.

Source: Dettmers et al., arXiv 2110.02861 (block-wise 8-bit states); a power in place of their dynamic tree, which needs
a table and a search. The hash is the finaliser of MurmurHash3.
Bytes: 16.06 a parameter (read p and g, write p, in fp32; read and write both moments, 1 byte each, and the scales)
against 28, and 2 for a 16-bit `out`. State: 2.03 bytes a parameter against 8.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

BLOCK = 256
"""Elements with a common scale."""
BLOCKS_A_PROGRAM = 4
CHUNK = 1 << 16
"""Elements that the reference takes at once: what it needs in between stays small."""

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""exp_avg codes int8 [n], its scales fp32 [ceil(n / 256)], exp_avg_sq codes uint8 [n], its scales."""


def zero_moments(numel: int, device: torch.device | str = "cpu") -> Moments:
    """Return moments that are all 0."""
    blocks = -(-numel // BLOCK)
    return (
        torch.zeros(numel, dtype=torch.int8, device=device),
        torch.zeros(blocks, dtype=torch.float32, device=device),
        torch.zeros(numel, dtype=torch.uint8, device=device),
        torch.zeros(blocks, dtype=torch.float32, device=device),
    )


def _hash(index: torch.Tensor, seed: int) -> torch.Tensor:
    """Return 32 mixed bits of each index, in int64."""
    low = 0xFFFFFFFF
    h = (index ^ seed) & low
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & low
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & low
    return h ^ (h >> 16)


def _seed(step: int) -> int:
    return (step * 0x9E3779B1) & 0xFFFFFFFF


def _by_block(x: torch.Tensor) -> torch.Tensor:
    """Return [n] as [blocks, 256], zeros at the end."""
    short = -x.numel() % BLOCK
    return torch.nn.functional.pad(x, (0, short)).view(-1, BLOCK)


def _spread(scales: torch.Tensor, numel: int) -> torch.Tensor:
    return scales.repeat_interleave(BLOCK)[:numel]


def dequantize_moments(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exp_avg and exp_avg_sq in fp32."""
    codes, scales, sq_codes, sq_scales = moments
    m = codes.float().div_(127.0)
    m = m.mul_(m.abs()).mul_(_spread(scales, m.numel()))
    v = sq_codes.float().div_(255.0).square_().square_()
    return m, v.mul_(_spread(sq_scales, v.numel()))


def _codes(ratio: torch.Tensor, power: int, top: float, chance: torch.Tensor) -> torch.Tensor:
    """Return codes whose mean decodes to `ratio`, which is in 0..1."""
    exact = ratio.sqrt()
    if power == 4:
        exact = exact.sqrt()
    exact.mul_(top)
    low = exact.floor().clamp_(max=top - 1)
    below, above = (low / top) ** power, ((low + 1) / top) ** power
    return low + (chance < (ratio - below) / (above - below))


def quantize_moments(exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: int, start: int = 0) -> Moments:
    """Return fp32 moments in 8 bits; `step` and `start`, the first element's place, seed the rounding."""
    numel = exp_avg.numel()
    bits = _hash(torch.arange(start, start + numel, device=exp_avg.device), _seed(step))
    scales = _by_block(exp_avg.abs()).amax(1)
    sq_scales = _by_block(exp_avg_sq).amax(1)
    ratio = (exp_avg.abs() / _spread(scales.where(scales > 0, 1.0), numel)).clamp_(max=1.0)
    sq_ratio = (exp_avg_sq / _spread(sq_scales.where(sq_scales > 0, 1.0), numel)).clamp_(max=1.0)
    codes = _codes(ratio, 2, 127.0, (bits & 0xFFFF).float() / 65536.0)
    sq_codes = _codes(sq_ratio, 4, 255.0, (bits >> 16).float() / 65536.0)
    sq_codes = torch.where(sq_ratio > 0, sq_codes.clamp(min=1.0), sq_codes)
    return codes.mul_(exp_avg.sign()).to(torch.int8), scales, sq_codes.to(torch.uint8), sq_scales


def adamw8bit_reference(
    master: torch.Tensor,
    grad: torch.Tensor,
    moments: Moments,
    out: torch.Tensor | None,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_factor: float = 1.0,
) -> None:
    """The same in plain torch operations, in place, chunk by chunk."""
    for start in range(0, master.numel(), CHUNK):
        here, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
        held: Moments = (moments[0][here], moments[1][blocks], moments[2][here], moments[3][blocks])
        p, g = master[here], grad[here].float() * grad_factor
        m, v = dequantize_moments(held)
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        denominator = (v / (1.0 - beta2**step)).sqrt_().add_(eps)
        p.mul_(1.0 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1.0 - beta1**step))
        for to, value in zip(held, quantize_moments(m, v, step, start), strict=True):
            to.copy_(value)
        if out is not None:
            out[here].copy_(p)


if triton is not None:

    @triton.jit(do_not_specialize=["seed"])
    def _adamw8bit_kernel(
        master_ptr,
        grad_ptr,
        codes_ptr,
        scales_ptr,
        sq_codes_ptr,
        sq_scales_ptr,
        out_ptr,
        numel,
        num_blocks,
        seed,
        step_size,
        decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        inverse_bias2_sqrt,
        eps,
        grad_factor,
        HAS_OUT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_SIZE: tl.constexpr,
    ):
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        offsets = rows[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        mask = offsets < numel
        in_rows = rows < num_blocks
        p = tl.load(master_ptr + offsets, mask=mask, other=0.0)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * grad_factor
        scale = tl.load(scales_ptr + rows, mask=in_rows, other=0.0)[:, None]
        sq_scale = tl.load(sq_scales_ptr + rows, mask=in_rows, other=0.0)[:, None]
        m = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.float32) / 127.0
        m = m * tl.abs(m) * scale
        v = tl.load(sq_codes_ptr + offsets, mask=mask, other=0).to(tl.float32) / 255.0
        v = v * v
        v = v * v * sq_scale

        m = m + one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        p = p * decay - step_size * (m / (tl.sqrt(v) * inverse_bias2_sqrt + eps))
        tl.store(master_ptr + offsets, p, mask=mask)
        if HAS_OUT:
            tl.store(out_ptr + offsets, p.to(out_ptr.dtype.element_ty), mask=mask)

        h = offsets.to(tl.uint32) ^ seed.to(tl.uint32)
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h = h ^ (h >> 16)
        chance = (h & 0xFFFF).to(tl.float32) / 65536.0
        sq_chance = (h >> 16).to(tl.float32) / 65536.0

        scale = tl.max(tl.abs(m), axis=1)
        sq_scale = tl.max(v, axis=1)
        tl.store(scales_ptr + rows, scale, mask=in_rows)
        tl.store(sq_scales_ptr + rows, sq_scale, mask=in_rows)
        ratio = tl.minimum(tl.abs(m) / tl.where(scale > 0, scale, 1.0)[:, None], 1.0)
        low = tl.minimum(tl.floor(tl.sqrt(ratio) * 127.0), 126.0)
        below, above = low / 127.0, (low + 1.0) / 127.0
        below, above = below * below, above * above
        code = low + tl.where(chance < (ratio - below) / (above - below), 1.0, 0.0)
        tl.store(codes_ptr + offsets, tl.where(m < 0, -code, code).to(tl.int8), mask=mask)
        ratio = tl.minimum(v / tl.where(sq_scale > 0, sq_scale, 1.0)[:, None], 1.0)
        low = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(ratio)) * 255.0), 254.0)
        below, above = low / 255.0, (low + 1.0) / 255.0
        below, above = below * below, above * above
        below, above = below * below, above * above
        code = low + tl.where(sq_chance < (ratio - below) / (above - below), 1.0, 0.0)
        code = tl.where(ratio > 0, tl.maximum(code, 1.0), code)
        tl.store(sq_codes_ptr + offsets, code.to(tl.uint8), mask=mask)


def adamw8bit(
    master: torch.Tensor,
    grad: torch.Tensor,
    moments: Moments,
    out: torch.Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_factor: float = 1.0,
    use_triton: bool | None = None,
) -> None:
    """Do one AdamW step on flat tensors with 8-bit moments, in place.

    Shapes: master [n] fp32, grad and out [n] any floating format, moments as `zero_moments(n)` gives them; contiguous.
    `step` counts from 1. `use_triton` None takes the kernel on a GPU and the reference elsewhere.

    Raises: ValueError where sizes or formats do not fit.
    """
    tensors = [master, grad, moments[0], moments[2], *([] if out is None else [out])]
    blocks = -(-master.numel() // BLOCK)
    if any(tensor.numel() != master.numel() or not tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"flat contiguous tensors of one size are needed, got {[tuple(t.shape) for t in tensors]}")
    formats = [master.dtype, *(tensor.dtype for tensor in moments)]
    if formats != [torch.float32, torch.int8, torch.float32, torch.uint8, torch.float32]:
        raise ValueError(f"master fp32 and moments int8, fp32, uint8, fp32 are needed, got {formats}")
    if moments[1].numel() != blocks or moments[3].numel() != blocks:
        raise ValueError(f"{blocks} scales are needed, got {moments[1].numel()} and {moments[3].numel()}")
    if use_triton is None:
        use_triton = triton is not None and master.is_cuda
    if not use_triton:
        adamw8bit_reference(
            master,
            grad,
            moments,
            out,
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_factor=grad_factor,
        )
        return
    _adamw8bit_kernel[(triton.cdiv(blocks, BLOCKS_A_PROGRAM),)](
        master,
        grad,
        *moments,
        master if out is None else out,
        master.numel(),
        blocks,
        _seed(step),
        lr / (1.0 - beta1**step),
        1.0 - lr * weight_decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        (1.0 - beta2**step) ** -0.5,
        eps,
        grad_factor,
        HAS_OUT=out is not None,
        ROWS=BLOCKS_A_PROGRAM,
        BLOCK_SIZE=BLOCK,
    )
