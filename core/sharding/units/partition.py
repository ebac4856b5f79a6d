"""Which parameters form a unit: the model's repeated blocks, and what lies around them.

A block is a child of a ModuleList or Sequential whose children are all of one class, or a module of a class that the
model names in `_no_split_modules` (transformers); a model that is nothing but a row of blocks may list them itself.
Parameters that lie outside the blocks, or that several modules or blocks share, belong to the root: it is gathered for
as long as any part of the model runs, because code may read such a parameter without calling the module that holds it
(`x @ self.embedding.weight.T`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

SMALL_UNIT_NUMEL = 1 << 21
"""Neighbouring blocks are joined up to this size: a collective of less costs more in latency than in bytes.

With 48 blocks of 0.2M parameters, joining took the CPU time of stage 3 over bare compute from 95% to 19%
(`benchmarks/engine.py --model deep`).
"""


CODES = (torch.int8, torch.uint8)
"""Formats of quantized weights, which are frozen; parameters of other whole numbers stay whole on each rank.

While codes are not here they read as 0, since they have no nan; the scales beside them are nan then.
"""


@dataclass(slots=True)
class UnitSpec:
    """One unit: its parameters, and the modules before whose forward it must be there (none: the root's)."""

    name: str
    is_root: bool
    modules: list[nn.Module] = field(default_factory=list)
    params: list[tuple[str, nn.Parameter]] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(param.numel() for _, param in self.params)


OWN_BLOCKS = "_distui_blocks"
"""Where a model lists its blocks as (name, module), each called with what the one before gave; any class."""


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the repeated blocks with their names, outermost only, in registration order."""
    if (own := vars(model).get(OWN_BLOCKS)) is not None:
        return list(own)
    named_by_model = set(getattr(model, "_no_split_modules", None) or ())

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1:
            kinds = {type(child) for _, child in children}
            if len(kinds) == 1 and all(next(child.parameters(), None) is not None for _, child in children):
                yield from children
                return
        for name, child in children:
            if type(child).__name__ in named_by_model:
                yield name, child
            else:
                yield from walk(f"{name}.", child)

    seen: set[int] = set()
    blocks = []
    for name, block in walk("", model):
        if id(block) not in seen:
            seen.add(id(block))
            blocks.append((name, block))
    return blocks


def shared_params(model: nn.Module) -> set[int]:
    """Return the identities of parameters that more than one module holds."""
    holders: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                holders[id(param)] += 1
    return {identity for identity, count in holders.items() if count > 1}


def partition(model: nn.Module) -> list[UnitSpec]:
    """Cut the model's parameters (floating-point and codes) into units, in registration order, each in exactly one.

    The root is cut where blocks stand between its parts, so that the part behind the blocks, whose gradients come
    first, need not wait for the part before them. Parameters shared between modules go to the first root part, whose
    gradients come last.
    """
    blocks = find_blocks(model)
    shared = shared_params(model)
    block_of: dict[int, int] = {}
    for index, (_, block) in enumerate(blocks):
        for param in block.parameters():
            if block_of.setdefault(id(param), index) != index:
                shared.add(id(param))

    first_root = UnitSpec("root", is_root=True)
    units: list[UnitSpec] = []
    block_units: dict[int, UnitSpec] = {}
    current_root: UnitSpec | None = None
    for name, param in model.named_parameters():
        if not param.is_floating_point() and param.dtype not in CODES:
            continue
        if id(param) in shared:
            first_root.params.append((name, param))
            continue
        block_index = block_of.get(id(param))
        if block_index is None:
            if current_root is None:
                current_root = UnitSpec(f"root.{len(units)}", is_root=True)
                units.append(current_root)
            current_root.params.append((name, param))
            continue
        current_root = None
        if block_index not in block_units:
            block_name, block = blocks[block_index]
            block_units[block_index] = UnitSpec(block_name, is_root=False, modules=[block])
            units.append(block_units[block_index])
        block_units[block_index].params.append((name, param))
    if first_root.params or (units and units[0].is_root):
        # One root part in front of everything: the shared parameters and what stands before the blocks.
        if units and units[0].is_root:
            first_root.params += units.pop(0).params
        units.insert(0, first_root)
    return _join_small([unit for unit in units if unit.params])


def _join_small(units: list[UnitSpec]) -> list[UnitSpec]:
    joined: list[UnitSpec] = []
    for unit in units:
        last = joined[-1] if joined else None
        if last and not last.is_root and not unit.is_root and last.numel + unit.numel <= SMALL_UNIT_NUMEL:
            last.name = f"{last.name}+{unit.name}"
            last.modules += unit.modules
            last.params += unit.params
        else:
            joined.append(unit)
    return joined


def split_by_kind(
    spec: UnitSpec,
    optimizer_of: Mapping[int, int] = MappingProxyType({}),
    is_expert: Callable[[nn.Parameter], bool] = lambda param: False,
) -> list[tuple[torch.dtype, bool, list[tuple[str, nn.Parameter]]]]:
    """Split a unit's parameters by dtype, requires_grad and optimizer: one flat buffer holds one kind.

    Optimizers that step at different times (of a generator and its critic) must not make each other's parameters old.
    Experts over ranks have their states among others.
    """
    kinds: dict[tuple[torch.dtype, bool, int, bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, param in spec.params:
        kinds[param.dtype, param.requires_grad, optimizer_of.get(id(param), 0), is_expert(param)].append((name, param))
    return [(dtype, requires_grad, params) for (dtype, requires_grad, *_), params in kinds.items()]
