"""AdamW on a flat shard in one pass: unscale and clip the gradient, step the fp32 master, write the 16-bit weights.

    g  <- grad * grad_factor                      (loss scale and clipping coefficient, folded together)
    p  <- p * (1 - lr * weight_decay)
    m  <- beta1 * m + (1 - beta1) * g
    v  <- beta2 * v + (1 - beta2) * g^2
    p  <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    out <- p, rounded to out's format

Source: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, in the order of torch.optim.AdamW.
Bytes: 28 a parameter (read p, g, m, v; write p, m, v in fp32) and 2 for a 16-bit `out`.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

BLOCK = 1024


def fused_adamw_reference(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
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
    """The same in plain torch operations, in place."""
    scaled = grad.float() * grad_factor
    master.mul_(1.0 - lr * weight_decay)
    exp_avg.lerp_(scaled, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(scaled, scaled, value=1.0 - beta2)
    denominator = (exp_avg_sq / (1.0 - beta2**step)).sqrt_().add_(eps)
    master.addcdiv_(exp_avg, denominator, value=-lr / (1.0 - beta1**step))
    if out is not None:
        out.copy_(master)


if triton is not None:

    @triton.jit
    def _fused_adamw_kernel(
        master_ptr,
        grad_ptr,
        exp_avg_ptr,
        exp_avg_sq_ptr,
        out_ptr,
        numel,
        step_size,
        decay,
        beta1,
        beta2,
        inverse_bias2_sqrt,
        eps,
        grad_factor,
        HAS_OUT: tl.constexpr,
        BLOCK_SIZE: tl.constexpr,
    ):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offsets < numel
        p = tl.load(master_ptr + offsets, mask=mask)
        g = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32) * grad_factor
        m = tl.load(exp_avg_ptr + offsets, mask=mask)
        v = tl.load(exp_avg_sq_ptr + offsets, mask=mask)
        m = m + (1.0 - beta1) * (g - m)
        v = beta2 * v + (1.0 - beta2) * g * g
        denominator = tl.sqrt(v) * inverse_bias2_sqrt + eps
        p = p * decay - step_size * (m / denominator)
        tl.store(master_ptr + offsets, p, mask=mask)
        tl.store(exp_avg_ptr + offsets, m, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, v, mask=mask)
        if HAS_OUT:
            tl.store(out_ptr + offsets, p.to(out_ptr.dtype.element_ty), mask=mask)


def fused_adamw(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
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
    """Do one AdamW step on flat tensors, in place.

    Shapes: all [n] and contiguous; master, exp_avg, exp_avg_sq fp32; grad and out any floating format.
    `step` counts from 1. `use_triton` None takes the kernel on a GPU and the reference elsewhere.

    Raises: ValueError where sizes or formats do not fit.
    """
    states = (master, exp_avg, exp_avg_sq)
    tensors = [*states, grad] if out is None else [*states, grad, out]
    if any(tensor.numel() != master.numel() or not tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"flat contiguous tensors of one size are needed, got {[tuple(t.shape) for t in tensors]}")
    if any(tensor.dtype != torch.float32 for tensor in states):
        raise ValueError(f"master and moments must be float32, got {[str(tensor.dtype) for tensor in states]}")
    if use_triton is None:
        use_triton = triton is not None and master.is_cuda
    if not use_triton:
        fused_adamw_reference(
            master,
            grad,
            exp_avg,
            exp_avg_sq,
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
    _fused_adamw_kernel[(triton.cdiv(master.numel(), BLOCK),)](
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        master if out is None else out,
        master.numel(),
        lr / (1.0 - beta1**step),
        1.0 - lr * weight_decay,
        beta1,
        beta2,
        (1.0 - beta2**step) ** -0.5,
        eps,
        grad_factor,
        HAS_OUT=out is not None,
        BLOCK_SIZE=BLOCK,
    )
