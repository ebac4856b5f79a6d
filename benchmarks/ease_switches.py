"""What must be edited to train the same script elsewhere, or otherwise: five switches, beside Accelerate and DeepSpeed.

    python -m benchmarks.ease_switches [--peer PYTHON] [--no-run]

A switch starts from a script that trains on two CPU ranks in fp32 with batches of 8 a rank. For each library it is done
as its own documentation does it; what a diff of the script and the library's configuration shows as added or changed is
counted, beside the words added to the command. Where this machine can, the switched job is run, and the script itself
says whether the switch took: ranks, global batch, the dtype inside the model, device. Another cluster is two hosts with
four ranks each, which no run here has: there only the edits are counted, for each host.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.ease import ROOT, VARIANTS, Variant, end_daemon

LONGEST_S = 540
SWITCHES = ("1 to 8 ranks", "batch size 8 to 4", "fp32 to bf16", "GPUs to CPU", "another cluster")
SAYS = """\
    if first:
        first = False
        print("found", int(os.environ.get("WORLD_SIZE", 1)), len(x), seen[0], x.device.type, flush=True)
"""


@dataclass(frozen=True)
class Switched:
    """How a library is switched: replacements in its files, words put before the script, and the environment."""

    edits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    """Words that the switch replaces."""
    runs: bool = True
    note: str = ""


def says(text: str) -> str:
    """Return the script with a line that tells what it trained with."""
    text = text.replace("import time\n", "import os\nimport time\n", 1)
    at = "optimizer = "
    hook = "seen, first = [], True\nmodel[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))\n"
    assert at in text
    text = text.replace(at, hook + at, 1)
    forward = next(line for line in text.splitlines(keepends=True) if line.startswith("    loss ="))
    return text.replace(forward, forward + SAYS, 1)


EXPECTED: dict[str, tuple[int, int, str, str]] = {
    "1 to 8 ranks": (8, 8, "torch.float32", "cpu"),
    "batch size 8 to 4": (2, 4, "torch.float32", "cpu"),
    "fp32 to bf16": (2, 8, "torch.bfloat16", "cpu"),
    "GPUs to CPU": (2, 8, "torch.float32", "cpu"),
}
"""Ranks, a rank's batch, the dtype inside the model, device."""

LOADER = "batch_size=8, shuffle=True"
AUTOCAST = '"torch_autocast": {\n  "enabled": true,\n  "dtype": "bfloat16"\n },\n '
HOSTS = "node1 slots=4\nnode2 slots=4\n"

HOW: dict[str, dict[str, Switched]] = {
    "distui (ZeRO-1)": {
        "1 to 8 ranks": Switched(words=["--nproc", "8"], without=["--nproc", "2"]),
        "batch size 8 to 4": Switched(words=["--set", "batch.micro_size=4"]),
        "fp32 to bf16": Switched(words=["--set", "precision.dtype=bf16"]),
        "GPUs to CPU": Switched(words=["--set", "run.device=cpu"]),
        "another cluster": Switched(words=["--hosts", "node1:4,node2:4"], runs=False, note="1 command for all hosts"),
    },
    "Accelerate (DDP)": {
        "1 to 8 ranks": Switched(words=["--nproc-per-node", "8"], without=["--nproc-per-node", "2"]),
        "batch size 8 to 4": Switched(edits={"train.py": [(LOADER, "batch_size=4, shuffle=True")]}),
        "fp32 to bf16": Switched(
            environ={"ACCELERATE_MIXED_PRECISION": "bf16"}, note="`accelerate launch --mixed_precision bf16`"
        ),
        "GPUs to CPU": Switched(note="ACCELERATE_USE_CPU=true, or --cpu"),
        "another cluster": Switched(
            words=["--nnodes", "2", "--node-rank", "R", "--master-addr", "node1", "--master-port", "29500"],
            runs=False,
            note="1 command on each host, with its number",
        ),
    },
    "DeepSpeed (ZeRO-1)": {
        "1 to 8 ranks": Switched(words=["--num_gpus", "8"], without=["--num_gpus", "2"]),
        "batch size 8 to 4": Switched(
            edits={"ds.json": [('"train_micro_batch_size_per_gpu": 8', '"train_micro_batch_size_per_gpu": 4')]}
        ),
        "fp32 to bf16": Switched(
            edits={
                "ds.json": [('"gradient_clipping"', AUTOCAST + '"gradient_clipping"')],
            }
        ),
        "GPUs to CPU": Switched(note="DS_ACCELERATOR=cpu"),
        "another cluster": Switched(
            edits={"hostfile": [("", HOSTS)]},
            words=["--hostfile", "hostfile"],
            without=["--num_gpus", "2"],
            runs=False,
            note="1 command for all hosts",
        ),
    },
}


def files_of(variant: Variant) -> dict[str, str]:
    """Return the files of the library's job: its script, and its configuration one key a line."""
    found = {"train.py": variant.script()}
    for name, text in variant.files.items():
        found[name] = json.dumps(json.loads(text), indent=1) + "\n"
    return found


def switched_files(variant: Variant, how: Switched) -> dict[str, str]:
    """Return the files after the switch."""
    files = files_of(variant)
    for name, edits in how.edits.items():
        for old, new in edits:
            before = files.get(name, "")
            assert old in before or not before, (name, old)
            files[name] = before.replace(old, new, 1) if before else new
    return files


def edited_lines(before: dict[str, str], after: dict[str, str]) -> dict[str, int]:
    """Return, for each file that differs, the lines that a diff shows as added or changed."""
    found = {}
    for name, text in after.items():
        diff = difflib.ndiff(before.get(name, "").splitlines(), text.splitlines())
        if count := sum(line.startswith("+ ") for line in diff):
            found[name] = count
    return found


def switched_command(variant: Variant, how: Switched) -> list[str]:
    """Return the command after the switch."""
    words = list(variant.command)
    if how.without:
        at = next(i for i in range(len(words)) if words[i : i + len(how.without)] == how.without)
        del words[at : at + len(how.without)]
    place = words.index("train.py")
    return words[:place] + how.words + words[place:]


def try_switch(variant: Variant, how: Switched, python: str, folder: Path) -> tuple[int, int, str, str]:
    """Run the switched job and return what rank 0 says it trained with."""
    files = switched_files(variant, how)
    for name, text in files.items():
        (folder / name).write_text(says(text) if name == "train.py" else text)
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DISTUI_STATE_DIR": str(folder / "state"),
        "DISTUI_RUNTIME_DIR": str(folder / "rt"),
        "TORCH_EXTENSIONS_DIR": str(folder / "ops"),
        **variant.environ,
        **how.environ,
    }
    command = switched_command(variant, how)
    if "--master_port" in command:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            command[command.index("--master_port") + 1] = str(free.getsockname()[1])
    done = subprocess.run(
        [python, *command],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    said = next((line.split() for line in done.stdout.splitlines() if line.lstrip().startswith("found ")), None)
    if said is None:
        raise SystemExit(f"{variant.name} failed ({done.returncode}):\n{done.stdout[-1500:]}{done.stderr[-3000:]}")
    return int(said[1]), int(said[2]), said[3], said[4]


def print_switches(peer: str | None, run: bool) -> None:
    """Print the table of the five switches."""
    print("| | " + " | ".join(SWITCHES) + " | lines edited, in all |")
    print("|---" * (len(SWITCHES) + 2) + "|")
    for variant in VARIANTS:
        if variant.name not in HOW or (variant.peer and run and peer is None):
            continue
        cells, lines = [], 0
        for switch in SWITCHES:
            how = HOW[variant.name][switch]
            edited = edited_lines(files_of(variant), switched_files(variant, how))
            lines += sum(edited.values())
            told = ", ".join(f"{count} of {name}" for name, count in edited.items()) or "0"
            command = " ".join(how.words)
            cell = told + (f"; `{command}`" if command else "") + (f"; {how.note}" if how.note else "")
            if run and how.runs:
                with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as name:
                    try:
                        python = (peer or "") if variant.peer else sys.executable
                        found = try_switch(variant, how, python, Path(name))
                    finally:
                        end_daemon(Path(name) / "rt")
                took = found == EXPECTED[switch]
                cell += " (ran)" if took else f" (**trained with {found} in place of {EXPECTED[switch]}**)"
            cells.append(cell)
        print(f"| {variant.name} | " + " | ".join(cells) + f" | {lines} |", flush=True)
    if not run:
        print("(nothing was run)")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with Accelerate and DeepSpeed")
    parser.add_argument("--no-run", action="store_true", help="count only")
    options = parser.parse_args()
    print_switches(options.peer, not options.no_run)


if __name__ == "__main__":
    main()
