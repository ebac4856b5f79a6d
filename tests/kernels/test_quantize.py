"""Block-wise quantisation: the reference against its own formula, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from distui.kernels.quantize import LARGEST, Format, dequantize_blockwise, quantize_blockwise

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _x(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(numel)
    spread = torch.logspace(-4, 2, numel)
    return (torch.randn(numel, generator=generator) * spread).to(DEVICE, dtype)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("numel", [1, 63, 256, 700])
def test_int8_errs_by_half_a_step_of_its_block_at_most(use_triton: bool, numel: int) -> None:
    x = _x(numel)
    q, scales = quantize_blockwise(x, block=64, use_triton=use_triton)
    assert q.dtype == torch.int8 and q.numel() == numel and scales.numel() == -(-numel // 64)
    back = dequantize_blockwise(q, scales, block=64, use_triton=use_triton)
    step = scales.repeat_interleave(64)[:numel]
    assert ((back - x).abs() <= step * 0.5001).all()
    for index, part in enumerate(x.split(64)):
        assert scales[index].item() == pytest.approx(part.abs().max().item() / 127, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("numel", [1, 130, 515])
def test_the_kernel_gives_what_the_reference_gives(form: Format, dtype: torch.dtype, numel: int) -> None:
    x = _x(numel, dtype)
    expected, scales = quantize_blockwise(x, block=128, dtype=form, use_triton=False)
    q, found = quantize_blockwise(x, block=128, dtype=form, use_triton=True)
    torch.testing.assert_close(found, scales, rtol=0, atol=0)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    plain = dequantize_blockwise(q, scales, block=128, dtype=dtype, use_triton=False)
    kernel = dequantize_blockwise(q, scales, block=128, dtype=dtype, use_triton=True)
    # Triton's interpreter truncates to bf16 where the hardware rounds.
    torch.testing.assert_close(kernel, plain, rtol=torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0, atol=0)
    assert (plain - x).abs().max() <= x.abs().max() * (0.01 if form == "int8" else 0.07)


@pytest.mark.parametrize("use_triton", [False, True])
def test_every_fp8_number_survives(use_triton: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].to(DEVICE)  # all but the NaNs
    exact = codes.view(torch.float8_e4m3fn).float()
    q, scales = quantize_blockwise(exact, block=256, dtype="fp8", use_triton=use_triton)
    assert scales.tolist() == [1.0]
    assert torch.equal(q.view(torch.uint8), codes)
    assert torch.equal(dequantize_blockwise(q, scales, use_triton=use_triton), exact)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(form: Format, bad: float, use_triton: bool) -> None:
    x = _x(200)
    x[70] = bad
    q, scales = quantize_blockwise(x, block=64, dtype=form, use_triton=use_triton)
    back = dequantize_blockwise(q, scales, block=64, use_triton=use_triton)
    assert back[64:128].isnan().all()
    assert back[:64].isfinite().all() and back[128:].isfinite().all()


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_zeros_and_the_smallest_and_largest_numbers(form: Format, use_triton: bool) -> None:
    x = torch.zeros(96, device=DEVICE)
    x[32:64] = 1e-44
    x[64:] = torch.finfo(torch.float32).max
    back = dequantize_blockwise(
        *quantize_blockwise(x, block=32, dtype=form, use_triton=use_triton), block=32, use_triton=use_triton
    )
    assert not back[:32].any()
    assert (back[32:64].abs() <= 2e-42).all()
    torch.testing.assert_close(back[64:], x[64:], rtol=1e-6, atol=0)
    assert LARGEST[form] > 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="flat"):
        quantize_blockwise(torch.zeros(2, 2))
    q, scales = quantize_blockwise(torch.zeros(300))
    with pytest.raises(ValueError, match="need 2 scales"):
        dequantize_blockwise(q, scales[:1])
    empty = quantize_blockwise(torch.zeros(0))
    assert dequantize_blockwise(*empty).numel() == 0
