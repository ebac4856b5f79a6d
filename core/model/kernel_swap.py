"""Puts kernels into the modules of a model, and takes them out again.

A module is recognised by what it computes, not by its name: its class's own forward is run on a small sample and must
give what the kernel's reference gives. What does not is left, with the reason. A swapped module keeps its class, its
parameters, its hooks and its keys in the state dict; it only gets a `forward` of its own, as an attribute.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distui.core.errors import UserError
from distui.kernels.linear_cross_entropy import linear_cross_entropy
from distui.kernels.rms_norm import rms_norm, rms_norm_reference
from distui.kernels.rotary import rotary, rotary_reference
from distui.kernels.swiglu import swiglu

KINDS = ("rms_norm", "swiglu", "rotary", "cross_entropy")
_MARK = "distui_kernel"
_MLP_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "", "down_proj"))
Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Left:
    """A module that a kernel might have served and does not."""

    name: str
    kind: str
    why: str


@dataclass(slots=True)
class KernelReport:
    """What `apply_kernels` did to a model."""

    model: nn.Module
    swapped: dict[str, list[str]] = field(default_factory=dict)
    """Names of the modules by kind."""
    left: list[Left] = field(default_factory=list)

    def undo(self) -> None:
        """Give every module its own forward back."""
        undo_kernels(self.model)

    def __str__(self) -> str:
        lines = [f"{kind}: {len(self.swapped.get(kind, []))} modules" for kind in KINDS if kind in self.swapped]
        reasons: dict[tuple[str, str], list[str]] = {}
        for left in self.left:
            reasons.setdefault((left.kind, left.why), []).append(left.name)
        for (kind, why), names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{kind}: left {names[0] or 'the model'}{more}: {why}")
        return "\n".join(lines) or "no module that a kernel serves"


def apply_kernels(model: nn.Module, kinds: Iterable[str] = KINDS, *, use_triton: bool | None = None) -> KernelReport:
    """Put kernels into the known modules of `model`, in place, before or after it is prepared.

    `use_triton` None takes the Triton kernels for tensors on a GPU and plain torch for others.

    Raises: UserError for an unknown kind.
    """
    wanted = tuple(kinds)
    if unknown := sorted(set(wanted) - set(KINDS)):
        raise UserError(f"no kernel is called {unknown[0]!r}", f"there are {', '.join(KINDS)}", "name some of these")
    undo_kernels(model)
    report = KernelReport(model, {kind: [] for kind in wanted})
    tables: dict[Any, Any] = {}
    for name, module in model.named_modules():
        for kind in wanted:
            found = _FINDERS[kind](module, use_triton, tables)
            if found is None:
                continue
            if "forward" in vars(module):
                found = "its forward was replaced by somebody already"
            if isinstance(found, str):
                report.left.append(Left(name, kind, found))
                continue
            for target, forward in found:
                setattr(forward, _MARK, kind)
                target.forward = types.MethodType(forward, target)
            report.swapped[kind].append(name)
    return report


def undo_kernels(model: nn.Module) -> None:
    """Give the modules of `model` their own forward back."""
    for module in model.modules():
        if hasattr(vars(module).get("forward"), _MARK):
            del module.forward


def _stand_in(module: nn.Module, params: dict[str, Any], modules: dict[str, Any]) -> Any:
    """Return a module of the same class and settings with other parameters and children, and without hooks."""
    other = copy.copy(module)
    empty: dict[str, Any] = {name: type(vars(module)[name])() for name in vars(module) if name.endswith("_hooks")}
    other.__dict__.update(empty, _parameters=params, _modules=modules, _buffers={}, training=False)
    return other


def _sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _original(module: nn.Module) -> Forward:
    forward: Forward = type(module).forward
    return forward


Found = list[tuple[nn.Module, Forward]] | str | None
"""Modules with their new forward; or why not; or None where the module is no candidate."""


# ---- RMSNorm ------------------------------------------------------------------------------------------------------


def _find_rms_norm(module: nn.Module, use_triton: bool | None, seen: dict[Any, Any]) -> Found:
    name = type(module).__name__
    if "RMSNorm" not in name and name != "T5LayerNorm":
        return None
    params: dict[str, Any] = dict(module.named_parameters(recurse=False))
    weight = params.pop("weight", None)
    if params or list(module.children()):
        return f"it has more than a weight: {', '.join([*params, *(n for n, _ in module.named_children())])}"
    if weight is None and not isinstance(module, nn.RMSNorm):
        return "it has no weight"
    shape = tuple(module.normalized_shape) if isinstance(module, nn.RMSNorm) else tuple(weight.shape)
    if len(shape) != 1:
        return f"it normalises over {len(shape)} dimensions"
    found = next((attr for attr in ("variance_epsilon", "eps", "epsilon") if hasattr(module, attr)), None)
    if found is None:
        return "it has no eps, variance_epsilon or epsilon"
    variant = _rms_variant(module, shape[0], found, weight is None)
    if isinstance(variant, str):
        return variant
    offset, round_first = variant
    # One function for all alike: a compiled block must not be compiled again for every layer.
    if (found, variant) not in seen:
        seen[found, variant] = _norm_forward(found, offset, round_first, use_triton)
    return [(module, seen[found, variant])]


def _norm_forward(eps_name: str, offset: float, round_first: bool, use_triton: bool | None) -> Forward:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        eps = getattr(self, eps_name)
        return rms_norm(
            x,
            self.weight,
            eps=torch.finfo(x.dtype).eps if eps is None else eps,
            offset=offset,
            round_first=round_first,
            use_triton=use_triton,
        )

    return forward


def _rms_variant(module: nn.Module, width: int, eps_name: str, bare: bool) -> tuple[float, bool] | str:
    """Return which offset and which order of rounding the module computes with."""
    weight = None if bare else nn.Parameter(_sample(width))
    low = None if weight is None else nn.Parameter(weight.bfloat16())
    x = _sample(8, width)
    eps = getattr(module, eps_name)
    try:
        with torch.no_grad():
            wide = _original(module)(_stand_in(module, {"weight": weight}, {}), x)
            half = _original(module)(_stand_in(module, {"weight": low}, {}), x.bfloat16())
    except Exception as error:  # noqa: BLE001 - foreign code on a sample of ours; whatever it raises is the reason
        return f"its forward failed on a sample: {type(error).__name__}: {error}"
    best: tuple[int, float, bool] | None = None
    for offset in (0.0, 1.0):
        for round_first in (False, True):
            wide_eps, half_eps = (torch.finfo(t.dtype).eps if eps is None else eps for t in (x, x.bfloat16()))
            with torch.no_grad():
                ours = rms_norm_reference(x, weight, eps=wide_eps, offset=offset, round_first=round_first)
                low_ours = rms_norm_reference(x.bfloat16(), low, eps=half_eps, offset=offset, round_first=round_first)
            if ours.shape != wide.shape or not torch.allclose(ours, wide, atol=1e-5, rtol=1e-5):
                continue
            if low_ours.dtype != half.dtype or not torch.allclose(low_ours, half, atol=0.02, rtol=0.02):
                continue
            differing = int((low_ours != half).sum())
            if best is None or differing < best[0]:
                best = (differing, offset, round_first)
    return best[1:] if best is not None else "on a sample it does not give x / rms(x) * weight"


# ---- SwiGLU -------------------------------------------------------------------------------------------------------


def _find_swiglu(module: nn.Module, use_triton: bool | None, seen: dict[Any, Any]) -> Found:
    children = dict(module.named_children())
    names = next((names for names in _MLP_NAMES if all(name in children for name in names if name)), None)
    if names is None:
        return None
    rest = {name: child for name, child in children.items() if name not in names}
    stateful = [
        n for n, child in rest.items() if isinstance(child, nn.Dropout) or any(True for _ in child.parameters())
    ]
    if stateful or any(True for _ in module.parameters(recurse=False)):
        return f"it has other parts: {', '.join(stateful) or 'parameters of its own'}"

    if names not in seen:
        seen[names] = _mlp_forward(*names, use_triton)
    return _why_not_swiglu(module, names, rest, seen[names]) or [(module, seen[names])]


def _mlp_forward(gate_name: str, up_name: str, down_name: str, use_triton: bool | None) -> Forward:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if up_name:
            gate, up = getattr(self, gate_name)(x), getattr(self, up_name)(x)
        else:
            gate, up = getattr(self, gate_name)(x).chunk(2, dim=-1)
        out: torch.Tensor = getattr(self, down_name)(swiglu(gate, up, use_triton=use_triton))
        return out

    return forward


def _why_not_swiglu(module: nn.Module, names: tuple[str, ...], rest: dict[str, nn.Module], forward: Forward) -> str:
    sample_size = {names[0]: (8, 12 if names[1] else 24), names[1]: (8, 12), names[2]: (12, 8)}
    small: dict[str, Any] = {}
    for seed, (name, (wide, tall)) in enumerate(sample_size.items()):
        if name:
            # Without the random numbers that a constructor would take from the script's generator.
            small[name] = nn.utils.skip_init(nn.Linear, wide, tall, bias=False)
            small[name].weight = nn.Parameter(torch.randn(tall, wide, generator=torch.Generator().manual_seed(seed)))
    probe = _stand_in(module, {}, {**rest, **small})
    x = _sample(3, 8)
    try:
        with torch.no_grad():
            theirs = _original(module)(probe, x)
            ours = forward(probe, x)
    except Exception as error:  # noqa: BLE001 - foreign code on a sample of ours; whatever it raises is the reason
        return f"its forward failed on a sample: {type(error).__name__}: {error}"
    same = isinstance(theirs, torch.Tensor) and torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)
    return "" if same else "on a sample it does not give down(silu(gate) * up)"


# ---- rotary embedding ---------------------------------------------------------------------------------------------


def _find_rotary(module: nn.Module, use_triton: bool | None, seen: dict[Any, Any]) -> Found:
    forward = _original(module)
    code = getattr(forward, "__code__", None)
    if code is None or hasattr(forward, "__wrapped__"):
        code = getattr(inspect.unwrap(forward), "__code__", None)
    name = next((n for n in getattr(code, "co_names", ()) if "apply" in n and "rotary_pos_emb" in n), None)
    if name is None:
        return None
    if hasattr(forward, "__wrapped__"):
        return f"{type(module).__name__}.forward is decorated"
    theirs = forward.__globals__.get(name)
    if theirs is None:
        return f"{name} is no function of its module"
    if theirs not in seen:
        seen[theirs] = _why_not_rotary(theirs, name)
    if seen[theirs]:
        return str(seen[theirs])
    key = (theirs, forward)
    if key not in seen:
        seen[key] = _with_global(forward, name, _turn_both(theirs, use_triton))
    return [(module, seen[key])]


def _turn_both(theirs: Forward, use_triton: bool | None) -> Forward:
    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> Any:
        plain = unsqueeze_dim in (1, 2) and q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        if not plain:  # a part of a head is turned, or the layout is another
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return (
            rotary(q, cos, sin, unsqueeze_dim, use_triton=use_triton),
            rotary(k, cos, sin, unsqueeze_dim, use_triton=use_triton),
        )

    return apply_rotary_pos_emb


def _with_global(function: Any, name: str, value: Any) -> Forward:
    """Return `function` as it would be if the global `name` of its module were `value`; the module stays as it is."""
    scope = {**function.__globals__, name: value}
    # torch.compile looks a function's globals up in the module of this name, where `name` is still the old one.
    scope.pop("__name__", None)
    twin = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _why_not_rotary(theirs: Forward, name: str) -> str:
    if list(inspect.signature(theirs).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return f"{name} takes other arguments than q, k, cos, sin, unsqueeze_dim"
    q, k, cos, sin = _sample(2, 3, 5, 8), _sample(2, 1, 5, 8), _sample(2, 5, 8), _sample(2, 5, 8).flip(0)
    try:
        pair = theirs(q, k, cos, sin)
    except Exception as error:  # noqa: BLE001 - foreign code on a sample of ours; whatever it raises is the reason
        return f"{name} failed on a sample: {type(error).__name__}: {error}"
    same = all(torch.allclose(y, rotary_reference(x, cos, sin)) for x, y in zip((q, k), pair, strict=True))
    return "" if same else f"on a sample {name} does not turn the halves of a head"


# ---- cross-entropy ------------------------------------------------------------------------------------------------


def _find_cross_entropy(module: nn.Module, use_triton: bool | None, seen: dict[Any, Any]) -> Found:
    head = getattr(module, "lm_head", None)
    from_transformers = any(base.__module__.startswith("transformers.") for base in type(module).__mro__)
    if not isinstance(head, nn.Module) or not from_transformers:
        return None
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    code, known = (inspect.unwrap(f).__code__ for f in (_original(module), LlamaForCausalLM.forward))
    if (code.co_code, code.co_names) != (known.co_code, known.co_names):
        return f"{type(module).__name__}.forward does more than lm_head and loss_function"
    if getattr(getattr(module, "loss_function", None), "__name__", "") != "ForCausalLMLoss":
        return "its loss is not the plain causal one"
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head) or hasattr(head.weight, "placements"):
        return f"lm_head is no plain nn.Linear but {type(head).__name__}, or its weight is distributed"
    return [(module, _causal_forward(_original(module))), (head, _head_forward(use_triton))]


def _causal_forward(original: Forward) -> Forward:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels, keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        as_tuple = not kwargs.get("return_dict", True) or not getattr(self.config, "return_dict", True)
        if (
            not self.training
            or labels is None
            or len(args) > 1
            or as_tuple
            or not (isinstance(keep, int) and keep == 0)
        ):
            return original(self, *args, **kwargs)
        rest = {key: value for key, value in kwargs.items() if key not in ("labels", "logits_to_keep", "return_dict")}
        outputs = self.model(*args, **rest)
        wanted = {key: rest[key] for key in ("num_items_in_batch", "ignore_index", "shift_labels") if key in rest}
        # Through lm_head's own call, so that what gathers its weight for a forward does it here too.
        loss = self.lm_head(outputs.last_hidden_state, labels=labels, **wanted)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(
            loss=loss,
            logits=None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    return forward


def _head_forward(use_triton: bool | None) -> Forward:
    def forward(
        self: Any,
        input: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if labels is None:
            return F.linear(input, self.weight, self.bias)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = linear_cross_entropy(
            input.reshape(-1, input.shape[-1]),
            self.weight,
            shift_labels.reshape(-1).to(input.device),
            self.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            use_triton=use_triton,
        )
        if num_items_in_batch is None:
            return loss
        return loss / (
            num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
        )

    return forward


_FINDERS: dict[str, Callable[[nn.Module, bool | None, dict[Any, Any]], Found]] = {
    "rms_norm": _find_rms_norm,
    "swiglu": _find_swiglu,
    "rotary": _find_rotary,
    "cross_entropy": _find_cross_entropy,
}
