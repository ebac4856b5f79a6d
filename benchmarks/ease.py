"""What one training script costs its user: lines changed, keys needed, time to the first step, import time.

    python benchmarks/ease.py [--peer PYTHON] [--repeats 5] [--without deepspeed]

The task is one script for one process. Each library gets the script that trains it on two ranks with sharded
optimizer states (ZeRO-1 where it has that on this machine), started by its own launcher. Lines changed are those a diff
shows as added or changed. The first step is over when the script itself says so; variants run in turns, the first turn
warms caches and is dropped, figures are medians. `--peer` is a Python that has Accelerate and DeepSpeed. DeepSpeed
compiles an operation at its first start; it does so in a folder of this benchmark's own, since a build that was once
killed leaves a lock for which every later start waits without a word. The time with the build is printed by itself.

Goals: not more lines than Accelerate; time to the first step at most torchrun's + 0.5 s.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LONGEST_S = 540
"""DeepSpeed's first start compiles for a minute or more on two cores."""

ONE_PROCESS = """\
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = TensorDataset(torch.randn(64, 64), torch.randint(8, (64,)))
loader = DataLoader(data, batch_size=8, shuffle=True)
for x, y in loader:
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print("step", time.time(), flush=True)
"""

PREPARED = [
    (
        "for x, y in loader:\n",
        "model, optimizer, loader = engine.prepare(model, optimizer, loader)\nfor x, y in loader:\n",
    ),
    ("    loss.backward()\n", "    engine.backward(loss)\n"),
    ("torch.nn.utils.clip_grad_norm_", "engine.clip_grad_norm_"),
]


@dataclass(frozen=True)
class Variant:
    """A library: its script as replacements in the one-process script, its launcher, and what must be configured."""

    name: str
    edits: list[tuple[str, str]]
    module: str
    command: list[str]
    keys: list[str]
    peer: bool = False
    files: dict[str, str] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)

    def script(self) -> str:
        """Return the library's script."""
        text = ONE_PROCESS
        for old, new in self.edits:
            assert old in text, old
            text = text.replace(old, new)
        return text

    def lines_changed(self) -> int:
        """Return the lines that a diff shows as added or changed."""
        diff = difflib.ndiff(ONE_PROCESS.splitlines(), self.script().splitlines())
        return sum(line.startswith("+ ") for line in diff)


_DS = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}

VARIANTS = [
    Variant(
        "torchrun (DDP)",
        [
            ("import torch\n", "import torch\nimport torch.distributed as dist\n"),
            (
                "DataLoader, TensorDataset\n",
                "DataLoader, TensorDataset\nfrom torch.utils.data.distributed import DistributedSampler\n\n"
                'dist.init_process_group("gloo")\n',
            ),
            ("optimizer = ", "model = torch.nn.parallel.DistributedDataParallel(model)\noptimizer = "),
            ("batch_size=8, shuffle=True", "batch_size=8, sampler=DistributedSampler(data)"),
            ("    print(", "    if dist.get_rank() == 0:\n        print("),
        ],
        "torch",
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"],
        ["--nproc-per-node"],
    ),
    Variant(
        "distui (ZeRO-1)",
        [
            ("import torch\n", "import distui\nimport torch\n"),
            ("torch.manual", "engine = distui.Engine()\ntorch.manual"),
            *PREPARED,
            ("    print(", "    engine.print("),
        ],
        "distui.core.engine.engine",
        ["-m", "distui", "launch", "--no-tui", "--nproc", "2", "--zero", "1", "train.py"],
        ["--nproc", "--zero"],
    ),
    Variant(
        "Accelerate (DDP)",
        [
            ("import torch\n", "import torch\nfrom accelerate import Accelerator\n"),
            ("torch.manual", "engine = Accelerator()\ntorch.manual"),
            *PREPARED,
            ("    print(", "    engine.print("),
        ],
        "accelerate",
        # `accelerate launch` starts one process on a machine without GPUs, whatever num_processes says (1.15).
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"],
        ["--nproc-per-node", "use_cpu"],
        peer=True,
        environ={"ACCELERATE_USE_CPU": "true"},
    ),
    Variant(
        "DeepSpeed (ZeRO-1)",
        [
            ("import torch\n", "import deepspeed\nimport torch\n"),
            (
                "loader = DataLoader(data, batch_size=8, shuffle=True)\n",
                "model, optimizer, loader, _ = deepspeed.initialize(\n"
                '    model=model, optimizer=optimizer, training_data=data, config="ds.json"\n)\n',
            ),
            ("    loss.backward()\n", "    model.backward(loss)\n"),
            ("    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n", ""),
            ("    optimizer.step()\n    optimizer.zero_grad()\n", "    model.step()\n"),
            ("    print(", "    if deepspeed.comm.get_rank() == 0:\n        print("),
        ],
        "deepspeed",
        ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "0", "train.py"],
        ["--num_gpus", "train_micro_batch_size_per_gpu", "gradient_clipping", "zero_optimization.stage"],
        peer=True,
        files={"ds.json": json.dumps(_DS)},
        environ={"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    ),
]


@dataclass
class Start:
    """One run: seconds to the end of rank 0's first step, CPU seconds of the whole command, and its exit status."""

    first_step_s: float
    cpu_s: float
    status: int


def start(variant: Variant, python: str, folder: Path) -> Start:
    """Run the variant's script from the command to its end."""
    for name, text in {"train.py": variant.script(), **variant.files}.items():
        (folder / name).write_text(text)
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DISTUI_STATE_DIR": str(folder / "state"),
        "DISTUI_RUNTIME_DIR": str(folder / "rt"),
        "TORCH_EXTENSIONS_DIR": str(folder / "ops"),
        **variant.environ,
    }
    if "--master_port" in variant.command:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [port if word == "0" else word for word in variant.command]
    else:
        command = variant.command
    spent_s = _children_cpu_s()
    began = time.time()
    done = subprocess.run(
        [python, *command],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    steps = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    if len(steps) != 4:  # 64 samples of 8 on two ranks
        raise SystemExit(
            f"{variant.name} failed ({done.returncode}): {len(steps)} steps where two ranks make 4\n"
            f"{done.stdout[-1500:]}{done.stderr[-3000:]}"
        )
    return Start(float(steps[0][1]) - began, _children_cpu_s() - spent_s, done.returncode)


def _children_cpu_s() -> float:
    """Return the CPU seconds of all processes that this one has waited for, and those that they have."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def import_s(variant: Variant, python: str) -> float:
    """Return the seconds that a bare import takes."""
    began = time.perf_counter()
    subprocess.run(
        [python, "-c", f"import {variant.module}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variant.environ},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with Accelerate and DeepSpeed; without it they are left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], help="names that are left out")
    options = parser.parse_args()
    left_out = tuple(name.lower() for name in options.without)
    variants = [
        variant
        for variant in VARIANTS
        if (options.peer or not variant.peer) and not variant.name.lower().startswith(left_out or ("-",))
    ]
    steps: dict[str, list[float]] = {variant.name: [] for variant in variants}
    spent: dict[str, list[float]] = {variant.name: [] for variant in variants}
    imports: dict[str, list[float]] = {variant.name: [] for variant in variants}
    first: dict[str, float] = {}
    aborted: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as name:
        for turn in range(options.repeats + 1):
            for variant in variants:
                python = options.peer if variant.peer else sys.executable
                began = start(variant, python, Path(name))
                aborted[variant.name] = aborted.get(variant.name, 0) + (began.status != 0)
                seconds = import_s(variant, python)
                if turn:
                    steps[variant.name].append(began.first_step_s)
                    spent[variant.name].append(began.cpu_s)
                    imports[variant.name].append(seconds)
                else:
                    first[variant.name] = began.first_step_s
        end_daemon(Path(name) / "rt")
    heads = "lines changed | settings | import, s | first step, s (min) | CPU s of the command | very first start, s"
    print(f"| | {heads} | status not 0 |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in variants:
        times = steps[variant.name]
        print(
            f"| {variant.name} | {variant.lines_changed()} | {len(variant.keys)}: {', '.join(variant.keys)} | "
            f"{statistics.median(imports[variant.name]):.2f} | {statistics.median(times):.2f} ({min(times):.2f}) | "
            f"{statistics.median(spent[variant.name]):.2f} | {first[variant.name]:.1f} | "
            f"{aborted[variant.name]} of {options.repeats + 1} |"
        )
    ours, plain = (statistics.median(steps[VARIANTS[index].name]) for index in (1, 0))
    print(f"first step: distui {ours - plain:+.2f} s against torchrun (goal at most +0.50)")
    lines = {variant.name: variant.lines_changed() for variant in VARIANTS}
    print(f"lines: distui {lines['distui (ZeRO-1)']}, Accelerate {lines['Accelerate (DDP)']} (goal: not more)")


def end_daemon(sockets: Path) -> None:
    """End the daemon that the launches of this benchmark started."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if "distui.daemon" in (process.info["cmdline"] or ()):
            try:
                if process.environ().get("DISTUI_RUNTIME_DIR") == str(sockets):
                    process.terminate()
                    process.wait(10)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


if __name__ == "__main__":
    main()
