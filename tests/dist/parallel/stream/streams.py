"""Trainings of which the hidden state is cut along the sequence between attention and feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from tests.dist.parallel import trainings
from tests.dist.parallel.experts import _mixtral
from tests.dist.parallel.trainings import loss_of, prepared, trained

import distui
from distui.core.errors import UserError


def _dropping() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": trainings.VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.0, attn_pdrop=0.0))


trainings.MODELS |= {"mixtral-sp": lambda: _mixtral(), "gpt2-dropping": _dropping}
Case = tuple[str, int, int, dict[str, Any]]
"""A model, tensor-parallel ranks, the ZeRO stage, and settings."""


def even_loss(name: str, model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    return loss_of(name, model, ids_BT[:, :8])


def train(name: str, tensor: int, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    given = dict(sections)
    strategy = {"sequence_parallel": tensor > 1, **given.pop("strategy", {})}
    loss = even_loss if "context_parallel" in strategy else loss_of
    return trained(name, *prepared(name, tensor, stage, strategy=strategy, **given), loss)


def several(cases: list[Case]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [train(*case) for case in cases]


def saved_bytes(mode: str, name: str = "llama", dtype: str = "fp32") -> tuple[int, int]:
    """Return the bytes of what autograd keeps of a forward of the blocks, without and with their hidden state cut."""
    return _saved_bytes(False, mode, name, dtype), _saved_bytes(True, mode, name, dtype)


def _saved_bytes(along_sequence: bool, mode: str, name: str, dtype: str) -> int:
    """Each memory once, parameters aside."""
    strategy, recomputes = {"sequence_parallel": along_sequence}, {"mode": mode}
    precision = {"dtype": dtype}
    engine, model, _, loader = prepared(
        name, 2, 0, strategy=strategy, activation_checkpointing=recomputes, precision=precision
    )
    ids_BT, own = next(iter(loader)), {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Of the blocks alone: embedding, last norm and head are as without.
        hidden_BTD = model.model(input_ids=ids_BT[:, :8]).last_hidden_state
    hidden_BTD.sum().backward()
    engine.free_memory()
    return sum(kept.values())


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Return, of two forwards, what dropout left between blocks: with recomputation gradients must be of the same."""
    engine = distui.Engine(strategy={"tensor_parallel": 2, "sequence_parallel": True})
    model = engine.prepare(trainings.build("gpt2-dropping"))
    seen: list[torch.Tensor] = []
    model.transformer.h[0].mlp.dropout.register_forward_hook(lambda module, args, output: seen.append(output == 0))
    ids_BT = torch.stack(trainings.samples()[:4])[:, :8]
    for _ in range(2):
        engine.backward(model(input_ids=ids_BT, labels=ids_BT).loss)
    after = torch.randn(3)
    engine.free_memory()
    return torch.stack(seen), after


def recomputed_gradients(mode: str) -> dict[str, torch.Tensor]:
    """Return gradients of a model with dropout."""
    engine = distui.Engine(
        strategy={"tensor_parallel": 2, "sequence_parallel": True}, activation_checkpointing={"mode": mode}
    )
    model = trainings.build("gpt2-dropping")
    model, _ = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids_BT = torch.stack(trainings.samples()[:4])
    torch.manual_seed(5)
    engine.backward(model(input_ids=ids_BT, labels=ids_BT).loss)
    with engine.gradients(model) as found:
        kept = {name: grad.clone() for name, grad in found.items()}
    engine.free_memory()
    return kept


def evaluated() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of a short and an odd sequence, without gradients."""
    engine = distui.Engine(strategy={"tensor_parallel": 2, "sequence_parallel": True})
    model = engine.prepare(trainings.build("llama")).eval()
    ids_BT = torch.stack(trainings.samples()[:4])
    with torch.no_grad():
        found = model(input_ids=ids_BT[:, :1]).logits, model(input_ids=ids_BT).logits
    engine.free_memory()
    return found


def refusals(kinds: list[str]) -> list[str]:
    return [_refusal(kind) for kind in kinds]


def _refusal(kind: str) -> str:
    engine = distui.Engine(strategy={"tensor_parallel": 2, "sequence_parallel": True})
    try:
        plan = trainings.AWKWARD_PLAN if kind == "awkward" else None
        model = engine.prepare(trainings.build("llama" if kind == "states" else kind), plan=plan)
        if isinstance(model, tuple):
            model = model[0]
        ids_BT = torch.stack(trainings.samples()[:4])
        model(input_ids=ids_BT, output_hidden_states=True)
    except UserError as error:
        return f"{error.what}: {error.why}"
    finally:
        engine.free_memory()
    return "nothing"
