"""TRL's trainers under `distui launch` give what torchrun gives; needs TRL, which the base install lacks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")

SCRIPT = """\
import json
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import {kind}Config, {kind}Trainer

vocab = {{word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}}
tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
assert PartialState(cpu=True).num_processes == 2  # asked before TrainingArguments and the engine are there
data = Dataset.from_dict({{"prompt": ["abc de", "hello", "quick fox", "zzz"] * 4}})


def reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


arguments = {kind}Config(
    output_dir="out", report_to="none", max_steps=3, logging_steps=1, per_device_train_batch_size=4, num_generations=4,
    max_completion_length=8, use_cpu=True, save_strategy="no", learning_rate=1e-2, bf16=False, beta=0.1, seed=7,
    gradient_checkpointing=False, disable_tqdm=True,
)
trainer = {kind}Trainer(
    model="model", reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer
)
trainer.train()
told = gather_object([trainer.accelerator.process_index])
if trainer.accelerator.is_main_process:
    rows = [row for row in trainer.state.log_history if "loss" in row]
    by = type(trainer.accelerator).__module__.partition(".")[0]
    text = {{"by": by, "told": told, "rows": [[r["loss"], r["grad_norm"], r["reward"], r["kl"]] for r in rows]}}
    print("FOUND" + json.dumps(text))
PartialState().destroy_process_group()  # gloo's threads race with the interpreter's end under torchrun
"""


def _found(folder: Path, *command: str) -> dict[str, Any]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ |= {"DISTUI_STATE_DIR": str(folder / "s"), "DISTUI_TELEMETRY_ENABLED": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, "train.py"],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.split("FOUND", 1)[1].splitlines()[0])
    return found


def _save_model(folder: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, pad_token_id=0, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))


@pytest.mark.timeout(900)  # three starts of TRL
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_trainers_that_generate_give_torchruns_numbers(kind: str, tmp_path: Path) -> None:
    _save_model(tmp_path / "model")
    (tmp_path / "train.py").write_text(SCRIPT.format(kind=kind))
    plain = _found(tmp_path, "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    assert plain["by"] == "accelerate"
    for stage in ("0", "3"):
        ours = _found(tmp_path, "distui", "launch", "--no-tui", "--nproc", "2", "--zero", stage)
        assert ours["by"] == "distui"
        assert ours["told"] == plain["told"] == [0, 1]
        assert len(ours["rows"]) == 3
        for found, right in zip(ours["rows"], plain["rows"], strict=True):
            assert found == pytest.approx(right, rel=1e-4, abs=1e-6), stage
