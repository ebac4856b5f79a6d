"""`python -m distui.launcher.probes.model_probe SPEC OUT`: builds a script's model on the meta device, says what it is.

SPEC is JSON: {"file", "function", "sequence_length"}. No weight is allocated. Started by `script_model`, because the
planner itself never imports torch.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from distui.core.sharding.units.partition import find_blocks

HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "nhead")
LENGTHS = ("max_position_embeddings", "n_positions", "context", "context_length", "block_size", "max_seq_len")


class ProbeError(Exception):
    """Why the model cannot be measured, for the user."""


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """Return the function of the script, run as a module of another name than `__main__`.

    Raises: ProbeError where the script fails, or has no such function.
    """
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ProbeError(f"running {file} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ProbeError(f"{file} has no function {name}; it has {', '.join(sorted(known)) or 'none'}")
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ProbeError(f"{name} needs arguments: {', '.join(needed)}; it is called without any")
    assert callable(function)
    return function


def build(function: Callable[..., Any]) -> tuple[nn.Module, Any]:
    """Return the model on the meta device, and the example inputs where the function gives them as well.

    Raises: ProbeError where building fails or gives no module.
    """
    try:
        with torch.device("meta"):
            built = function()
    except Exception as error:
        raise ProbeError(f"building on the meta device failed: {type(error).__name__}: {error}") from error
    model, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ProbeError(f"the function gave {type(model).__name__}, not a torch.nn.Module")
    return model.to("meta"), inputs


def unique(tensors: Any) -> int:
    """Return the elements of `tensors`, each counted once."""
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())


def attribute(model: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first number that the model's config, or one of its modules, has under one of `names`."""
    for owner in (getattr(model, "config", None), *model.modules()):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def shapes(model: nn.Module, sequence_length: int | None) -> dict[str, Any]:
    """Return the sizes that the planner needs, from the modules themselves."""
    blocks = [block for _, block in find_blocks(model)]
    sizes = [unique(block.parameters()) for block in blocks] or [unique(model.parameters())]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    widths = Counter(param.shape[-1] for param in model.parameters() if param.dim() == 1)
    token = max(embeddings, key=lambda module: module.num_embeddings, default=None)
    hidden = token.embedding_dim if token is not None else (widths.most_common(1)[0][0] if widths else 1)
    inner = [
        max(layer.in_features, layer.out_features)
        for block in blocks
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    ]
    vocab = token.num_embeddings if token is not None else (linears[-1].out_features if linears else 1)
    tied = token is not None and any(layer.weight is token.weight for layer in linears)
    length = sequence_length or attribute(model, LENGTHS)
    if length is None:
        # A learned position embedding is as long as the longest sequence.
        positions = [module.num_embeddings for module in embeddings if module is not token]
        length = min(positions, default=2048) if embeddings else 1
    head = vocab * hidden if linears and linears[-1].out_features == vocab else 0
    looked_up = unique(module.weight for module in embeddings) - (head if tied else 0)
    return {
        "name": type(model).__name__,
        "num_parameters": unique(model.parameters()),
        "num_trainable": unique(param for param in model.parameters() if param.requires_grad),
        "num_layers": max(1, len(blocks)),
        "block_parameters": sum(sizes) // len(sizes),
        "largest_block_parameters": max(sizes),
        "hidden_size": hidden,
        "num_heads": attribute(model, HEADS) or max(1, hidden // 64),
        "num_kv_heads": attribute(model, ("num_key_value_heads", "num_kv_heads", "n_kv_head")),
        "intermediate_size": max(inner, default=4 * hidden),
        "vocab_size": vocab,
        "sequence_length": length,
        "tied_embeddings": tied,
        "head_parameters": head,
        "embedding_parameters": looked_up,
        "has_tokens": token is not None,
    }


class FusedAttention(torch.autograd.Function):
    """What a fused attention keeps: queries, keys, values and its output, and no score matrix."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the output's shape."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        """Never runs: only a forward is measured."""
        return None, None, None


@contextmanager
def fused_attention(flops: list[float]) -> Iterator[None]:
    """Let attention be a fused one, as it is on devices, and add the FLOPs of each call to `flops`.

    The meta device has only the unfused form, which keeps every score.
    """
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        flops.append(
            2.0 * query.numel() * key.shape[-2] + 2.0 * query[..., 0].numel() * key.shape[-2] * value.shape[-1]
        )
        output = FusedAttention.apply(query, key, value)
        assert isinstance(output, torch.Tensor)
        return output

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def measure(model: nn.Module, inputs: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Return FLOPs and saved elements of one sample's forward on the meta device, or why there are none."""
    if inputs is None:
        if not found["has_tokens"]:
            return {"note": "no example inputs (return model, inputs): FLOPs and activations follow from the shapes"}
        inputs = torch.zeros(1, found["sequence_length"], dtype=torch.long, device="meta")
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)
    parameters = {param.untyped_storage()._cdata for param in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    attended: list[float] = []
    try:
        with fused_attention(attended), torch.device("meta"), counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            if isinstance(inputs, dict):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
    except Exception as error:  # noqa: BLE001  a foreign forward may fail in any way, and the shapes still count
        return {"note": f"forward on the meta device failed ({type(error).__name__}: {str(error).splitlines()[0]})"}
    samples = next(
        (leaf.shape[0] for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)), 1
    )
    elements = sum(tensor.untyped_storage().nbytes() / tensor.element_size() for tensor in saved.values())
    return {
        "flops_per_sample": (counter.get_total_flops() + sum(attended)) / samples,
        "saved_per_sample": elements / samples,
    }


def main(spec: dict[str, Any], out: Path) -> None:
    """Write the model's sizes, or an `error`."""
    try:
        model, inputs = build(load_function(Path(spec["file"]).absolute(), spec["function"]))
        found = shapes(model, spec.get("sequence_length"))
        if not found["num_parameters"]:
            raise ProbeError("the model has no parameters")
        found |= measure(model, inputs, found)
    except ProbeError as error:
        found = {"error": str(error)}
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
