"""Where a plan comes from: the user, the model's own table (transformers), or the families that are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from distui.core.errors import UserError
from distui.core.parallel.families import parts_of
from distui.core.parallel.styles import STYLES

Plan = dict[str, str]
"""Styles by the names of modules, parameters, or numbers that a module holds."""
WITHOUT_MODULE = ("divide", "attention")
_SHOWN = 6


def plan_of(model: nn.Module, text: str, given: Mapping[str, str]) -> Plan:
    """Return the style of everything that is cut, by its full name.

    Raises: UserError for a rule of the user's that matches nothing, a style that is unknown, or where there is no plan.
    """
    own = {**_parsed(text), **given}
    if own:
        found: Plan = {}
        for pattern, style in own.items():
            names = [name for name in _names(model, style) if _matches(pattern, name)]
            if not names:
                raise UserError(
                    f"the rule {pattern}={style} of the tensor plan matches nothing",
                    f"nothing in {type(model).__name__} has such a name; it has {_example(model)}",
                    "write names as named_modules() gives them, with * for one part, such as layers.*.mlp.up_proj",
                )
            found |= dict.fromkeys(names, style)
    else:
        found = _by_tables(model) | {}
        if not found:
            raise _no_plan(model)
    for name, style in found.items():
        if style.partition(":")[0] not in STYLES and style not in WITHOUT_MODULE:
            raise UserError(
                f"the style {style} of {name} is unknown",
                f"known: {', '.join([*STYLES, 'divide'])}",
                "give a plan of your own: strategy.tensor_plan, or engine.prepare(..., plan={name: style})",
            )
    return found


def _parsed(text: str) -> Plan:
    found = {}
    for rule in filter(None, (part.strip() for part in text.split(","))):
        pattern, equals, style = (part.strip() for part in rule.partition("="))
        if not (pattern and equals and style):
            raise UserError(
                f"strategy.tensor_plan has {rule!r}",
                "a rule is name=style",
                "write such as blocks.*.up=colwise,blocks.*.down=rowwise",
            )
        found[pattern] = style
    return found


def _names(model: nn.Module, style: str) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        yield name
        held: list[Any] = [*module._parameters, *(vars(module) if style == "divide" else ())]
        for own in held:
            yield f"{name}.{own}" if name else own


def _matches(pattern: str, name: str) -> bool:
    parts, names = pattern.split("."), name.split(".")
    return len(parts) == len(names) and all(a in ("*", b) for a, b in zip(parts, names, strict=True))


def _by_tables(model: nn.Module) -> Plan:
    """Return the plans of all modules that bring one; where none around a module does, its family's."""
    found: Plan = {}
    covered: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if any(name == outer or name.startswith(f"{outer}.") or not outer for outer in covered):
            continue
        table = _own_table(module)
        if table:
            covered.append(name)
            names = [*dict(module.named_modules()), *dict(module.named_parameters(remove_duplicate=False))]
            for pattern, style in table.items():
                found |= {f"{prefix}{inner}": style for inner in names if _matches(pattern, inner)}
            continue
        for part, style in parts_of(module).items():
            if part == "" or _is_there(module, part):
                found[f"{prefix}{part}" if part else name] = style
    return found


def _own_table(module: nn.Module) -> Plan:
    table = getattr(module, "_tp_plan", None)
    if isinstance(table, dict) and table:
        return table
    table = getattr(getattr(module, "config", None), "base_model_tp_plan", None)
    prefix = getattr(module, "base_model_prefix", "")
    if not isinstance(table, dict) or not table or not prefix:
        return {}
    inside = f"{prefix}." if hasattr(module, prefix) else ""
    return {f"{inside}{pattern}": style for pattern, style in table.items()}


def _is_there(module: nn.Module, part: str) -> bool:
    found: Any = module
    for name in part.split("."):
        found = getattr(found, name, None)
    return found is not None


def _example(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if name and not list(module.children())]
    return f"{', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"


def _no_plan(model: nn.Module) -> UserError:
    large = sorted(
        ((module.weight.numel(), name, module) for name, module in model.named_modules() if _is_matrix(module)),
        key=lambda found: -found[0],
    )
    shown = [f"{name} {tuple(module.weight.shape)}" for _, name, module in large[:_SHOWN]]
    return UserError(
        f"no tensor-parallel plan is known for {type(model).__name__}",
        f"{len(large)} matrices are covered by none: {', '.join(shown)}{' ...' if len(large) > _SHOWN else ''}",
        "name styles in strategy.tensor_plan, or engine.prepare(..., plan={...}): "
        "'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'; or set strategy.tensor_parallel to 1",
    )


def _is_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2
