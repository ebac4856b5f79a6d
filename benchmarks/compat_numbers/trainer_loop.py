"""Written for transformers' Trainer: one training a feature, what it logs as JSON on rank 0."""

import importlib.util
import json
import sys
import tempfile
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

warnings.simplefilter("ignore")
FEATURES = {
    "fp32": {},
    "accumulation 2": {"gradient_accumulation_steps": 2},
    "clipping 0.1": {"max_grad_norm": 0.1},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "activation checkpointing": {"gradient_checkpointing": True},
    "cosine schedule, weight decay": {"lr_scheduler_type": "cosine", "weight_decay": 0.1},
    "LoRA (PEFT)": {},
    "bf16": {"bf16": True},
}
if importlib.util.find_spec("peft") is None:
    del FEATURES["LoRA (PEFT)"]


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 5] = -100
        return {"input_ids": ids, "labels": labels}


def train(name, options):
    torch.manual_seed(3)
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **shape))
    if name.startswith("LoRA"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        max_steps=8,
        save_strategy="no",
        per_device_train_batch_size=4,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.is_world_process_zero()


found = {}
for feature, given in FEATURES.items():
    found[feature], is_main = train(feature, given)
if is_main:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
