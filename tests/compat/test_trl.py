"""TRL's trainers, and PEFT's adapters in them, under `distui launch` give what torchrun gives; needs TRL and PEFT."""

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

MISSING = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

SCRIPT = """\
import importlib.util
import json
import sys
import warnings

warnings.simplefilter("ignore")
import torch
import trl
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
assert PartialState(cpu=True).num_processes == int(sys.argv[1])  # before TrainingArguments and the engine
words = ["abc de", "hello there", "quick fox", "zzz", "jumps over", "lazy dog", "again", "b"] * 4
texts, prompts = Dataset.from_dict({"text": words}), Dataset.from_dict({"prompt": words})
chosen, rejected = [word[::-1] for word in words], [word[:2] + "x" for word in words]
pairs = Dataset.from_dict({"prompt": words, "chosen": chosen, "rejected": rejected})
COMMON = dict(
    output_dir="out", report_to="none", max_steps=3, logging_steps=1, use_cpu=True, save_strategy="no", bf16=False,
    per_device_train_batch_size=8 // int(sys.argv[1]), learning_rate=1e-2, seed=7, gradient_checkpointing=False,
    disable_tqdm=True,
)
GENERATES = dict(num_generations=4, max_completion_length=8, beta=0.1)


def reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


def make(name, data, model="model", adapter=None, options=None, **more):
    config = getattr(trl, name + "Config")(**COMMON, **(options or {}))
    if adapter is not None:
        shape = dict(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8)
        more["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **shape, **adapter)
    kind = getattr(trl, name + "Trainer")
    return kind(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more)


def scorer():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained("model", num_labels=1)


def int8():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained("model")
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


KINDS = {
    "SFT": lambda: make("SFT", texts),
    "DPO": lambda: make("DPO", pairs, options={"beta": 0.5}),
    "reward": lambda: make("Reward", pairs, scorer()),
    "GRPO": lambda: make("GRPO", prompts, options=GENERATES, reward_funcs=reward),
    "RLOO": lambda: make("RLOO", prompts, options=GENERATES, reward_funcs=reward),
    "LoRA": lambda: make("SFT", texts, adapter={}),
    "DoRA": lambda: make("SFT", texts, adapter={"use_dora": True}),
    "DPO with LoRA": lambda: make("DPO", pairs, AutoModelForCausalLM.from_pretrained("model"), adapter={}),
    "int8": lambda: make("SFT", texts, int8(), adapter={}),
}
found = {}
for name in sys.argv[2].split(","):
    if name == "int8" and importlib.util.find_spec("torchao") is None:
        continue
    trainer = KINDS[name]()
    trainer.train()
    rank = trainer.accelerator.process_index
    rows = [row for row in trainer.state.log_history if "loss" in row]
    found[name] = [[row[key] for key in ("loss", "grad_norm", "reward", "kl") if key in row] for row in rows]
    if name in ("SFT", "LoRA"):  # prompts and answers of different lengths on each rank
        prompt = tokenizer(["ab", "hello"][rank % 2], return_tensors="pt")["input_ids"]
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        told = model.generate(input_ids=prompt, max_new_tokens=4 + 3 * rank, do_sample=False)
        found[name + " tells"] = gather_object([told[0].tolist()])
        trainer.save_model(sys.argv[3] + name)
if trainer.accelerator.is_main_process:
    found["by"] = type(trainer.accelerator).__module__.partition(".")[0]
    print("FOUND" + json.dumps(found))
PartialState().destroy_process_group()  # gloo's threads race with the interpreter's end under torchrun
"""
TRAINED = "SFT,DPO,reward,GRPO,RLOO,LoRA,DoRA,DPO with LoRA"


def _found(folder: Path, kinds: str, saved: str, *command: str, ranks: int = 2) -> dict[str, Any]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ |= {"DISTUI_STATE_DIR": str(folder / "s"), "DISTUI_TELEMETRY_ENABLED": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "train.py", str(ranks), kinds, saved],
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


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    safetensors: Any = importlib.import_module("safetensors.torch")
    (file,) = folder.glob("*.safetensors")
    found: dict[str, torch.Tensor] = safetensors.load_file(file)
    return found


@pytest.mark.timeout(900)  # four starts of TRL
def test_trainers_give_torchruns_numbers(tmp_path: Path) -> None:
    _save_model(tmp_path / "model")
    (tmp_path / "train.py").write_text(SCRIPT)
    plain = _found(tmp_path, TRAINED, "plain", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    assert plain.pop("by") == "accelerate"
    # DDP cannot send a base of int8 tensors: its numbers are those of one process.
    plain |= _found(tmp_path, "int8", "one", ranks=1) | {"by": "distui"}
    for stage in ("0", "3"):
        launch = ("-m", "distui", "launch", "--no-tui", "--nproc", "2", "--zero", stage)
        ours = _found(tmp_path, f"{TRAINED},int8", f"zero{stage}", *launch)
        assert set(ours) == set(plain) and ours.pop("by") == "distui"
        for name, rows in ours.items():
            if name.endswith("tells"):
                assert rows == plain[name], (name, stage)
                continue
            assert len(rows) == 3
            for found, right in zip(rows, plain[name], strict=True):
                assert found == pytest.approx(right, rel=1e-4, abs=1e-6), (name, stage)
        for name in ("SFT", "LoRA"):
            torch.testing.assert_close(_weights(tmp_path / f"zero{stage}{name}"), _weights(tmp_path / f"plain{name}"))
