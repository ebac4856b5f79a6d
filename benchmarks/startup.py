"""How long the command line and the imports take: `distui --help` against `torchrun --help`, and bare imports.

    python benchmarks/startup.py [--repeats 7]

The figure is the ratio of medians, measured in turns in one run, so that a busy machine slows both alike. Goal: 0.1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

GOAL = 0.1
BIN = Path(sys.executable).parent

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "distui --help": [str(BIN / "distui"), "--help"],
    "torchrun --help": [str(BIN / "torchrun"), "--help"],
    "import distui": [sys.executable, "-c", "import distui"],
    "import distui.core.config.schema": [sys.executable, "-c", "import distui.core.config.schema"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each command, all commands once a turn; the first turn warms the disk cache."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(repeats + 1):
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            if turn:
                found[name].append(time.perf_counter() - begin)
    return found


def main() -> None:
    """Print medians and the ratio, or all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    medians = {name: statistics.median(times) for name, times in measure(options.repeats).items()}
    ratio = medians["distui --help"] / medians["torchrun --help"]
    if options.json:
        print(json.dumps({"median_s": medians, "ratio": ratio, "goal": GOAL}))
        return
    for name, median in medians.items():
        print(f"{name:<26} {median * 1000:8.1f} ms")
    print(f"distui --help / torchrun --help = {ratio:.3f} (goal {GOAL})")


if __name__ == "__main__":
    main()
