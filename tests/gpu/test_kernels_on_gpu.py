"""The kernels, compiled, at sizes that matter, against torch's own on the same GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distui
from distui.core.model.kernel_swap import apply_kernels
from distui.kernels.adamw8bit import adamw8bit, adamw8bit_reference, zero_moments
from distui.kernels.fused_adamw import fused_adamw
from distui.kernels.l2_norm import l2_norm
from distui.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from distui.kernels.rms_norm import rms_norm, rms_norm_reference
from distui.kernels.rotary import rotary, rotary_reference
from distui.kernels.swiglu import swiglu, swiglu_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _new(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def _same(ours: Callable[..., Any], exact: Callable[..., Any], inputs: list[torch.Tensor]) -> None:
    dtype = inputs[0].dtype
    low = [x.clone().requires_grad_() for x in inputs]
    high = [x.double().requires_grad_() for x in inputs]
    found, expected = ours(*low), exact(*high)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(found, low, upstream.to(found.dtype))
    wanted = torch.autograd.grad(expected, high, upstream.to(found.dtype).double())
    for got, want in zip([found, *grads], [expected, *wanted], strict=True):
        error = torch.finfo(dtype).eps * (64 if dtype == torch.float32 else 4)
        torch.testing.assert_close(got.double(), want, rtol=error, atol=error * want.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_a_block(dtype: torch.dtype) -> None:
    for rows, width in ((1, 1), (7, 1000), (2048, 4096)):
        _same(
            lambda x, w: rms_norm(x, w, eps=1e-6),
            lambda x, w: rms_norm_reference(x, w, eps=1e-6),
            [_new(rows, width, dtype=dtype), _new(width, dtype=dtype, seed=1)],
        )
        _same(swiglu, swiglu_reference, [_new(rows, width, dtype=dtype), _new(rows, width, dtype=dtype, seed=1)])
    for heads, positions, dim in ((1, 1, 2), (3, 77, 6), (32, 512, 128)):
        cos, sin = _new(2, positions, dim, dtype=dtype, seed=2), _new(2, positions, dim, dtype=dtype, seed=3)
        _same(
            lambda x, cos=cos, sin=sin: rotary(x.transpose(1, 2), cos, sin),
            lambda x, cos=cos, sin=sin: rotary_reference(x.transpose(1, 2), cos.double(), sin.double()),
            [_new(2, positions, heads, dim, dtype=dtype)],
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss(dtype: torch.dtype, reduction: str) -> None:
    target = torch.randint(0, 3001, (300,), device="cuda")
    target[::5] = -100
    _same(
        lambda h, w, b: linear_cross_entropy(h, w, target, b, reduction=reduction),
        lambda h, w, b: linear_cross_entropy_reference(h, w, target, b, reduction=reduction),
        [_new(300, 64, dtype=dtype) * 0.2, _new(3001, 64, dtype=dtype, seed=1), _new(3001, dtype=dtype, seed=2)],
    )


def test_the_loss_saves_the_memory_of_the_logits() -> None:
    hidden, weight = _new(4096, 512).bfloat16().requires_grad_(), _new(32000, 512).bfloat16().requires_grad_()
    target = torch.randint(0, 32000, (4096,), device="cuda")
    peaks = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(hidden, weight, target), (hidden, weight))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < peaks[1] / 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_buffers(dtype: torch.dtype) -> None:
    for numel in (1, 1000, 1 << 22):
        x = _new(numel, dtype=dtype)
        norm = l2_norm(x)
        torch.testing.assert_close(norm.double(), x.double().norm(), rtol=1e-6, atol=0.0)
        assert all(torch.equal(norm, l2_norm(x)) for _ in range(3))
        start = _new(numel, seed=1)
        plain = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([plain], lr=1e-3, fused=True)
        master, moments = start.clone(), (torch.zeros_like(start), torch.zeros_like(start))
        narrow, reference = (zero_moments(numel, "cuda") for _ in range(2))
        masters8 = start.clone(), start.clone()
        hyper: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
        out = torch.empty(numel, dtype=dtype, device="cuda")
        for step in (1, 2, 3):
            plain.grad = x.float() * 0.5
            optimizer.step()
            fused_adamw(master, x, *moments, out, step=step, grad_factor=0.5, **hyper)
            adamw8bit(masters8[0], x, narrow, step=step, grad_factor=0.5, **hyper)
            adamw8bit_reference(masters8[1], x, reference, None, step=step, grad_factor=0.5, **hyper)
        torch.testing.assert_close(master, plain.detach(), atol=1e-6, rtol=1e-5)
        assert torch.equal(out, master.to(dtype))
        torch.testing.assert_close(masters8[0], masters8[1], atol=1e-4, rtol=1e-4)
        agree = (narrow[2].int() - reference[2].int()).abs() <= 1
        assert agree.float().mean() > 0.999


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.cuda().train()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_llama_with_kernels_gives_what_it_gave(compiled: bool) -> None:
    model = _llama()
    other = copy.deepcopy(model)
    report = apply_kernels(other)
    assert not report.left
    if compiled:
        for layer in other.model.layers:
            layer.compile(fullgraph=True)
    ids = torch.randint(0, 1000, (2, 100), device="cuda")
    grads = []
    for each in (model, other):
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([loss.detach(), *(param.grad for param in each.parameters())])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bits", [32, 8])
def test_an_engine_steps_by_the_kernels(bits: int) -> None:
    engine = distui.Engine(optimizer={"state_bits": bits}, precision={"dtype": "bf16"})
    model = _llama()
    model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    engine.use_kernels(model)
    assert optimizer.flat is not None
    ids = torch.randint(0, 1000, (2, 100), device="cuda")
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0
    assert F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) < losses[0]
