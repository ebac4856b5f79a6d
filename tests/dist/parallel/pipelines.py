"""Trainings of the parity tests in a pipeline: the models of the other axes, cut into stages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tests.dist.parallel.refused_models import KINDS, Failing, Inward
from tests.dist.parallel.trainings import ROWS, VOCAB, Encoder, build, optimizer_of, samples, steps, trained

import distui
from distui.core.errors import DistuiError, UserError


def deep_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=27, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=16, tie_word_embeddings=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    )


def deep_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: Any = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 16}
    off: Any = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, pad_token_id=0))


class DeepEncoder(Encoder):
    """With four layers, two of which are one."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(16, 4, 30, dropout=0.0, batch_first=True) for _ in range(4)]
        layers[2].linear1 = layers[0].linear1
        layers[3].linear1 = layers[1].linear1
        self.encoder.layers = nn.ModuleList(layers)


DEEP = {"deep": deep_llama, "deep-gpt2": deep_gpt2, "deep-encoder": DeepEncoder}


EVEN = "even-"
"""Begins the name of a model that gets sequences which context-parallel ranks divide, with padding."""


def model_of(name: str, seed: int) -> nn.Module:
    name = name.removeprefix(EVEN)
    if name in DEEP:
        torch.manual_seed(seed)
        return DEEP[name]().train()
    if name != "frozen":
        return build(name, seed)
    model: Any = build("llama", seed)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    found: nn.Module = model
    return found


def outside(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def loss_of(name: str, model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    if name.startswith(EVEN):
        ids_BT = ids_BT[:, :8]
        seen_BT = torch.ones_like(ids_BT)
        seen_BT[1::2, 6:] = 0
        labels_BT = ids_BT.masked_fill(seen_BT == 0, -100)
        count = (labels_BT[:, 1:] != -100).sum()  # micro-batches have as many rows, and not as many tokens
        found: torch.Tensor = model(
            input_ids=ids_BT, attention_mask=seen_BT, labels=labels_BT, num_items_in_batch=count
        ).loss
        return found
    if name.endswith("encoder"):
        loss: torch.Tensor = model(ids_BT[:, :-1], targets=ids_BT[:, 1:])
        return loss
    return model(input_ids=ids_BT, labels=ids_BT).loss


def prepared(name: str, stages: int, stage: int, **sections: Any) -> tuple[distui.Engine, Any, Any, Any]:
    """Return engine, model, optimizer and loader; each rank builds the model by a seed of its own."""
    strategy = {"pipeline_parallel": stages, "zero_stage": stage, **sections.pop("strategy", {})}
    micro, rows = sections.pop("micro", max(stages, 2)), sections.pop("rows", ROWS)
    engine = distui.Engine(strategy=strategy, batch={"accumulation": micro} if stages > 1 else {}, **sections)
    model = model_of(name, engine.process_index)
    size = rows // engine.num_data_ranks // (micro if stages > 1 else 1)
    loader: Any = torch.utils.data.DataLoader(samples(rows), batch_size=size)  # type: ignore[arg-type]
    loss = outside if name.endswith("encoder") else None
    model, optimizer, loader = engine.prepare(model, optimizer_of(model), loader, loss=loss)
    return engine, model, optimizer, loader


def train(name: str, stages: int, stage: int, **sections: Any) -> dict[str, Any]:
    return trained(name, *prepared(name, stages, stage, **sections), loss_of)


def trainings(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Train each (name, stages, ZeRO stage), and what sections a case has beside."""
    return [train(*case[:3], **(case[3] if len(case) > 3 else {})) for case in cases]


def accumulated(name: str, sections: dict[str, Any]) -> dict[str, Any]:
    """Train on one process, over the two micro-batches that a pipeline of two ranks makes of a step."""
    engine = distui.Engine(batch={"accumulation": 2}, **sections)
    model = model_of(name, 0)
    loader: Any = torch.utils.data.DataLoader(samples(), batch_size=ROWS // 2)  # type: ignore[arg-type]
    model, optimizer, loader = engine.prepare(model, optimizer_of(model), loader)
    found = trained(name, engine, model, optimizer, loader, loss_of)
    losses = found["losses"]
    found["losses"] = [(one + other) / 2 for one, other in zip(losses[::2], losses[1::2], strict=True)]
    return found


def odd_batches(name: str, schedule: str | None) -> dict[str, Any]:
    """Train with rows that do not divide, another length each time, and fewer rows than stages; then evaluate."""
    strategy: Any = {"pipeline_parallel": 2, "pipeline_schedule": schedule} if schedule else {}
    engine = distui.Engine(strategy=strategy, batch={"accumulation": 2} if schedule else {})
    model = model_of(name, 0)
    model, optimizer = engine.prepare(model, optimizer_of(model))
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(1, VOCAB, shape, generator=generator) for shape in ((5, 9), (3, 6), (1, 7), (4, 9))]
    losses = []
    for ids_BT in batches:
        loss = model(input_ids=ids_BT, labels=ids_BT, attention_mask=torch.ones_like(ids_BT)).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    for _ in range(2):  # two passes before a step
        loss = model(input_ids=batches[0], labels=batches[0]).loss
        engine.backward(loss)
    norm = engine.clip_grad_norm_(model.parameters(), 0.5)
    assert norm is not None
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    output = model(input_ids=batches[1], labels=batches[1])
    with torch.no_grad():
        bare = model(input_ids=batches[1])
    weights = engine.get_state_dict(model)
    logits, refused = None, ""
    try:
        logits = [output.logits.detach(), bare["logits"].detach()]
    except distui.UserError as error:
        refused = error.report()
    engine.free_memory()
    losses.append(float(output.loss.detach()))
    return {"losses": losses, "norms": [float(norm)], "weights": weights, "logits": logits, "refused": refused}


def refusals(kinds: list[str], stages: int = 2, schedule: str = "1f1b") -> list[str]:
    """Return what each kind of model, or of use, is told on this rank."""
    return [_refusal(kind, stages, schedule) for kind in kinds]


def _refusal(kind: str, stages: int, schedule: str) -> str:
    strategy = {"pipeline_parallel": stages, "pipeline_schedule": schedule}
    engine = distui.Engine(strategy=strategy, batch={"accumulation": stages})
    try:
        model = KINDS.get(kind, Failing)() if kind != "short" else nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        model, optimizer = engine.prepare(model, optimizer_of(model))
        ids_BT = torch.ones(4, 3, dtype=torch.int64)
        if kind == "batches":
            ids_BT += engine.process_index
        for _ in range(2):
            loss = model(ids_BT)
            if kind == "part":
                model.head(model.blocks[1](torch.ones(4, 8)))
            if kind == "scaled":
                loss = loss * 2.0
            if kind == "penalty":
                loss = loss + sum(param.square().sum() for param in model.parameters() if param.numel())
            engine.backward(loss)
            if kind == "gradients":
                with engine.gradients(model):
                    pass
            if kind == "states":
                optimizer.step()
                optimizer.state_dict()
    except (DistuiError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.free_memory()
    return "nothing"


def asking(schedule: str | None) -> dict[str, torch.Tensor]:
    """Train a model that asks for gradients in its forward; return its weights."""
    strategy: Any = {"pipeline_parallel": 2, "pipeline_schedule": schedule} if schedule else {}
    engine = distui.Engine(strategy=strategy, batch={"accumulation": 2} if schedule else {})
    torch.manual_seed(0)
    model: Any = Inward()
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for ids_BT in torch.stack(samples()[:8]).split(4):
        engine.backward(model(ids_BT))
        optimizer.step()
        optimizer.zero_grad()
    weights = engine.get_state_dict(model)
    engine.free_memory()
    return weights


def routed(name: str) -> str:
    """Return what is told of a mixture that is to collect something of all its blocks."""
    engine = distui.Engine(strategy={"pipeline_parallel": 2}, batch={"accumulation": 2})
    model = engine.prepare(build("qwen3-moe"))
    try:
        ids_BT = torch.stack(samples()[:4])
        model(input_ids=ids_BT, labels=ids_BT, **{name: True})
    except UserError as error:
        return error.what
    finally:
        engine.free_memory()
    return "nothing"


def overflowing() -> list[tuple[bool, float]]:
    """Train in fp16 from a loss scale that overflows on the last stage; return what each step was."""
    precision = {"dtype": "fp16", "initial_loss_scale": 2.0**40}
    engine = distui.Engine(strategy={"pipeline_parallel": 2}, batch={"accumulation": 2}, precision=precision)
    model = build("llama", 0)
    model, optimizer = engine.prepare(model, optimizer_of(model))
    found = []
    for ids_BT in torch.stack(samples()[:8]).split(4):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert engine.scaler is not None
        found.append((engine.optimizer_step_was_skipped, engine.scaler.scale))
    engine.free_memory()
    return found


def saved(
    folder: str, stages: int, stage: int, tensor: int = 1, schedule: str = "1f1b", name: str = "llama-tied"
) -> dict[str, Any]:
    """Train two steps and save; return the weights, and what the steps after it give."""
    strategy = {"tensor_parallel": tensor, "pipeline_schedule": schedule}
    engine, model, optimizer, loader = prepared(name, stages, stage, strategy=strategy)
    batches = list(loader)
    steps(name, engine, model, optimizer, batches[:2], loss_of)
    engine.save_state(f"{folder}/state")
    engine.save_model(model, f"{folder}/model")
    weights = engine.get_state_dict(model)
    found = steps(name, engine, model, optimizer, batches[2:], loss_of)
    engine.free_memory()
    return {**found, "saved": weights, "weights": {}}


def resumed(
    folder: str, stages: int, stage: int, tensor: int = 1, schedule: str = "1f1b", name: str = "llama-tied"
) -> dict[str, Any]:
    """Load what `saved` wrote into another layout, and go on."""
    strategy = {"tensor_parallel": tensor, "pipeline_schedule": schedule}
    engine, model, optimizer, loader = prepared(name, stages, stage, strategy=strategy)
    batches = list(loader)
    engine.load_state(f"{folder}/state")
    weights = engine.get_state_dict(model)
    found = steps(name, engine, model, optimizer, batches[2:], loss_of)
    engine.free_memory()
    return {**found, "saved": weights, "weights": {}}


def held_numel() -> tuple[int, int]:
    """Return how many elements this rank holds of a model, and how many that has."""
    engine = distui.Engine(strategy={"pipeline_parallel": 2}, batch={"accumulation": 2})
    model = deep_llama()
    total = sum(param.numel() for param in model.parameters())
    model = engine.prepare(model)
    held = sum(param.numel() for param in model.parameters())
    engine.free_memory()
    return held, total


def blocked_s() -> float:
    """Return how long this rank's forward waited for messages, as a step's record has it."""
    engine, model, _, loader = prepared("llama", 2, 0)
    batch = next(iter(loader))
    engine.backward(loss_of("llama", model, batch))
    found = engine.clock.exposed_comm_s
    engine.free_memory()
    return found
