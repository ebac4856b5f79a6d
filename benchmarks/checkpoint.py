"""How long a step waits for a checkpoint: written at once, written in the background, and torch.save by rank 0.

    python benchmarks/checkpoint.py [--ranks 2] [--width 1024] [--layers 8] [--rounds 5] [--zero 1]

One run, variants interleaved, medians. Each rank has one thread. "stall" is the time in the call; "steps while writing"
says how long a training step takes while the files are written behind it, next to one without. Ours syncs the files to
the disk and checksums them; torch.save leaves both to luck.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

VARIANTS = ("save_state", "save_state(asynchronous=True)", "torch.save by rank 0")


def measure(args: argparse.Namespace) -> None:
    """Be one rank; rank 0 prints."""
    import torch
    from torch import nn

    import distui

    torch.set_num_threads(1)
    engine = distui.Engine(strategy={"zero_stage": args.zero})
    width = args.width
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(args.layers)))
    model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))

    def step() -> float:
        begin = time.perf_counter()
        engine.backward(model(torch.randn(8, width)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    def plain(path: str) -> None:
        # As scripts do: everybody waits until rank 0 has the whole state and has written it. The optimizer's states
        # are rank 0's own, so under a sharding stage this is less than a resumable checkpoint.
        state = engine.get_state_dict(model, only_rank_0=True)
        if engine.is_main_process:
            torch.save({"model": state, "optimizer": optimizer.state_dict()}, path)
        engine.wait_for_everyone()

    saves: dict[str, Callable[[str], object]] = {
        VARIANTS[0]: lambda path: engine.save_state(path),
        VARIANTS[1]: lambda path: engine.save_state(path, asynchronous=True),
        VARIANTS[2]: plain,
    }
    stall, total, beside = defaultdict(list), defaultdict(list), []
    alone = [step() for _ in range(6)][2:]
    for round_ in range(args.rounds + 1):
        for name, save in saves.items():
            path = f"{args.folder}/{VARIANTS.index(name)}"
            engine.wait_for_everyone()
            begin = time.perf_counter()
            save(path)
            stalled = time.perf_counter() - begin
            if name == VARIANTS[1] and round_:
                beside += [step(), step()]
            engine.saver.wait()
            if round_:  # the first makes files, groups and buffers
                stall[name].append(stalled)
                total[name].append(time.perf_counter() - begin)
            alone.append(step())
    if engine.is_main_process:
        count = sum(param.numel() for param in model.parameters())
        print(f"{count / 1e6:.1f}M parameters, stage {args.zero}, {engine.num_processes} ranks, {args.rounds} rounds")
        print(f"{'':32}{'stall':>10}{'until it is written':>22}")
        for name in VARIANTS:
            print(f"{name:32}{statistics.median(stall[name]):>8.3f} s{statistics.median(total[name]):>20.3f} s")
        print(f"a step: {statistics.median(alone):.3f} s, while writing {statistics.median(beside):.3f} s")
        print(f"host memory for the copy: {engine.saver.staged_bytes / 2**20:.0f} MiB a rank")
    engine.end_training()


def main() -> None:
    """Start the ranks, and remove what they wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("width", 1024), ("layers", 8), ("rounds", 5), ("zero", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        measure(args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="distui-checkpoint"))
    common = {"WORLD_SIZE": str(args.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, *sys.argv, "--folder", str(folder)]
    try:
        ranks = [
            subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(args.ranks)
        ]
        status = max(rank.wait() for rank in ranks)
    finally:
        shutil.rmtree(folder)
    sys.exit(status)


if __name__ == "__main__":
    main()
