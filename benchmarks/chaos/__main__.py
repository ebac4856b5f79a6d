"""Kills parts of a job on two hosts at random moments, again and again, and says what came of each.

    python -m benchmarks.chaos [--kills 100] [--seed 0] [--only rank agent silent supervisor launcher]

The "hosts" are this machine (`cluster.starter=local`); a rank, an agent, the supervisor or the launching command gets
SIGKILL, and a silent host is one whose agent and ranks are all stopped, as behind a link that is down. Each job must
end by itself: trained to its end, with the weights of a run that nobody disturbed, or with the exit status and the
name of what was killed. A job that has not ended after `--limit-s`, or has left a process, is a failure. The last line
is a JSON object of counts; exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, time, torch, distui
engine = distui.Engine()
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
data = torch.utils.data.TensorDataset(torch.arange(160.0).reshape(40, 4) / 160)
loader = torch.utils.data.DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(3))
model, optimizer, loader = engine.prepare(model, optimizer, loader)
for epoch in range(3):
    for (batch,) in loader:
        engine.backward((model(batch) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.05)
        if engine.process_index == 0:
            with open("step", "w") as file:
                file.write(str(engine.clock.step))
if engine.process_index == 0:
    open("weights", "w").write(repr([p.tolist() for p in model.parameters()]))
"""
STEPS = 30
KINDS = ("rank", "agent", "silent", "supervisor", "launcher")
MODULES = {
    "rank": "distui.launcher.node.rank",
    "agent": "distui.launcher.node.member",
    "supervisor": "distui.launcher.cluster.supervisor",
}
SETTLE_S = 20.0
"""What is left of a job whose launcher or supervisor was killed has so long to go."""


class Job:
    """One launch in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        (folder / "train.py").write_text(SCRIPT)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
        places = {"DISTUI_STATE_DIR": str(folder / "s"), "DISTUI_RUNTIME_DIR": str(folder / "r")}
        self.environ = {**environ, **places, "DISTUI_NO_TUI": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(self) -> subprocess.Popen[str]:
        """Start it."""
        words = ["launch", "--hosts", "a:1,b:1", "--set", "cluster.starter=local", "--max-restarts", "2"]
        words += ["--set", "checkpoint.every_steps=5", "train.py"]
        with open(self.folder / "said", "w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "distui", *words],
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                text=True,
            )

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Return the job's processes by what they are; the daemon, which outlives jobs, is none of them."""
        found: dict[str, list[psutil.Process]] = {"other": []}
        for process in psutil.process_iter(["cmdline", "environ"]):
            words, environ = process.info["cmdline"] or [], process.info["environ"] or {}
            if environ.get("DISTUI_STATE_DIR") != str(self.folder / "s") or "distui.daemon" in words:
                continue
            kind = next((kind for kind, module in MODULES.items() if module in words), "other")
            found.setdefault(kind, []).append(process)
        return found

    def step(self) -> int:
        """Return the last step of rank 0."""
        path = self.folder / "step"
        return int(path.read_text() or 0) if path.exists() else 0

    def close(self) -> None:
        """End whatever is left, the daemon too."""
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("DISTUI_STATE_DIR") == str(self.folder / "s"):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def strike(job: Job, launcher: subprocess.Popen[str], kind: str, chance: random.Random) -> bool:
    """Kill one thing; False where there is none of it any more."""
    found = job.processes()
    if kind == "launcher":
        launcher.kill()
        return launcher.poll() is None
    if kind == "silent":
        agents = found.get("agent", [])
        if not agents:
            return False
        agent = chance.choice(agents)
        ranks = [rank for rank in found.get("rank", []) if rank.ppid() == agent.pid]
        for process in (agent, *ranks):
            process.send_signal(signal.SIGSTOP)
        return True
    if not found.get(kind):
        return False
    chance.choice(found[kind]).kill()
    return True


def one(parent: Path, number: int, kind: str, chance: random.Random, limit_s: float, wanted: str) -> str:
    """Run a job, strike once, and return what came of it: "" where all is as it should be."""
    job = Job(parent / str(number))
    launcher = job.start()
    try:
        # A random step, or, at 0, a random moment of the start.
        at, began_s = chance.randrange(STEPS), time.monotonic()
        pause_s = chance.random() * 3 if at == 0 else chance.random() * 0.05
        while job.step() < at and launcher.poll() is None and time.monotonic() - began_s < limit_s:
            time.sleep(0.02)
        time.sleep(pause_s)
        struck = False
        while not struck and launcher.poll() is None and time.monotonic() - began_s < limit_s:
            try:
                struck = strike(job, launcher, kind, chance)
            except psutil.NoSuchProcess:
                continue
        try:
            status = launcher.wait(max(1.0, limit_s - (time.monotonic() - began_s)))
        except subprocess.TimeoutExpired:
            return f"{kind} at step {at}: has not ended after {limit_s:.0f} s"
        left_s = time.monotonic() + SETTLE_S
        while (left := [one.pid for some in job.processes().values() for one in some]) and time.monotonic() < left_s:
            time.sleep(0.1)
        said = (job.folder / "said").read_text()
        if left:
            return f"{kind} at step {at}: left processes {left}"
        if status == 0:
            weights = (job.folder / "weights").read_text()
            return "" if weights == wanted else f"{kind} at step {at}: other weights: {weights}"
        if kind in ("launcher", "supervisor"):
            return "" if status else f"{kind} at step {at}: exit status {status}"
        return f"{kind} at step {at}: exit status {status}: {said[-300:]}"
    finally:
        job.close()


def main() -> int:
    """Strike as often as asked, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--limit-s", type=float, default=600.0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    parent = Path(tempfile.mkdtemp(prefix="dtx", dir="/tmp"))
    counts, failed = Counter[str](), list[str]()
    try:
        whole = Job(parent / "whole")
        try:
            if whole.start().wait(options.limit_s):
                print((whole.folder / "said").read_text())
                return 1
            wanted = (whole.folder / "weights").read_text()
        finally:
            whole.close()
        for number in range(options.kills):
            kind = options.only[number % len(options.only)]
            wrong = one(parent, number, kind, chance, options.limit_s, wanted)
            counts[f"{kind} {'failed' if wrong else 'well'}"] += 1
            if wrong:
                failed.append(wrong)
            print(f"{number}: {wrong or f'{kind}: well'}", flush=True)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    print(json.dumps({"kills": options.kills, "seed": options.seed, **counts, "failures": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
