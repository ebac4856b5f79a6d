"""Run by tests as a rank's process: the real telemetry source, told on stdin what to do.

step N      one collective and one step, numbers up to N
wait        enter a collective and stay in it
close       end as a rank that has finished
"""

from __future__ import annotations

import sys
from pathlib import Path

from distui.core.config.schema import TelemetrySection
from distui.core.paths import RunFolder
from distui.core.telemetry.control import ControlCommand
from distui.core.telemetry.source import open_source


def main(run: RunFolder, rank: int, world_size: int) -> None:
    """Do what stdin says, and say `ok` after each line."""
    source = open_source(rank, rank, world_size, run, TelemetrySection(flush_s=0.05, heartbeat_s=0.2))

    def checkpoint(command: ControlCommand) -> str:
        return f"saved at step {command.arguments['at_step']}"

    source.on_control("checkpoint", checkpoint)
    source.rank_started("cpu", "a processor", 10)
    done = 0
    for line in sys.stdin:
        verb, *words = line.split()
        if verb == "step":
            for step in range(done + 1, int(words[0]) + 1):
                token = source.collective_begin("data_parallel", "all_reduce", "float32", 64, world_size)
                source.collective_end(token)
                source.step(step=step, step_s=0.5, loss=1.0 / step, tokens=10)
            done = int(words[0])
        elif verb == "wait":
            source.waiting(source.collective_begin("data_parallel", "all_reduce", "float32", 64, world_size))
        elif verb == "close":
            source.close(0)
        print("ok", flush=True)


if __name__ == "__main__":
    main(RunFolder(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
