"""The fused AdamW kernel and its reference against torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distui.kernels.fused_adamw import fused_adamw

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYPER: dict[str, Any] = {"lr": 3e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


def _tensors(numel: int, grad_dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(numel)
    start = torch.randn(numel, generator=generator).to(DEVICE)
    grads = [torch.randn(numel, generator=generator).to(DEVICE, grad_dtype) for _ in range(3)]
    return start, grads


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("numel", [1, 7, 1024, 2500])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_those_of_torch(use_triton: bool, numel: int, grad_dtype: torch.dtype) -> None:
    start, grads = _tensors(numel, grad_dtype)
    plain = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([plain], lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    master, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, grad in enumerate(grads, 1):
        plain.grad = grad.float() * 0.5
        optimizer.step()
        fused_adamw(master, grad, exp_avg, exp_avg_sq, step=step, grad_factor=0.5, use_triton=use_triton, **HYPER)
    torch.testing.assert_close(master, plain.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(exp_avg_sq, optimizer.state[plain]["exp_avg_sq"], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_written_within_one_ulp(use_triton: bool, out_dtype: torch.dtype) -> None:
    # One unit in the last place: Triton's interpreter truncates where the hardware rounds.
    master, (grad, *_) = _tensors(1500, torch.float32)
    out = torch.zeros(1500, dtype=out_dtype, device=DEVICE)
    moments = torch.zeros_like(master), torch.zeros_like(master)
    fused_adamw(master, grad, *moments, out, step=1, use_triton=use_triton, **HYPER)
    ulp = torch.finfo(out_dtype).eps
    torch.testing.assert_close(out.float(), master, atol=ulp * 1e-3, rtol=ulp)


def test_what_does_not_fit_is_refused() -> None:
    flat = torch.zeros(8)
    with pytest.raises(ValueError, match="one size"):
        fused_adamw(flat, torch.zeros(7), flat.clone(), flat.clone(), step=1, lr=0.1)
    with pytest.raises(ValueError, match="must be float32"):
        fused_adamw(flat.half(), flat, flat.clone(), flat.clone(), step=1, lr=0.1)
