"""Prints, feature by feature, the losses of one script under its own library and under distui at every stage.

    python benchmarks/compat_numbers accelerate|trainer|deepspeed [--peer PYTHON] [--ranks 2]

The scripts in benchmarks/compat_numbers/ run unchanged, on CPU ranks; `--peer` is a Python that has the library, this
one without it. The table is that of docs/coming-from-*.md: the peer's last loss, and the largest difference of any
loss at each stage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT_S = 600
STAGES = (0, 1, 2, 3)
SCRIPTS = Path(__file__).resolve().parent
Losses = dict[str, list[float]]


def run(words: list[str], folder: str, out: str) -> Losses:
    """Return what a command wrote. Raises RuntimeError with the end of its output where it failed."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DISTUI_STATE_DIR": f"{folder}/s", "DISTUI_RUNTIME_DIR": folder}
    environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "DISTUI_TELEMETRY_ENABLED": "false"}
    done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-25:]))
    found: Losses = json.loads((Path(folder) / out).read_text())
    return found


def table(library: str, peer: str, ranks: int) -> list[str]:
    """Return the lines of the table."""
    script = str(SCRIPTS / f"{library}_loop.py")
    torchrun = [peer, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    face = [] if library == "trainer" else ["--as", library]
    ours, theirs = {}, {}
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as folder:
        for stage in STAGES:
            more = [str(stage)] if library == "deepspeed" else []
            if more or not theirs:
                theirs[stage] = run([*torchrun, script, f"t{stage}", *more], folder, f"t{stage}")
            launch = [sys.executable, "-m", "distui", "launch", "--no-tui", "--nproc", str(ranks), *face]
            options = [] if library == "deepspeed" else ["--zero", str(stage)]
            ours[stage] = run([*launch, *options, script, f"o{stage}", *more], folder, f"o{stage}")
    lines = ["| feature | last loss, " + library + " | " + " | ".join(f"stage {stage}" for stage in STAGES) + " |"]
    lines.append("|---" * (2 + len(STAGES)) + "|")
    for feature, right in theirs[STAGES[0]].items():
        apart = []
        for stage in STAGES:
            expected = theirs.get(stage, theirs[STAGES[0]])[feature]
            assert len(expected) == len(ours[stage][feature]), (feature, stage)
            apart.append(max(abs(a - b) for a, b in zip(expected, ours[stage][feature], strict=True)))
        lines.append(f"| {feature} | {right[-1]:.5f} | " + " | ".join(f"{value:.0e}" for value in apart) + " |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=["accelerate", "trainer", "deepspeed"])
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    print("\n".join(table(options.library, options.peer, options.ranks)))


if __name__ == "__main__":
    main()
