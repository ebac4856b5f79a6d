"""All that needs a GPU, in one run of under 8 minutes: `make gpu`. Prints JSON, then rows for docs/performance.md.

    python benchmarks/gpu [--parts tests parity kernels llama largest] [--minutes 7.5] [--out figures.json]
    python benchmarks/gpu --device cpu --tiny        the same code on two CPU ranks, at sizes that say nothing

    tests     tests/gpu: the kernels, compiled, against torch's operations
    parity    stages 0 to 3, and offload, on all GPUs over NCCL, against plain torch on one: weights after five steps
    kernels   benchmarks/kernels.py: bytes a second to a copy's, time to torch's fused ways
    llama     a Llama-like model of 1B in bf16: tokens/s, MFU and peak memory under DDP, FSDP2, DeepSpeed and our stages
    largest   stage 3 with everything at home in host memory: deeper models, until one does not train

Variants run one after the other, each on all GPUs in processes of its own. What time does not allow is left out, and
the figures say so. MFU counts 6 FLOPs a parameter and token (embeddings aside) and 6 x layers x width x length for
causal attention, over the datasheet's dense rate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_ranks import count_params

ROOT = Path(__file__).parents[2]
PARTS = ("tests", "parity", "kernels", "llama", "largest")
SHAPES: dict[str, dict[str, int]] = {
    "parity": {"layers": 4, "dim": 256, "ffn": 512, "heads": 4, "vocab": 512, "batch": 8, "seq": 64},
    "llama": {"layers": 16, "dim": 2048, "ffn": 5632, "heads": 16, "vocab": 32000, "batch": 4, "seq": 2048},
    "largest": {"layers": 5, "dim": 4096, "ffn": 11008, "heads": 32, "vocab": 32000, "batch": 1, "seq": 1024},
}
TINY = {"layers": 2, "dim": 32, "ffn": 48, "heads": 2, "vocab": 64, "batch": 4, "seq": 8}
DEPTHS = (5, 10, 20, 30, 40, 60, 80, 120, 160)
HOST_BYTES_PER_PARAMETER = 18
"""Master 4, moments 8, gradient 4, weights 2."""
VARIANTS = ("ddp", "fsdp2", "deepspeed3", "stage0", "stage1", "stage2", "stage3", "stage2_cpu")


class NoTimeError(RuntimeError):
    """A measurement that is left out."""


class Run:
    """One call: what it is asked, and until when."""

    def __init__(self, options: argparse.Namespace, world: int, folder: Path) -> None:
        self.options, self.world, self.folder = options, world, folder
        self._end = time.monotonic() + options.minutes * 60

    @property
    def left_s(self) -> float:
        """Seconds until the end."""
        return self._end - time.monotonic()

    def shape(self, part: str) -> dict[str, int]:
        """Return the sizes of the part's model."""
        return dict(TINY if self.options.tiny else SHAPES[part])

    def ranks(
        self, part: str, shape: dict[str, int], variant: str = "", limit_s: float = 120.0
    ) -> list[dict[str, Any]]:
        """Run a worker on every GPU, and return what each found.

        Raises: RuntimeError with the end of the log of a rank that failed; NoTimeError.
        """
        limit_s = min(limit_s, self.left_s)
        if limit_s < (5.0 if self.options.tiny else 15.0):
            raise NoTimeError("no time")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        result = Path(tempfile.mkdtemp(dir=self.folder))
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(self.world)}
        environment |= {"LOCAL_WORLD_SIZE": str(self.world), "PYTHONPATH": str(ROOT)}
        if self.options.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "benchmarks/gpu/gpu_ranks.py"), part, f"--device={self.options.device}"]
        command += [f"--shape={json.dumps(shape)}", f"--result={result}", f"--variant={variant}"]
        command += [f"--steps={2 if self.options.tiny else 8}"]
        processes = []
        for rank in range(self.world):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(result / f"{rank}.log", "w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=own, cwd=ROOT))
        end = time.monotonic() + limit_s
        try:
            for process in processes:
                process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise NoTimeError(f"not done in {limit_s:.0f} s") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for rank, process in enumerate(processes):
            if process.returncode:
                raise RuntimeError((result / f"{rank}.log").read_text().strip()[-600:] or f"exit {process.returncode}")
        return [json.loads((result / f"{rank}.json").read_text()) for rank in range(self.world)]


def tests(run: Run) -> Any:
    """Run tests/gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(run.left_s, 1), check=False
    )
    lines = done.stdout.strip().splitlines()
    return {"ok": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-300:]}


def parity(run: Run) -> Any:
    """Compare every placement with plain torch."""
    return run.ranks("parity", run.shape("parity"))[0]


def kernels(run: Run) -> Any:
    """Measure the kernels on one GPU."""
    if run.options.device == "cpu":
        return {"left_out": "interpreted kernels have no speed to measure"}
    command = [sys.executable, str(ROOT / "benchmarks/kernels.py"), "--json", "--rounds", "20"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(run.left_s, 1), check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-600:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def llama(run: Run) -> Any:
    """Measure all variants, one after the other."""
    found: dict[str, Any] = {}
    for variant in run.options.variants:
        if variant == "deepspeed3" and importlib.util.find_spec("deepspeed") is None:
            found[variant] = {"left_out": "deepspeed is not installed"}
            continue
        try:
            ranks = run.ranks("llama", run.shape("llama"), variant, 75.0)
        except NoTimeError as error:
            found[variant] = {"left_out": str(error)}
            continue
        except RuntimeError as error:
            found[variant] = {"failed": str(error)}
            continue
        found[variant] = ranks[0] | {
            "tokens_per_s": sum(rank["tokens_per_s"] for rank in ranks),
            "peak_bytes": max((rank["peak_bytes"] or 0) for rank in ranks) or None,
        }
    return found


def largest(run: Run) -> Any:
    """Train deeper and deeper models; the last that did, and what ended it."""
    import psutil

    found: dict[str, Any] = {}
    for depth in (2, 4) if run.options.tiny else DEPTHS:
        shape = run.shape("largest") | {"layers": depth}
        num_params = count_params(shape)
        needed, free = num_params * HOST_BYTES_PER_PARAMETER, psutil.virtual_memory().available
        if needed > 0.9 * free:
            return found | {
                "ended": f"{num_params:,} parameters need {needed:,} bytes of host memory, {free:,} are free"
            }
        began = time.monotonic()
        try:
            ranks = run.ranks("largest", shape, limit_s=run.left_s)
        except RuntimeError as error:
            return found | {"ended": str(error)}
        found = ranks[0] | {"params": num_params, "layers": depth, "wall_s": time.monotonic() - began}
        if run.left_s < 2.2 * found["wall_s"]:
            return found | {"ended": "time"}
    return found | {"ended": "the end of the list"}


def rows(found: dict[str, Any]) -> list[str]:
    """Return the figures as rows of docs/performance.md."""
    lines = [f"{found['device']} x {found['world']}, torch {found['torch']}", ""]
    parts = found["parts"]
    if errors := parts.get("parity"):
        lines += ["| placement | error, of the weights' movement |", "|---|---|"]
        lines += [f"| {name} | {row['error']:.1e} |" for name, row in errors.items() if isinstance(row, dict)]
    if variants := parts.get("llama"):
        lines += ["", "| Llama-like 1B, bf16 | tokens/s | MFU | peak memory, GiB |", "|---|---|---|---|"]
        for name, row in variants.items():
            if not isinstance(row, dict) or "tokens_per_s" not in row:
                lines.append(f"| {name} | - | - | - |")
                continue
            mfu = f"{row['mfu']:.1%}" if row["mfu"] else "n/a"
            peak = f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "n/a"
            lines.append(f"| {name} | {row['tokens_per_s']:,.0f} | {mfu} | {peak} |")
    if isinstance(measured := parts.get("kernels"), list):
        lines += ["", "| kernel | us | of copy | torch's time to ours |", "|---|---|---|---|"]
        for row in measured:
            share = f"{row['of_copy']:.0%}" if row["of_copy"] else "n/a"
            versus = f"{row['torch']:.2f}" if row["torch"] else "n/a"
            lines.append(f"| {row['name']} | {row['us']:.1f} | {share} | {versus} |")
    if "params" in (most := parts.get("largest") or {}):
        lines += ["", "| largest model, all at home on the host | step, s | ended by |", "|---|---|---|"]
        lines.append(f"| {most['params'] / 1e9:.2f}B | {most['step_s']:.1f} | {str(most['ended'])[:80]} |")
    return lines


def main() -> int:
    """Print figures and rows; 2 where there is no GPU, 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of llama")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--out", type=Path, default=None, help="a file for the JSON, beside standard output")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} finds none on this machine", file=sys.stderr)
        return 2
    cuda = options.device == "cuda"
    world = torch.cuda.device_count() if cuda else 2
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "world": world,
        "torch": torch.__version__,
        "collectives": "nccl" if cuda and world > 1 else "none: one GPU" if cuda else "gloo",
        "tiny": options.tiny,
        "parts": {},
    }
    with tempfile.TemporaryDirectory(prefix="distui-gpu-") as folder:
        run = Run(options, world, Path(folder))
        for part in options.parts:
            began = time.monotonic()
            try:
                found["parts"][part] = globals()[part](run)
            except (NoTimeError, subprocess.TimeoutExpired) as error:
                found["parts"][part] = {"left_out": str(error)}
            except RuntimeError as error:
                found["parts"][part] = {"failed": str(error)}
            print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    text = json.dumps(found, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)
    print("\n".join(["", *rows(found)]))
    return 1 if wrong(found) else 0


def wrong(found: dict[str, Any]) -> list[str]:
    """Return which parts found something that is not right; what time left out is not among them."""
    parts: dict[str, Any] = found["parts"]
    names = [name for name, part in parts.items() if isinstance(part, dict) and "failed" in part]
    if not parts.get("tests", {}).get("ok", True):
        names.append("tests")
    for name in ("parity", "llama"):
        rows_of = [row for row in parts.get(name, {}).values() if isinstance(row, dict)]
        if any("failed" in row or not row.get("ok", True) for row in rows_of):
            names.append(name)
    if "largest" in parts and not {"params", "left_out", "failed"} & parts["largest"].keys():
        names.append("largest")  # not even the first
    return names


if __name__ == "__main__":
    sys.exit(main())
