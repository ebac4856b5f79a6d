"""A stage of a pipeline, made of a model without a change to it.

Every rank runs the model's own forward on the same batch. Blocks that it does not hold give back at once what was
received from the stage before, modules in front of its first block give placeholders, and behind its last block a
private exception leaves the forward; so masks, positions and whatever else lies around the blocks are computed as ever,
on each rank. What would make this another computation is looked for and refused: blocks called in another order, a
hidden state that is changed between two blocks, placeholders (NaN) that reach a block by another way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from distui.core.axes.cut import Cut
from distui.core.axes.groups import Axes
from distui.core.axes.schedules import split
from distui.core.errors import UserError
from distui.core.parallel.messages import Parts
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.hooks import Hook
from distui.core.sharding.start.initialise import make_real
from distui.core.sharding.start.start import Start
from distui.core.sharding.units.guarded import DATA
from distui.core.sharding.units.partition import find_blocks

LOOKED_AT = 2
"""In so many forwards of the beginning placeholders are looked for in what a stage's first block is given."""
OWN_PARTS = "_distui_parts"
"""Where a model says which of its blocks each stage has; else their costs tell."""
ALL, ENDS = "all stages", "the first and the last stage"
_ALONE = "set strategy.pipeline_parallel to 1"


class _Leave(BaseException):
    """Ends a forward behind the stage's last block; no `except Exception` of a model catches it."""

    def __init__(self, stage: Stage, output: Any) -> None:
        super().__init__()
        self.stage, self.output = stage, output


class Left:
    """What a stage but the last hands on."""

    def __init__(self, parts: Parts, is_tuple: bool) -> None:
        self.parts, self.is_tuple = parts, is_tuple


class Stage:
    """What one rank holds of a model, and the model's forward as far as that goes."""

    def __init__(self, model: nn.Module, axes: Axes) -> None:
        """Choose the blocks of each stage by their costs. Raises: UserError for fewer blocks than stages."""
        self.model, self.index, self.num_stages = model, axes.index("pp"), axes.size("pp")
        self.blocks = find_blocks(model)
        if len(self.blocks) < self.num_stages:
            raise UserError(
                f"pipeline_parallel={self.num_stages} with {len(self.blocks)} blocks in {type(model).__name__}",
                "each stage holds one block at least; blocks are modules of one class in a ModuleList or Sequential, "
                "or of the classes that the model names in _no_split_modules",
                f"set strategy.pipeline_parallel to {f'{most} or less' if (most := len(self.blocks)) > 1 else '1'}",
            )
        self._place_modules()
        own_parts: list[range] | None = vars(model).get(OWN_PARTS)
        costs = [float(sum(param.numel() for param in block.parameters())) for _, block in self.blocks]
        behind = sum(_cost(module) for module in self.behind.values())
        front = sum(_cost(module) for module in self.front.values())
        self.parts = own_parts or split(costs, self.num_stages, front, behind)
        own = self.parts[self.index]
        self.low, self.high = own.start, own.stop
        self.is_first, self.is_last = self.index == 0, self.index == self.num_stages - 1
        self.holders = self._find_holders()
        """The stages that hold a parameter, by its identity."""
        self.shared = {
            number: ENDS if len(stages) < self.num_stages else ALL
            for number, stages in self.holders.items()
            if len(stages) > 1
        }
        """Who holds it, of what several stages hold."""
        self._shapes: dict[int, tuple[int, ...]] = {}
        """Of parameters, as this stage's tensor-parallel rank would hold them, by identity."""
        self._received: Any = None
        self._expected = 0
        self._hidden: Any = None
        self._looked = 0
        self._handles: list[Any] = []
        self._replaced: list[nn.Module] = []

    # ---- who holds what --------------------------------------------------------------------------------------------

    def _place_modules(self) -> None:
        """Sort the modules outside of the blocks that hold parameters: registered in front of them, or behind."""
        names = [name for name, _ in self.blocks]
        inside = {id(inner) for _, block in self.blocks for inner in block.modules()}
        self.front: dict[str, nn.Module] = {}
        self.behind: dict[str, nn.Module] = {}
        self.around: dict[str, nn.Module] = {}
        """Those that the blocks are in: their own parameters are read by whatever stage comes to it."""
        reached = False
        for name, module in self.model.named_modules():
            if id(module) in inside:
                reached = True
            elif any(param is not None for param in module._parameters.values()):
                is_around = not name or any(block.startswith(f"{name}.") for block in names)
                place = self.around if is_around else self.behind if reached else self.front
                place[name] = module

    def _find_holders(self) -> dict[int, tuple[int, ...]]:
        last, found = self.num_stages - 1, dict[int, set[int]]()

        def hold(module: nn.Module, stages: Iterable[int]) -> None:
            for param in module._parameters.values():
                if param is not None:
                    # A number cannot be left out of a shape; all hold it.
                    found.setdefault(id(param), set()).update(stages if param.dim() else range(self.num_stages))

        for stage, blocks in enumerate(self.parts):
            for index in blocks:
                for module in self.blocks[index][1].modules():
                    hold(module, (stage,))
        for module in self.around.values():
            hold(module, range(self.num_stages))
        for place, stage in ((self.front, 0), (self.behind, last)):
            for module in place.values():
                # A norm may be registered on the other side of the blocks than it is called: both ends hold it.
                hold(module, (0, last) if _is_small(module) else (stage,))
        for name, param in self.model.named_parameters():
            stages = found[id(param)]
            if 2 < len(stages) < self.num_stages or (len(stages) == 2 and stages != {0, last}):
                raise UserError(
                    f"{name} is used by the stages {', '.join(map(str, sorted(stages)))} of {self.num_stages}",
                    "a parameter can be shared by the first and the last stage, as a tied embedding is, or by all",
                    f"{_ALONE}, or to a size at which the blocks that share it are in one stage",
                )
        return {number: tuple(sorted(stages)) for number, stages in found.items()}

    def hold(self, axes: Axes, start: Start, tensor: Cuts | None) -> Cuts:
        """Leave of the parameters what this stage holds, with the first stage's numbers. Collective: all ranks.

        `tensor` says what of them tensor-parallel ranks have cut.
        """
        line, group = axes["pp"], axes["pp"] if tensor is None else axes["model"]
        assert line is not None and group is not None
        cuts = Cuts(group, "ranks of a pipeline", ("pipeline_parallel", self.num_stages))
        cuts.tensor = tensor
        cuts.shared.update({number: who for number, who in self.shared.items() if self.index in self.holders[number]})
        start.share([*self.model.parameters(), *self.model.buffers()], Cuts(line))
        copy, copies = axes.index("tp"), axes.size("tp")
        for param in self.model.parameters():
            self._shapes[id(param)] = tuple(param.shape)
            own = tensor.get(param) if tensor is not None else None
            own = own if own is not None else Cut.whole(tuple(param.shape), copy, copies)
            holders = self.holders[id(param)]
            if self.index in holders:
                place = own.copy * len(holders) + holders.index(self.index)
                cuts.of[id(param)] = Cut(own.shape, own.pieces, place, own.num_copies * len(holders))
                continue
            cuts.of[id(param)] = own = Cut(own.shape, own.pieces).with_pieces(0, ())
            nothing = torch.empty(own.local_shape, dtype=param.dtype, device=start.device_for([param]))
            make_real(param, nothing) if param.is_meta else DATA.__set__(param, nothing)
            cuts.elsewhere.add(id(param))
        for stage, blocks in enumerate(self.parts):
            for index in blocks:
                for buffer in self.blocks[index][1].buffers():
                    if buffer.dtype is not torch.bool:
                        place = 2 * copy + (stage != self.index)
                        cuts.of[id(buffer)] = Cut.whole(tuple(buffer.shape), place, 2 * copies)
        return cuts

    # ---- the model's forward -----------------------------------------------------------------------------------------

    def install(self) -> None:
        """Have the model's modules act as this stage."""
        for index, (_, block) in enumerate(self.blocks):
            if self.low <= index < self.high:
                enter = functools.partial(self._enter, index)
                self._handles.append(block.register_forward_pre_hook(Hook(enter), with_kwargs=True, prepend=True))
                self._handles.append(block.register_forward_hook(Hook(functools.partial(self._exit, index))))
            else:
                self._replace(block, functools.partial(self._pass, index))
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.enable_nested_tensor = module.use_nested_tensor = False  # what lies between blocks is a tensor
        for name, module in self.front.items():
            if not self.is_first and not (self.is_last and _is_small(module)):
                self._replace(module, functools.partial(self._stand_in, name, module, module.forward))
        for name, module in self.behind.items():
            if not self.is_last and not (self.is_first and _is_small(module)):
                self._replace(module, functools.partial(self._refuse_module, name, "behind", "in front of"))

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._replaced.append(module)
        vars(module)["distui_own_forward"] = module.__dict__.get("forward")
        module.forward = forward

    def remove(self) -> None:
        """Give the modules their own forwards back."""
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            own = vars(module).pop("distui_own_forward")
            del module.forward
            if own is not None:
                module.forward = own
        self._handles.clear()
        self._replaced.clear()

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any, received: tuple[Parts, bool] | None) -> Any:
        """Run the model's `forward` as far as this stage goes; the last one gives its output, others `Left`."""
        self._expected, self._hidden = 0, None
        if received is not None:
            parts, is_tuple = received
            self._received = parts if is_tuple else parts[0]
        try:
            output = forward(*args, **kwargs)
        except _Leave as leave:
            if leave.stage is not self:
                raise
            return self._left(leave.output)
        finally:
            self._received = self._hidden = None
        if self._expected != len(self.blocks):
            raise UserError(
                f"the forward of {type(self.model).__name__} called {self._expected} of {len(self.blocks)} blocks",
                "a pipeline's stages are called in turn, each of them once",
                _ALONE,
            )
        return output

    def _left(self, output: Any) -> Left:
        if isinstance(output, torch.Tensor):
            return Left((output,), False)
        if type(output) is tuple and output and all(part is None or isinstance(part, torch.Tensor) for part in output):
            return Left(output, True)
        raise UserError(
            f"the block {self.blocks[self.high - 1][0]} gives a {type(output).__name__}",
            "to the next stage travel a tensor, or a tuple of tensors and None",
            f"return one of these from the block, or {_ALONE}",
        )

    def _take_turn(self, index: int) -> None:
        if index != self._expected:
            raise UserError(
                f"the block {self.blocks[index][0]} is called where {self._name(self._expected)} is expected",
                "a pipeline's stages are called in turn, each of them once",
                _ALONE,
            )
        self._expected += 1

    def _name(self, index: int) -> str:
        return self.blocks[index][0] if index < len(self.blocks) else "the end"

    def _pass(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Stand for a block of another stage."""
        if index >= self.high:
            self._take_turn(-1)
        self._take_turn(index)
        self._hidden = _first(self._received)
        return self._received

    def _enter(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._take_turn(index)
        given = [*args, *kwargs.values()]
        if self._hidden is not None and not any(_first(value) is self._hidden for value in given):
            raise UserError(
                f"the model changes what {self.blocks[index - 1][0]} gives before {self.blocks[index][0]} takes it",
                "between two stages lies nothing but one block's output, which is the next one's input",
                f"move it into the block, or {_ALONE}",
            )
        if index == self.low and index and self._looked < LOOKED_AT:
            self._looked += 1
            if any(_has_nan(value) for value in given if _first(value) is not self._hidden):
                raise UserError(
                    f"the block {self.blocks[index][0]} is given more than its hidden state by {', '.join(self.front)}",
                    f"these are on the first stage, this block is on stage {self.index}",
                    f"hand it on inside the block's output, or {_ALONE}",
                )

    def _exit(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden = _first(output)
        if index == self.high - 1 and not self.is_last:
            raise _Leave(self, output)

    def _stand_in(
        self,
        name: str,
        module: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Give NaN of the shapes that a module of the first stage would give, which are worked out without numbers."""
        if self._expected:
            self._refuse_module(name, "in front of", "behind")
        own = dict(module._parameters)
        device = next((tensor.device for tensor in _tensors((args, kwargs))), torch.device("cpu"))
        for key, param in own.items():
            if param is not None:
                blank = torch.empty(self._shapes[id(param)], dtype=param.dtype, device="meta")
                module._parameters[key] = nn.Parameter(blank, requires_grad=False)
        try:
            with torch.no_grad():
                args, kwargs = _mapped((args, kwargs), lambda tensor: tensor.to("meta"))
                output = forward(*args, **kwargs)
        finally:
            module._parameters.update(own)
        return _mapped(output, functools.partial(_placeholder, device))

    def _refuse_module(self, name: str, registered: str, called: str, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            f"{name} is registered {registered} the blocks and called {called} them",
            f"stage {self.index} of {self.num_stages} does not hold it",
            f"assign it to the model {called} the blocks, or {_ALONE}",
        )


def _first(value: Any) -> Any:
    """Return the hidden state in what a block gives, or is given."""
    return value[0] if isinstance(value, tuple) and value else value


def _cost(module: nn.Module) -> float:
    """Return what a module costs beside the blocks, in parameters that are multiplied: a lookup costs nothing."""
    if isinstance(module, nn.Embedding):
        return 0.0
    return float(sum(param.numel() for param in module._parameters.values() if param is not None))


def _is_small(module: nn.Module) -> bool:
    return all(param is None or param.dim() <= 1 for param in module._parameters.values())


def _has_nan(value: Any) -> bool:
    return any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in _tensors(value))


def _placeholder(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=device)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _mapped(value: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: act(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)
