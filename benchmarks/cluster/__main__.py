"""How soon a job trains again, and how soon a host that is dead is noticed: distui beside torchrun.

    python benchmarks/cluster [--repeats 3]

One machine; hosts are agents on it (`cluster.starter=local`), so that no ssh and no network is in the figures. Medians,
in turns:

- a rank is killed at step 25, saved every 10: from the kill to the first step, and to the first that is new (26).
  torchrun's script loads its own checkpoint, as it must; both are gloo, 2 ranks, the same model.
- an agent is killed: the same.
- a host falls silent (its agent is stopped, as behind a link that is down): from then until the command has ended.
  torchrun with its c10d rendezvous has no such notice on one machine; see docs/clusters.md.

Goals: 15 s to the first new step; 15 s until a dead host is told, 20 s until the job has ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distui.core.telemetry.harmless import harmless

KILL = 25
SCRIPT = """\
import json, os, signal, sys, time
import torch
import torch.distributed as dist

options = json.loads(sys.argv[1])
attempt, plain = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), options["plain"]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.randn(40 * 2 * 4, 64))
loader = torch.utils.data.DataLoader(data, 4)
first = 1
if plain:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(model)
    if os.path.exists("plain.pt"):
        kept = torch.load("plain.pt")
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"] + 1
    batches = ((torch.randn(4, 64),) for _ in range(first, 41))
else:
    import distui
    engine = distui.Engine()
    rank = engine.process_index
    model, optimizer, batches = engine.prepare(model, optimizer, loader)
step = first - 1
with open(f"told-{rank}.jsonl", "a") as told:
    for (batch,) in batches:
        loss = model(batch).square().mean()
        loss.backward() if plain else engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step = step + 1 if plain else engine.clock.step
        told.write(json.dumps({"attempt": attempt, "step": step, "time_s": time.time()}) + "\\n")
        told.flush()
        if plain and step % 10 == 0 and rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "new.pt")
            os.replace("new.pt", "plain.pt")
        if attempt == 0 and step == options["at"] and rank == 1:
            if not plain:
                engine.saver.wait()
            pid = os.getpid() if options["what"] == "rank" else int(os.environ["DISTUI_AGENT_PID"])
            with open("killed", "w") as file:
                file.write(str(time.time()))
            os.kill(pid, signal.SIGSTOP if options["what"] == "silence" else signal.SIGKILL)
            time.sleep(0.01)
        time.sleep(0.05)
"""


def turn(what: str, *, peer: bool) -> tuple[float, float, str]:
    """Run once; return the seconds from the fault to the first step, to the first new one, and the last words.

    For silence both are to the end of the command.
    """
    with tempfile.TemporaryDirectory(prefix="dtb", dir="/tmp") as name:
        folder = Path(name)
        (folder / "train.py").write_text(SCRIPT)
        options = json.dumps({"plain": peer, "what": what, "at": KILL})
        environ = {key: value for key, value in os.environ.items() if not key.startswith("DISTUI_")}
        environ |= {"DISTUI_STATE_DIR": f"{name}/s", "DISTUI_RUNTIME_DIR": f"{name}/r", "OMP_NUM_THREADS": "1"}
        environ["DISTUI_NO_TUI"] = "1"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--max-restarts", "1"]
        if not peer:
            command = [sys.executable, "-m", "distui", "launch", "--set", "checkpoint.every_steps=10"]
            command += ["--nproc", "2"] if what == "rank" else ["--hosts", "a:1,b:1", "--set", "cluster.starter=local"]
            command += [] if what == "silence" else ["--max-restarts", "1"]
        done = subprocess.run(
            [*command, "train.py", options], cwd=folder, env=environ, capture_output=True, text=True, check=False
        )
        ended_s = time.time()
        _end_daemon(folder)
        if not (folder / "killed").exists():
            raise RuntimeError(done.stdout + done.stderr)
        killed_s = float((folder / "killed").read_text())
        if what == "silence":
            told = next((line for line in done.stderr.splitlines() if "has not answered" in line), "")
            return ended_s - killed_s, ended_s - killed_s, harmless(told)
        if peer and done.returncode:
            return math.inf, math.inf, ""  # it did not come back
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        steps = [json.loads(line) for line in (folder / "told-0.jsonl").read_text().splitlines()]
        again = [one for one in steps if one["attempt"] == 1]
        new = next(one for one in again if one["step"] > KILL)
        return again[0]["time_s"] - killed_s, new["time_s"] - killed_s, ""


def _end_daemon(folder: Path) -> None:
    lock = folder / "r" / "daemon.lock"
    if lock.exists() and (pid := lock.read_text().strip()).isdigit():
        try:
            os.kill(int(pid), signal.SIGTERM)
        except ProcessLookupError:
            return  # it had nothing to do any more


def main() -> int:
    """Print the table; return 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    kinds = {"distui, a rank is killed": ("rank", False), "torchrun, a rank is killed": ("rank", True)}
    kinds["distui, an agent is killed"] = ("agent", False)
    kinds["distui, a host falls silent"] = ("silence", False)
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, (what, peer) in kinds.items():
            found[name].append(turn(what, peer=peer))
    print(f"{'':<30}{'first step':>12}{'first new':>12}   seconds from the fault, median of {repeats}")
    medians = {}
    for name, turns in found.items():
        came = [one for one in turns if math.isfinite(one[0])]
        if not came:
            print(f"{name:<30}{'n/a':>12}{'n/a':>12}   it did not train again in any turn")
            continue
        first, medians[name] = (statistics.median(one[place] for one in came) for place in (0, 1))
        some = f"   in {len(came)} of {len(turns)} turns; in the others it ended with an error"
        if name.endswith("silent"):
            print(f"{name:<30}{'':>12}{medians[name]:>12.1f}   until the job has ended: {turns[-1][2]}")
        else:
            print(f"{name:<30}{first:>12.1f}{medians[name]:>12.1f}{some if len(came) < len(turns) else ''}")
    limits = {name: 20.0 if name.endswith("silent") else 15.0 for name in medians if name.startswith("distui")}
    missed = [name for name, limit in limits.items() if medians[name] > limit]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
