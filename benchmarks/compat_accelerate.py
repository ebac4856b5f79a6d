"""Runs the self-test scripts of Accelerate's wheel under `distui launch --as accelerate`, and prints who passes.

    python benchmarks/compat_accelerate.py SCRIPTS [--peer PYTHON] [--nproc 2] [--only NAME ...] [-- launch options]

SCRIPTS is the folder accelerate/test_utils/scripts of an installed or unpacked wheel. `--peer` is a Python that has
Accelerate installed: each script runs under `torchrun` with it too, on the CPU, so that a script that fails everywhere
is seen to.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300.0
ALONE = {"test_notebook": {"ACCELERATE_NUM_PROCESSES": "2"}}
"""Scripts that start ranks themselves, and how many."""


def reason(output: str) -> str:
    """Return the line that says most: the error's."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error:" in line or "Exception:" in line or line.startswith("error:")]
    told = [line for line in errors if not line.startswith(("error: rank", "other ranks", "torch.distributed.elastic"))]
    return (told or errors or lines or ["no output"])[-1].removeprefix("[rank0]: ").removeprefix("[rank1]: ")[:160]


def run(command: list[str], environ: dict[str, str], folder: str) -> tuple[str, float, str]:
    """Return how a command ended (pass, fail, hang), after how many seconds, and why."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**os.environ, **environ},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            output, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        return "hang", time.monotonic() - begin, f"no end after {TIMEOUT_S:.0f} s"
    seconds = time.monotonic() - begin
    return ("pass", seconds, "") if process.returncode == 0 else ("fail", seconds, reason(output))


def main() -> None:
    """Print a table, one line a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", type=Path)
    parser.add_argument("--peer", help="a Python with Accelerate")
    parser.add_argument("--nproc", default="2")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--options", default="", help="options of distui launch, such as '--zero 2'")
    arguments = parser.parse_args()
    found = sorted(arguments.scripts.glob("test_*.py")) + sorted(arguments.scripts.glob("external_deps/test_*.py"))
    chosen = [path for path in found if not arguments.only or path.stem in arguments.only]
    peers = " Accelerate under torchrun, CPU | why not |" if arguments.peer else ""
    print(f"| script | distui {arguments.options} | why not |{peers}")
    print("|---|---|---|" + ("---|---|" if arguments.peer else ""))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as folder:
        ours = {
            "PYTHONPATH": str(ROOT),
            "DISTUI_STATE_DIR": f"{folder}/state",
            "DISTUI_RUNTIME_DIR": f"{folder}/rt",
            "DISTUI_TELEMETRY_ENABLED": "false",
            "HF_HUB_OFFLINE": "1",
        }
        for script in chosen:
            alone = ALONE.get(script.stem, {})
            nproc = "1" if alone else arguments.nproc
            launch = [sys.executable, "-m", "distui", "launch", "--as", "accelerate", "--nproc", nproc]
            state, seconds, why = run(
                [*launch, "--no-tui", *arguments.options.split(), str(script)], {**ours, **alone}, folder
            )
            failed += state != "pass"
            row = [script.stem, f"{state} {seconds:.0f} s", why]
            if arguments.peer:
                peer = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **alone}
                torchrun = [arguments.peer, "-m", "torch.distributed.run", "--nproc-per-node", nproc]
                state, seconds, why = run([*torchrun, "--standalone", str(script)], peer, folder)
                row += [f"{state} {seconds:.0f} s", why]
            print("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
