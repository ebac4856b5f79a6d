"""The shapes of a script's own model, built on the meta device by a process of its own. Torch-free itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from distui.core.errors import UserError
from distui.core.plan.types import ModelSpec

TIMEOUT_S = 120.0


def load_script_model(text: str, sequence_length: int | None = None) -> ModelSpec:
    """Return the model that `FILE.py:FUNCTION` builds; the function takes nothing and returns it, or (model, inputs).

    Raises: UserError where the file, the function or the model cannot be had.
    """
    file, separator, function = text.rpartition(":")
    path = Path(file).expanduser()
    if not separator or not function.isidentifier() or not file.endswith(".py"):
        raise UserError(
            f"--script {text!r} names no function",
            "it takes FILE.py:FUNCTION",
            "write for example train.py:build_model",
        )
    if not path.is_file():
        raise UserError(f"there is no script {path}", "the file does not exist", "give the path of a Python file")
    spec = {"file": str(path.absolute()), "function": function, "sequence_length": sequence_length}
    return _spec_of(_probe(spec, text), text, sequence_length)


def _probe(spec: dict[str, Any], text: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="distui-model-") as folder:
        out = Path(folder) / "model.json"
        command = [sys.executable, "-m", "distui.launcher.probes.model_probe", json.dumps(spec), str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"{text} did not build its model in {TIMEOUT_S:.0f} s",
                "the script may train when it is imported",
                'put what trains under `if __name__ == "__main__":`',
            ) from error
        if not out.exists():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(
                f"{text} ended with status {done.returncode} before its model was built",
                last,
                'put what trains under `if __name__ == "__main__":`, and see that python can import the script',
            )
        found = json.loads(out.read_text(encoding="utf-8"))
    if reason := found.get("error"):
        raise UserError(
            f"cannot measure the model of {text}",
            str(reason),
            "give a function without arguments that builds the model (and may return example inputs with it)",
        )
    assert isinstance(found, dict)
    return found


def _spec_of(found: dict[str, Any], text: str, sequence_length: int | None) -> ModelSpec:
    length, layers = found["sequence_length"], found["num_layers"]
    note = f"; {found['note']}" if found.get("note") else "; FLOPs and activations measured there too"
    heads = found["num_heads"] if found["hidden_size"] % found["num_heads"] == 0 else 1
    return ModelSpec(
        name=found["name"],
        num_parameters=found["num_parameters"],
        num_layers=layers,
        hidden_size=found["hidden_size"],
        num_heads=heads,
        num_kv_heads=found["num_kv_heads"] or heads,
        intermediate_size=found["intermediate_size"],
        vocab_size=found["vocab_size"],
        sequence_length=length,
        tied_embeddings=found["tied_embeddings"],
        block_parameters=found["block_parameters"],
        largest_block_parameters=found["largest_block_parameters"],
        head_parameters=found["head_parameters"],
        embedding_parameters=found["embedding_parameters"],
        gated_mlp=False,
        source=f"{text}, built on the meta device{note}",
        measured_forward_flops=found.get("flops_per_sample", 0.0) / length,
        measured_activation_elements=found.get("saved_per_sample", 0.0) / length / layers,
    )
