"""Prints losses of scripts written for DeepSpeed under DeepSpeed itself and under `distui launch --as deepspeed`.

    python benchmarks/compat_deepspeed.py --peer /path/to/python-with-deepspeed [--ranks 2] [--only text-2]

The scripts in benchmarks/deepspeed_scripts/ run unchanged; only the launcher differs. Losses are rank 0's. In the cases
that resume, distui goes on from the checkpoint that DeepSpeed wrote after the first of its two epochs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT_S = 280
HERE = Path(__file__).resolve().parent
ADAM = {"type": "AdamW", "params": {"lr": 0.003, "betas": [0.8, 0.999], "weight_decay": 3e-7, "torch_adam": True}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.003, "warmup_num_steps": 5}}


def _text(stage: int, **more: object) -> dict[str, object]:
    zero = {"stage": stage}
    return {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2, "zero_optimization": zero, **more}


ONE = "text.py --one_backward"
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "images-0": ("images.py", {"train_batch_size": 16, "optimizer": ADAM, "scheduler": WARMUP}),
    "images-2": (
        "images.py",
        {"train_batch_size": 16, "optimizer": ADAM, "scheduler": WARMUP, "zero_optimization": {"stage": 2}},
    ),
    "text-1": (ONE, _text(1, gradient_clipping=0.5)),
    "text-2-bf16": (ONE, _text(2, bf16={"enabled": True})),
    "text-3": (ONE, _text(3, gradient_clipping=0.5)),
    "resume-1": (ONE, _text(1, gradient_clipping=0.5)),
    "resume-2-bf16": (ONE, _text(2, bf16={"enabled": True})),
    "resume-3": (ONE, _text(3, gradient_clipping=0.5)),
    "two-backwards-1": ("text.py", _text(1, gradient_clipping=0.5)),
}


def _run(words: list[str], folder: Path, out: Path, environ: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode or not out.exists():
        return {"error": (done.stderr or done.stdout).strip().splitlines()[-12:]}
    found: dict[str, object] = json.loads(out.read_text())
    return found


def compare(case: str, ranks: int, peer: str) -> str:
    """Run one case under both and return a line of the table."""
    words, config = CASES[case]
    script, *options = words.split()
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as name:
        folder = Path(name)
        (folder / "ds.json").write_text(json.dumps(config))
        target = [
            str(HERE / "deepspeed_scripts" / script),
            "--deepspeed",
            "--deepspeed_config",
            "ds.json",
            *options,
            "--out",
        ]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "DISTUI_STATE_DIR": f"{name}/s", "DISTUI_RUNTIME_DIR": name}
        theirs = {key: value for key, value in environ.items() if key != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu"}
        torchrun = [peer, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        ours = [sys.executable, "-m", "distui", "launch", "--no-tui", "--as", "deepspeed", "--num_gpus", str(ranks)]
        save, load = [], []
        if case.startswith("resume"):
            save, load = ["--save_to", "saved"], ["--load_from", "saved"]
        expected = _run([*torchrun, *target, "theirs.json", *save], folder, folder / "theirs.json", theirs)
        got = _run([*ours, *target, "ours.json", *load], folder, folder / "ours.json", environ)
    for who, result in (("DeepSpeed", expected), ("distui", got)):
        if "error" in result:
            return f"{case}: {who} failed:\n  " + "\n  ".join(map(str, result["error"]))  # type: ignore[arg-type]
    first, second = expected["losses"], got["losses"]
    assert isinstance(first, list) and isinstance(second, list)
    if case.startswith("resume"):
        first = first[len(first) // 2 :]
    assert len(first) == len(second)
    apart = max(abs(a - b) for a, b in zip(first, second, strict=True))
    rates = f"{expected['lr']:.6f} / {got['lr']:.6f}"
    return f"{case:<15} {len(first):>5} {first[0]:.5f} {first[-1]:.5f} {second[-1]:.5f} {apart:.1e}  {rates}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="a Python that has deepspeed")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    print("case            micro  first   last    distui  largest difference  lr (DeepSpeed / distui)")
    for case in [options.only] if options.only else CASES:
        print(compare(case, options.ranks, options.peer), flush=True)


if __name__ == "__main__":
    main()
