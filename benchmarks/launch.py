"""From the command to the first collective, and to the prompt again: `distui launch` against torchrun.

    python benchmarks/launch.py [--repeats 5] [--nproc 2]

Both start the same plain script, in turns in one run; the first turn, which also starts distui's daemon, warms the
caches and is dropped. Seconds are medians, with the fastest; CPU seconds are of all processes but the daemon.
Goal: the first collective not later than torchrun's.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """\
import sys, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(4))
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(str(time.time()))
dist.destroy_process_group()
"""


def turn(command: list[str], told: Path, environ: dict[str, str]) -> tuple[float, float, float]:
    """Run once; return the seconds to the first collective and to the end, and the CPU seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    subprocess.run([*command, str(told)], check=True, env=environ, cwd=told.parent, capture_output=True)
    ended = time.time()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return float(told.read_text()) - began, ended - began, cpu_s


def main() -> int:
    """Print the table; return 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nproc", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as folder:
        script, told = Path(folder) / "script.py", Path(folder) / "told"
        script.write_text(SCRIPT)
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "DISTUI_STATE_DIR": f"{folder}/s"}
        environ["DISTUI_RUNTIME_DIR"] = f"{folder}/r"
        commands = {
            "torchrun": [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.nproc}"],
            "distui launch": [sys.executable, "-m", "distui", "launch", "--no-tui", f"--nproc={options.nproc}"],
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for number in range(options.repeats + 1):
            for name, command in commands.items():
                times = turn([*command, str(script)], told, environ)
                if number:
                    found[name].append(times)
        os.kill(int((Path(folder) / "r" / "daemon.lock").read_text()), signal.SIGTERM)
    print(f"{'':14} {'first collective, s':>22} {'prompt again, s':>22} {'CPU, s':>8}")
    for name, turns in found.items():
        cells = [f"{statistics.median(column):.2f} ({min(column):.2f})" for column in zip(*turns, strict=True)]
        print(f"{name:14} {cells[0]:>22} {cells[1]:>22} {cells[2].split()[0]:>8}")
    ours, theirs = (statistics.median(first for first, _, _ in found[name]) for name in ("distui launch", "torchrun"))
    print(f"first collective, distui / torchrun = {ours / theirs:.2f} (goal 1)")
    return int(ours > theirs)


if __name__ == "__main__":
    sys.exit(main())
