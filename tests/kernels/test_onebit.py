"""Packed signs and error feedback: the reference against its formula, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from distui.kernels.onebit import compress_onebit, pack_signs, unpack_signs

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1, 7, 8, 65, 1030]


def _x(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", SIZES)
def test_signs_come_back(numel: int, dtype: torch.dtype, use_triton: bool) -> None:
    x = _x(numel, dtype)
    x[0] = 0.0
    bits = pack_signs(x, use_triton=use_triton)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-numel // 8)
    for index in range(min(numel, 20)):
        assert (int(bits[index // 8]) >> (index % 8)) & 1 == int(x[index] >= 0)
    if numel % 8:
        assert int(bits[-1]) >> (numel % 8) == 0
    back = unpack_signs(bits, numel, 0.5, use_triton=use_triton)
    assert torch.equal(back, torch.where(x >= 0, 0.5, -0.5).float())
    out = torch.empty(numel, dtype=dtype, device=DEVICE)
    scales = torch.arange(1.0, 2.0 + (numel - 1) // 16, device=DEVICE)
    unpack_signs(bits, numel, scales, out=out, block=16, use_triton=use_triton)
    assert torch.equal(out.abs(), scales.repeat_interleave(16)[:numel].to(dtype))


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("numel", SIZES)
def test_what_is_sent_and_what_is_kept_add_up(
    numel: int, block: int | None, dtype: torch.dtype, use_triton: bool
) -> None:
    x, error = _x(numel, dtype), _x(numel, seed=1)
    corrected = x.float() + error
    bits, scale = compress_onebit(x, error, block, use_triton=use_triton)
    sent = unpack_signs(bits, numel, scale, block=block, use_triton=use_triton)
    torch.testing.assert_close(sent + error, corrected, atol=1e-6, rtol=1e-6)
    for index, part in enumerate(corrected.split(block or numel)):
        assert scale[index].item() == pytest.approx(part.abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("use_triton", [False, True])
def test_over_time_everything_arrives(use_triton: bool) -> None:
    """The mean of what was sent goes to the mean of what was given, which signs alone cannot do."""
    x, error, total = _x(65), torch.zeros(65, device=DEVICE), torch.zeros(65, device=DEVICE)
    steps = 300
    for _ in range(steps):
        bits, scale = compress_onebit(x, error, use_triton=use_triton)
        total += unpack_signs(bits, 65, scale, use_triton=use_triton)
    assert (total / steps - x).abs().max() < 0.25
    assert (torch.sign(x) * x.abs().mean() - x).abs().max() > 0.5


@pytest.mark.parametrize("use_triton", [False, True])
def test_what_is_not_finite_is_not_hidden(use_triton: bool) -> None:
    x = _x(200)
    x[70] = float("nan")
    bits, scale = compress_onebit(x, torch.zeros(200, device=DEVICE), 64, use_triton=use_triton)
    back = unpack_signs(bits, 200, scale, block=64, use_triton=use_triton)
    assert back[64:128].isnan().all() and back[:64].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="flat"):
        pack_signs(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="need 2 bytes"):
        unpack_signs(torch.zeros(1, dtype=torch.uint8), 9, 1.0)
    with pytest.raises(ValueError, match="fp32 error of 9"):
        compress_onebit(torch.zeros(9), torch.zeros(8))
