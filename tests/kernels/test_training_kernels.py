"""Each Triton kernel against its plain-torch reference, values and gradients; interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distui.kernels.adamw8bit import BLOCK, adamw8bit, dequantize_moments, quantize_moments, zero_moments
from distui.kernels.l2_norm import l2_norm
from distui.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from distui.kernels.rms_norm import rms_norm, rms_norm_reference
from distui.kernels.rotary import rotary, rotary_reference
from distui.kernels.swiglu import swiglu, swiglu_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULPS = {torch.float32: 40.0, torch.bfloat16: 2.5, torch.float16: 2.5}
"""Allowed error in units in the last place; the interpreter truncates where hardware rounds."""


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return numbers that every format holds exactly."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return ((x * 64).round() / 64).to(DEVICE)


def _check(
    operation: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Compare values and gradients with the reference's in fp64."""
    exact = [x.double().requires_grad_() for x in inputs]
    expected = reference(*exact)
    upstream = _random(*expected.shape, seed=9)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    low = [x.to(dtype).requires_grad_() for x in inputs]
    found = operation(*low)
    grads = torch.autograd.grad(found, low, upstream.to(found.dtype))
    for got, want in zip([found, *grads], [expected, *expected_grads], strict=True):
        error = torch.finfo(dtype).eps * ULPS[dtype]
        largest = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=error, atol=error * max(largest, 0.1))
    assert all(grad.dtype == dtype for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_norm(dtype: torch.dtype) -> None:
    for numel in (1, 7, 4096, 9001):
        x = _random(numel).to(dtype)
        found = l2_norm(x, use_triton=True)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), x.double().norm(), rtol=1e-6, atol=0.0)
        assert torch.equal(found, l2_norm(x, use_triton=True))
        torch.testing.assert_close(l2_norm(x), found, rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match="contiguous"):
        l2_norm(torch.zeros(4, 4, device=DEVICE).t()[:2], use_triton=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, False), (1.0, False), (0.0, True)])
def test_rms_norm(dtype: torch.dtype, offset: float, round_first: bool) -> None:
    for shape in ((1, 1), (5, 37), (2, 3, 64)):
        _check(
            lambda x, w: rms_norm(x, w, eps=1e-5, offset=offset, round_first=round_first, use_triton=True),
            lambda x, w: rms_norm_reference(x, w, eps=1e-5, offset=offset),
            [_random(*shape), _random(shape[-1], seed=1)],
            dtype,
        )


def test_rms_norm_is_torchs() -> None:
    x, weight = _random(4, 37), _random(37, seed=1)
    expected = F.rms_norm(x, (37,), weight, 1e-6)
    for use_triton in (None, True):
        torch.testing.assert_close(rms_norm(x, weight, eps=1e-6, use_triton=use_triton), expected)
        bare = rms_norm(x, None, eps=1e-6, use_triton=use_triton)
        torch.testing.assert_close(bare, F.rms_norm(x, (37,), None, 1e-6))
    _check(
        lambda x: rms_norm(x, None, eps=1e-6, use_triton=True),
        lambda x: rms_norm_reference(x, None, eps=1e-6),
        [x],
        torch.float32,
    )
    with pytest.raises(ValueError, match="weight of shape"):
        rms_norm(x, weight[:5], eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    for shape in ((1,), (3, 37), (1030,)):
        inputs = [_random(*shape, scale=2.0), _random(*shape, seed=1)]
        _check(lambda gate, up: swiglu(gate, up, use_triton=True), swiglu_reference, inputs, dtype)
    # Halves of one projection, read in place.
    _check(
        lambda both: swiglu(*both.chunk(2, -1), use_triton=True),
        lambda both: swiglu_reference(*both.chunk(2, -1)),
        [_random(2, 3, 74)],
        dtype,
    )
    with pytest.raises(ValueError, match="gate is"):
        swiglu(torch.zeros(3), torch.zeros(4))


def _tables(batch: int, positions: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Not symmetric in the halves, so that a backward that takes the wrong half is seen.
    return _random(batch, positions, dim, seed=3), _random(batch, positions, dim, seed=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype: torch.dtype) -> None:
    for batch, heads, positions, dim in ((1, 1, 1, 2), (2, 3, 5, 6), (2, 4, 3, 16)):
        for head_dim, table_batch in ((1, 1), (2, batch)):
            cos, sin = _tables(table_batch, positions, dim)
            # As attention has it: [batch, positions, heads, dim] in memory, seen transposed.
            x = _random(batch, positions, heads, dim)

            def run(x: torch.Tensor, operation: Any, head_dim: int = head_dim, **options: Any) -> Any:
                return operation(x.transpose(1, 2) if head_dim == 1 else x, *options["tables"], head_dim)

            low = (cos.to(dtype), sin.to(dtype))
            _check(
                lambda x, low=low, run=run: run(x, lambda *a: rotary(*a, use_triton=True), tables=low),
                lambda x, low=low, run=run: run(x, rotary_reference, tables=(low[0].double(), low[1].double())),
                [x],
                dtype,
            )
    with pytest.raises(ValueError, match="cos is"):
        rotary(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype: torch.dtype, reduction: str, use_triton: bool) -> None:
    rows, width, classes = 7, 6, 13
    target = torch.tensor([3, -100, 12, 0, 5, 12, -100], device=DEVICE)
    inputs = [_random(rows, width), _random(classes, width, seed=1), _random(classes, seed=2)]
    if dtype is not torch.float32:
        inputs = [x * 0.25 for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    low = [x.to(dtype).requires_grad_() for x in inputs]

    def run(function: Any, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        hidden, weight, bias = tensors
        loss = function(hidden, weight, target, bias, reduction=reduction, **options)
        upstream = torch.arange(1.0, 1.0 + loss.numel(), device=DEVICE).to(loss.dtype).view(loss.shape) * 3
        return [loss, *torch.autograd.grad(loss, tensors, upstream)]

    expected = run(linear_cross_entropy_reference, exact)
    for chunk_rows in (3, None):
        found = run(linear_cross_entropy, low, chunk_rows=chunk_rows, use_triton=use_triton)
        for got, want in zip(found, expected, strict=True):
            error = max(torch.finfo(dtype).eps * 4, 3e-6)
            torch.testing.assert_close(got.double(), want, rtol=error, atol=error * want.abs().max().item())
    with torch.no_grad():
        loss = linear_cross_entropy(low[0], low[1], target, low[2], reduction=reduction, use_triton=use_triton)
    torch.testing.assert_close(loss, found[0])


def test_linear_cross_entropy_at_its_edges() -> None:
    hidden, weight = _random(4, 3).requires_grad_(), _random(5, 3, seed=1)
    ignored = torch.full((4,), -1, device=DEVICE)
    for use_triton in (False, True):
        # Nothing counts: NaN, as in torch; frozen weights get no gradient.
        assert linear_cross_entropy(hidden, weight, ignored, ignore_index=-1, use_triton=use_triton).isnan()
        total = linear_cross_entropy(hidden, weight, ignored, ignore_index=-1, reduction="sum", use_triton=use_triton)
        assert total.item() == 0.0
        assert torch.equal(torch.autograd.grad(total, hidden)[0], torch.zeros_like(hidden))
    outside = torch.tensor([0, 1, 2, 5], device=DEVICE)
    assert linear_cross_entropy(hidden, weight, outside, use_triton=True).isnan()
    with pytest.raises(ValueError, match="reduction='max'"):
        linear_cross_entropy(hidden, weight, ignored, reduction="max")
    with pytest.raises(ValueError, match="are needed"):
        linear_cross_entropy(hidden, weight.t(), ignored)


def test_the_loss_never_holds_all_logits() -> None:
    rows, width, classes = 256, 8, 512
    held: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                held.append(result.numel())
            return result

    hidden, weight = _random(rows, width).requires_grad_(), _random(classes, width, seed=1).requires_grad_()
    target = torch.arange(rows, device=DEVICE)
    with Watch():
        linear_cross_entropy(hidden, weight, target).backward()
    assert max(held) <= rows * classes // 32


# ---- AdamW with 8-bit states -------------------------------------------------------------------------------------


HYPER: dict[str, Any] = {"lr": 3e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


def test_moments_come_back_within_their_steps() -> None:
    m = _random(1000) * torch.logspace(-6, 0, 1000, device=DEVICE)
    v = m.square()
    scale = torch.nn.functional.pad(m.abs(), (0, 24)).view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)[:1000]
    found = [dequantize_moments(quantize_moments(m, v, step)) for step in range(1, 201)]
    means = [torch.stack(values).mean(0) for values in zip(*found, strict=True)]
    # A code's neighbours: 2 sqrt(r) / 127 and 4 r^(3/4) / 255 of the scale, and the random choice is right on average.
    step_m = (2 * (m.abs() / scale).sqrt() / 127 + 127**-2) * scale
    step_v = (4 * (v / scale**2) ** 0.75 / 255 + 8 * (v / scale**2).sqrt() / 255**2 + 255**-4.0) * scale**2 * 1.1
    for got_m, got_v in found[:3]:
        assert ((got_m - m).abs() <= step_m).all()
        assert ((got_v - v).abs() <= step_v).all()
        assert ((got_v > 0) == (v > 0)).all()
    assert ((means[0] - m).abs() <= 0.25 * step_m).all()
    big = v / scale**2 > 255**-4.0 * 2
    assert ((means[1] - v).abs() <= 0.25 * step_v)[big].all()


@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_the_8_bit_kernel_steps_as_its_reference(grad_dtype: torch.dtype) -> None:
    for numel, out_dtype in ((1, None), (255, torch.bfloat16), (1500, torch.float16)):
        start = _random(numel)
        found = []
        for use_triton in (False, True):
            master, moments = start.clone(), zero_moments(numel, DEVICE)
            out = None if out_dtype is None else torch.zeros(numel, dtype=out_dtype, device=DEVICE)
            for step in (1, 2, 3):
                grad = _random(numel, seed=step).to(grad_dtype)
                adamw8bit(master, grad, moments, out, step=step, grad_factor=0.5, use_triton=use_triton, **HYPER)
            found.append((master, moments, out))
        (master, moments, out), (master_t, moments_t, out_t) = found
        # A code may flip where a chance is met to the last bit; the next steps then differ by that.
        same = [(a.int() == b.int()).float().mean().item() for a, b in ((moments[i], moments_t[i]) for i in (0, 2))]
        assert min(same) > 0.99 - 1.0 / numel
        torch.testing.assert_close(moments[1], moments_t[1], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(master, master_t, rtol=1e-4, atol=1e-4)
        if out is not None and out_t is not None:
            torch.testing.assert_close(out_t.float(), master_t, rtol=torch.finfo(out.dtype).eps, atol=1e-5)


def test_8_bit_states_step_nearly_as_full_ones() -> None:
    target = _random(600)
    plain = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = torch.optim.AdamW([plain], lr=0.01, betas=(0.9, 0.999), weight_decay=0.01)
    master, moments = torch.zeros_like(target), zero_moments(600, DEVICE)
    for step in range(1, 301):
        noise = 0.5 * _random(600, seed=step)
        plain.grad = plain.detach() - target + noise
        optimizer.step()
        adamw8bit(master, master - target + noise, moments, step=step, lr=0.01)
    exact, found = ((x.detach() - target).square().mean().item() for x in (plain, master))
    assert found < exact * 1.05
    assert sum(t.numel() * t.element_size() for t in moments) * 3.9 < 8 * 600 * 1.1


def test_8_bit_tensors_that_do_not_fit_are_refused() -> None:
    flat = torch.zeros(300)
    with pytest.raises(ValueError, match="one size"):
        adamw8bit(flat, torch.zeros(7), zero_moments(300), step=1, lr=0.1)
    with pytest.raises(ValueError, match="2 scales"):
        adamw8bit(flat, flat, (*zero_moments(300)[:3], torch.zeros(1)), step=1, lr=0.1)
    with pytest.raises(ValueError, match="uint8"):
        adamw8bit(flat.half(), flat, zero_moments(300), step=1, lr=0.1)
