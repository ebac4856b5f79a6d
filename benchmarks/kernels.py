"""Bytes a second of each kernel beside a measured copy, and its time beside torch's own. Needs an NVIDIA GPU.

    python benchmarks/kernels.py [--only rms_norm,rotary] [--dtype bf16] [--numel 67108864] [--rounds 30]

"of copy" is the kernel's bytes (what it must read and write, as its file says) a second, over what copying a buffer of
256 MiB reaches in the same run; the goal is 90% where memory is the limit. "torch" is the time of torch's own fused way
over ours: above 1 ours is faster. Where torch has none, its eager operations stand there, marked with an asterisk.
Medians of single launches between CUDA events, with a flushed cache; variants are interleaved.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROTARY = (32, 128)
"""Heads and width of a head."""
WIDTH = 4096
VOCABULARY = 32000


@dataclass
class Case:
    """One operation: ours, torch's, and the bytes it cannot do without."""

    name: str
    nbytes: int
    ours: Callable[[], object]
    theirs: Callable[[], object] | None
    eager: bool = False
    """Torch has no fused way: its plain operations are timed."""
    bound: str = "memory"


def cases(args: argparse.Namespace) -> list[Case]:
    """Return all operations at the asked size."""
    import torch
    import torch.nn.functional as F

    from distui.kernels.adamw8bit import adamw8bit, zero_moments
    from distui.kernels.fused_adamw import fused_adamw
    from distui.kernels.l2_norm import l2_norm
    from distui.kernels.linear_cross_entropy import cross_entropy_rows_, linear_cross_entropy
    from distui.kernels.rms_norm import rms_norm
    from distui.kernels.rotary import rotary, rotary_reference
    from distui.kernels.swiglu import swiglu, swiglu_reference

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    size, n = dtype.itemsize, args.numel
    device = torch.device("cuda")

    def new(*shape: int, dtype: Any = dtype, grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=grad)

    found: list[Case] = []

    # ---- the optimizer -------------------------------------------------------------------------------------------
    master, grad = new(n, dtype=torch.float32), new(n, dtype=torch.float32)
    moments = torch.zeros_like(master), torch.zeros_like(master)
    out = torch.empty(n, dtype=dtype, device=device)
    param = torch.nn.Parameter(master.clone())
    param.grad = grad
    optimizer = torch.optim.AdamW([param], lr=1e-4, fused=True)

    def torch_step() -> None:
        optimizer.step()
        out.copy_(param.detach())

    hyper: dict[str, Any] = {"step": 10, "lr": 1e-4}
    found.append(
        Case("fused_adamw", n * (28 + size), lambda: fused_adamw(master, grad, *moments, out, **hyper), torch_step)
    )
    small = zero_moments(n, device)
    found.append(
        Case("adamw8bit", int(n * (16.0625 + size)), lambda: adamw8bit(master, grad, small, out, **hyper), torch_step)
    )
    holder = torch.nn.Parameter(torch.zeros(n, device=device))
    holder.grad = grad
    found.append(
        Case("l2_norm", n * 4, lambda: l2_norm(grad), lambda: torch.nn.utils.get_total_norm([grad], foreach=True))
    )
    found.append(
        Case(
            "l2_norm, and clipping with it",
            n * 4,
            lambda: l2_norm(grad),  # the factor is applied inside fused_adamw
            lambda: torch.nn.utils.clip_grad_norm_([holder], 1e9, foreach=True),
        )
    )

    # ---- blocks --------------------------------------------------------------------------------------------------
    def both(name: str, nbytes: tuple[int, int], ours: Any, theirs: Any, inputs: list[Any], eager: bool) -> None:
        """Add the forward, and the backward alone."""
        found.append(Case(name, nbytes[0], lambda: ours(*inputs), lambda: theirs(*inputs), eager))
        results = [function(*inputs) for function in (ours, theirs)]
        upstream = torch.randn_like(results[0])
        needing = [x for x in inputs if x.requires_grad]

        def backward(result: torch.Tensor) -> Callable[[], object]:
            return lambda: torch.autograd.grad(result, needing, upstream, retain_graph=True)

        found.append(Case(f"{name}, backward", nbytes[1], *(backward(result) for result in results), eager))

    rows = n // WIDTH
    x, weight = new(rows, WIDTH, grad=True), new(WIDTH, grad=True)
    both(
        "rms_norm",
        (2 * n * size, 3 * n * size),
        lambda x, w: rms_norm(x, w, eps=1e-6),
        lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-6),
        [x, weight],
        False,
    )
    gate, up = new(n, grad=True), new(n, grad=True)
    both("swiglu", (3 * n * size, 5 * n * size), swiglu, swiglu_reference, [gate, up], True)
    heads, width = ROTARY
    positions = n // (heads * width)
    states = new(1, positions, heads, width, grad=True)
    cos, sin = new(1, positions, width), new(1, positions, width)
    table = 2 * positions * width * size
    both(
        "rotary",
        (2 * n * size + table,) * 2,
        lambda q: rotary(q.transpose(1, 2), cos, sin),
        lambda q: rotary_reference(q.transpose(1, 2), cos, sin),
        [states],
        True,
    )

    # ---- the loss ------------------------------------------------------------------------------------------------
    tokens = max(n // VOCABULARY // 2, 1)
    logits = new(tokens, VOCABULARY)
    target = torch.randint(VOCABULARY, (tokens,), device=device)
    logits_grad = logits.clone().requires_grad_()

    def torch_rows() -> object:
        return torch.autograd.grad(F.cross_entropy(logits_grad.float(), target), logits_grad)

    found.append(
        Case("cross_entropy rows, forward and backward", 3 * logits.numel() * size,
             lambda: cross_entropy_rows_(logits, target), torch_rows)
    )  # fmt: skip
    hidden, head = new(tokens, WIDTH, grad=True), (new(VOCABULARY, WIDTH) * 0.02).requires_grad_()

    def torch_loss() -> object:
        loss = F.cross_entropy((hidden @ head.t()).float(), target)
        return torch.autograd.grad(loss, (hidden, head))

    found.append(
        Case("linear_cross_entropy, forward and backward", 0,
             lambda: torch.autograd.grad(linear_cross_entropy(hidden, head, target), (hidden, head)),
             torch_loss, bound="matrix products")
    )  # fmt: skip
    return [*found, *_wire_cases(grad, n)]


def _wire_cases(x: Any, n: int) -> list[Case]:
    """Return the formats of compressed communication, where this version has them."""
    import torch

    found: list[Case] = []
    if importlib.util.find_spec("distui.kernels.quantize") is not None:
        quantize = importlib.import_module("distui.kernels.quantize")
        for form in ("int8", "fp8"):
            codes, scales = quantize.quantize_blockwise(x, 256, form)
            nbytes = n * 5 + n // 64
            out = torch.empty_like(x)
            found.append(
                Case(f"quantize {form}", nbytes, lambda form=form: quantize.quantize_blockwise(x, 256, form), None)
            )
            found.append(
                Case(
                    f"dequantize {form}",
                    nbytes,
                    lambda codes=codes, scales=scales, out=out: quantize.dequantize_blockwise(codes, scales, out),
                    None,
                )
            )
    if importlib.util.find_spec("distui.kernels.onebit") is not None:
        onebit = importlib.import_module("distui.kernels.onebit")
        error, out = torch.zeros_like(x), torch.empty_like(x)
        bits, scale = onebit.compress_onebit(x, error)
        found += [
            Case("pack_signs", n * 4 + n // 8, lambda: onebit.pack_signs(x), None),
            Case("unpack_signs", n * 4 + n // 8, lambda: onebit.unpack_signs(bits, n, scale, out), None),
            # Twice through x and the error: the scale is known only after the first.
            Case("compress_onebit", n * 20 + n // 8, lambda: onebit.compress_onebit(x, error), None),
        ]
    return found


def timed(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return each function's median time in seconds, in turns, each after a flush of the cache."""
    import torch

    flush = torch.empty(1 << 26, dtype=torch.int32, device="cuda")
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 3):
        for function, found in zip(functions, times, strict=True):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            if round_ >= 3:  # the first compile
                found.append(begin.elapsed_time(end) / 1e3)
    return [statistics.median(found) for found in times]


def main() -> int:
    """Print the table; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that must occur in the operation's, with commas between")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="format of weights")
    parser.add_argument("--numel", type=int, default=1 << 26, help="elements of a tensor")
    parser.add_argument("--rounds", type=int, default=30, help="launches of each")
    parser.add_argument("--json", action="store_true", help="the figures once more as the last line, as JSON")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(
            "benchmarks/kernels.py needs an NVIDIA GPU\n"
            f"torch {torch.__version__} finds none on this machine, and interpreted kernels have no speed to measure\n"
            "run it where nvidia-smi lists one, with torch built for CUDA and `pip install distui[gpu]`",
            file=sys.stderr,
        )
        return 2
    if importlib.util.find_spec("triton") is None:
        print("no Triton\nthe kernels are Triton's\npip install distui[gpu]", file=sys.stderr)
        return 2
    if args.numel < WIDTH * VOCABULARY // 64 or args.numel % WIDTH:
        print(
            f"--numel {args.numel} does not fit\nrows of {WIDTH} and a vocabulary of {VOCABULARY} are laid out in it\n"
            f"give a multiple of {WIDTH}, at least {WIDTH * VOCABULARY // 64}",
            file=sys.stderr,
        )
        return 2
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (copy_s,) = timed([lambda: target.copy_(source)], args.rounds)
    copy_rate = 2 * source.numel() / copy_s
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.numel} elements, {args.dtype}")
    print(f"copy of 256 MiB: {copy_rate / 1e12:.2f} TB/s")
    print(f"{'':44}{'us':>10}{'TB/s':>8}{'of copy':>9}{'torch':>8}")
    wanted = [word for word in args.only.split(",") if word]
    chosen = [case for case in cases(args) if not wanted or any(word in case.name for word in wanted)]
    figures = []
    for case in chosen:
        ours_s, *theirs_s = timed([case.ours, *([case.theirs] if case.theirs else [])], args.rounds)
        rate = (
            f"{case.nbytes / ours_s / 1e12:8.2f}{case.nbytes / ours_s / copy_rate:9.0%}" if case.nbytes else f"{'':17}"
        )
        versus = f"{theirs_s[0] / ours_s:7.2f}{'*' if case.eager else ' '}" if theirs_s else f"{'n/a':>7} "
        note = "" if case.bound == "memory" else f"  ({case.bound})"
        print(f"{case.name:44}{ours_s * 1e6:10.1f}{rate}{versus}{note}")
        of_copy = case.nbytes / ours_s / copy_rate if case.nbytes else None
        versus_torch = theirs_s[0] / ours_s if theirs_s else None
        figures.append({"name": case.name, "us": ours_s * 1e6, "of_copy": of_copy, "torch": versus_torch})
    if args.json:
        print(json.dumps(figures))
    return 0 if chosen else 2


if __name__ == "__main__":
    sys.exit(main())
