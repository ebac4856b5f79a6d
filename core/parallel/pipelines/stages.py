"""The stages of a pipeline that a rank has, made of a model without a change to it.

Every rank runs the model's own forward on the same batch. Blocks that it does not hold give back at once what was
received from the stage before, modules in front of its first block give placeholders, and behind its last block a
private exception leaves the forward; so masks, positions and whatever else lies around the blocks are computed as ever,
on each rank. What would make this another computation is looked for and refused: blocks called in another order, a
hidden state that is changed between two blocks, placeholders (NaN) that reach a block by another way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distui.core.axes.cut import Cut
from distui.core.axes.groups import Axes
from distui.core.axes.schedules import num_chunks, split, stage_of
from distui.core.errors import UserError
from distui.core.parallel.pipelines.holders import ALONE, Places, is_small
from distui.core.parallel.pipelines.left_behind import LeftBehind, refuse_growth, sizes_of
from distui.core.parallel.pipelines.messages import Parts
from distui.core.parallel.pipelines.placeholders import blank, is_absent, stand_in
from distui.core.parallel.pipelines.shared import ALL, ENDS
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.hooks import Hook
from distui.core.sharding.start.initialise import make_real
from distui.core.sharding.start.start import Start
from distui.core.sharding.units.guarded import DATA, Refusal
from distui.core.sharding.units.partition import find_blocks

LOOKED_AT = 2
"""In so many forwards of the beginning placeholders are looked for in what a stage's first block is given."""
OWN_PARTS = "_distui_parts"
"""Where a model says which of its blocks each stage has; else their costs tell."""


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
    """What one rank holds of a model, and the model's forward as far as that goes, of one of its stages at a time."""

    def __init__(self, model: nn.Module, axes: Axes, schedule: str = "1f1b", chunks: int = 1) -> None:
        """Choose the blocks of each stage by their costs; `schedule` says how many stages a rank has, and which.

        Raises: UserError for fewer blocks than stages.
        """
        self.model, self.rank, self.num_ranks = model, axes.index("pp"), axes.size("pp")
        self.num_chunks = num_chunks(schedule, chunks)
        self.num_stages = self.num_ranks * self.num_chunks
        ranks = [
            [stage_of(schedule, self.num_ranks, rank, c) for c in range(self.num_chunks)]
            for rank in range(self.num_ranks)
        ]
        self.own = tuple(ranks[self.rank])
        """The stages of this rank, by chunk."""
        self._rank_of = [
            next(rank for rank, own in enumerate(ranks) if stage in own) for stage in range(self.num_stages)
        ]
        self.blocks = find_blocks(model)
        if len(self.blocks) < self.num_stages:
            raise self._too_few_blocks(schedule)
        places = Places(model, self.blocks)
        self.front, self.behind = places.front, places.behind
        costs = [float(sum(param.numel() for param in block.parameters())) for _, block in self.blocks]
        own_parts: list[range] = vars(model).get(OWN_PARTS, [])
        is_told = len(own_parts) == self.num_stages
        self.parts = own_parts if is_told else split(costs, self.num_stages, *places.costs())
        self.at(0)
        self.holders = places.holders(self.parts, self.rank_of, self.num_ranks)
        """The ranks of the line that hold a parameter, by its identity."""
        self.shared = {
            number: ENDS if len(ranks) < self.num_ranks else ALL
            for number, ranks in self.holders.items()
            if len(ranks) > 1
        }
        """Who holds it, of what several ranks hold."""
        self._shapes: dict[int, tuple[int, ...]] = {}
        """Of parameters, as this stage's tensor-parallel rank would hold them, by identity."""
        self._received: Any = None
        self._blank: Any = None
        """What stands for the outputs of blocks of other stages, but for the one that was received."""
        self._expected, self._is_running = 0, False
        self._hidden: Any = None
        self._looked = dict.fromkeys(self.own, 0)
        self._handles: list[Any] = []
        self._replaced: list[nn.Module] = []
        self.left = LeftBehind(model, self.blocks)
        self._grows: list[tuple[Any, int]] = []
        """What the block that runs was given that can grow."""

    def _too_few_blocks(self, schedule: str) -> UserError:
        num, most = len(self.blocks), len(self.blocks) // self.num_chunks
        each = f" of {self.num_chunks} stages each under {schedule}" if self.num_chunks > 1 else ""
        fix = f"set strategy.pipeline_parallel to {f'{most} or less' if most > 1 else '1'}"
        return UserError(
            f"pipeline_parallel={self.num_ranks}{each} with {num} blocks in {type(self.model).__name__}",
            "each stage holds one block at least; blocks are modules of one class in a ModuleList or Sequential, "
            "or of the classes that the model names in _no_split_modules",
            f"{fix}, or strategy.pipeline_schedule to 1f1b" if self.num_chunks > 1 and num > 1 else fix,
        )

    def rank_of(self, stage: int) -> int:
        """Return which rank of the line has `stage`."""
        return self._rank_of[stage]

    def words(self, rank: int) -> str:
        """Return which stages a rank of the line has, for messages."""
        own = [stage for stage, of_stage in enumerate(self._rank_of) if of_stage == rank]
        return f"stage{'s' if len(own) > 1 else ''} {' and '.join(map(str, own))} of {self.num_stages}"

    def at(self, chunk: int) -> None:
        """Be this rank's stage `chunk`, until another is asked for."""
        self.index = self.own[chunk]
        self.low, self.high = self.parts[self.index].start, self.parts[self.index].stop
        self.is_first, self.is_last = self.index == 0, self.index == self.num_stages - 1

    # ---- who holds what --------------------------------------------------------------------------------------------

    def hold(self, axes: Axes, start: Start, tensor: Cuts | None) -> Cuts:
        """Leave of the parameters what this stage holds, with the first stage's numbers. Collective: all ranks.

        `tensor` says what of them tensor-parallel ranks have cut, or those that share experts.
        """
        line, group = axes["pp"], axes["pp"] if tensor is None else axes["pieces"]
        assert line is not None and group is not None
        cuts = Cuts(group, "ranks of a pipeline", ("pipeline_parallel", self.num_ranks))
        cuts.tensor, cuts.experts = tensor, tensor.experts if tensor is not None else None
        cuts.shared.update({number: who for number, who in self.shared.items() if self.rank in self.holders[number]})
        start.share([*self.model.parameters(), *self.model.buffers()], Cuts(line))
        copy, copies = axes.index("tp"), axes.size("tp")
        for param in self.model.parameters():
            self._shapes[id(param)] = tuple(param.shape)
            own = tensor.get(param) if tensor is not None else None
            own = own if own is not None else Cut.whole(tuple(param.shape), copy, copies)
            holders = self.holders[id(param)]
            if self.rank in holders:
                place = own.copy * len(holders) + holders.index(self.rank)
                cuts.of[id(param)] = Cut(own.shape, own.pieces, place, own.num_copies * len(holders))
                continue
            cuts.of[id(param)] = own = Cut(own.shape, own.pieces).with_pieces(0, ())
            nothing = torch.empty(own.local_shape, dtype=param.dtype, device=start.device_for([param]))
            make_real(param, nothing) if param.is_meta else DATA.__set__(param, nothing)
            cuts.elsewhere.add(id(param))
        names = {id(param): name for name, param in self.model.named_parameters()}
        cuts.refusal = Refusal(
            f"it is on another stage than this rank's, {self.words(self.rank)}: here it is empty, and what is computed "
            "of all parameters would be this stage's share of it",
            "engine.clip_grad_norm_(model.parameters(), max_norm) returns the norm of all gradients and "
            "engine.get_state_dict(model) all weights; compute a penalty inside of the blocks, or use weight decay; "
            f"or {ALONE}",
            {number: names[number] for number in cuts.elsewhere},
        )
        for stage, blocks in enumerate(self.parts):
            for index in blocks:
                for buffer in self.blocks[index][1].buffers():
                    if buffer.dtype is not torch.bool:
                        place = 2 * copy + (self.rank_of(stage) != self.rank)
                        cuts.of[id(buffer)] = Cut.whole(tuple(buffer.shape), place, 2 * copies)
        return cuts

    # ---- the model's forward -----------------------------------------------------------------------------------------

    def install(self) -> None:
        """Have the model's modules act as this rank's stages."""
        own = {index for stage in self.own for index in self.parts[stage]}
        for index, (_, block) in enumerate(self.blocks):
            if index in own:
                enter = functools.partial(self._enter, index)
                self._handles.append(block.register_forward_pre_hook(Hook(enter), with_kwargs=True, prepend=True))
                self._handles.append(block.register_forward_hook(Hook(functools.partial(self._exit, index))))
            else:
                self._replace(block, functools.partial(self._pass, index))
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.enable_nested_tensor = module.use_nested_tensor = False  # what lies between blocks is a tensor
        has_first, has_last = 0 in self.own, self.num_stages - 1 in self.own
        for name, module in self.front.items():
            if not has_first and not (has_last and is_small(module)):
                self._replace(module, functools.partial(self._stand_in, name, module, module.forward))
        for name, module in self.behind.items():
            if not has_last and not (has_first and is_small(module)):
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
        self.left.remove()

    def begin_notes(self) -> None:
        """Note what attributes there are before this stage runs."""
        others = [name for index, (name, _) in enumerate(self.blocks) if not self.low <= index < self.high]
        front = [] if self.rank == self.rank_of(0) else [*self.front]
        behind = [] if self.rank == self.rank_of(self.num_stages - 1) else [*self.behind]
        self.left.begin([*others, *front, *behind])

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any, received: tuple[Parts, bool] | None) -> Any:
        """Run the model's `forward` as far as this stage goes; the last one gives its output, others `Left`."""
        self._expected, self._hidden, self._is_running = 0, None, True
        if received is not None:
            parts, is_tuple = received
            self._received = parts if is_tuple else parts[0]
            if self.low > 1:
                self._blank = blank(self._received)
        try:
            with self._others_passing():
                output = forward(*args, **kwargs)
        except _Leave as leave:
            if leave.stage is not self:
                raise
            return self._left(leave.output)
        finally:
            self._received = self._blank = self._hidden = None
            self._is_running = False
        if self._expected != len(self.blocks):
            raise UserError(
                f"the forward of {type(self.model).__name__} called {self._expected} of {len(self.blocks)} blocks",
                "a pipeline's stages are called in turn, each of them once",
                ALONE,
            )
        return output

    @contextmanager
    def _others_passing(self) -> Iterator[None]:
        """Have blocks of this rank's other stages pass on what they are given, with none of their hooks."""
        others = [index for stage in self.own if stage != self.index for index in self.parts[stage]]
        kept = [(self.blocks[index][1], self.blocks[index][1]._compiled_call_impl) for index in others]
        for index, (block, _) in zip(others, kept, strict=True):
            block._compiled_call_impl = functools.partial(self._pass, index)
        try:
            yield
        finally:
            for block, call in kept:
                block._compiled_call_impl = call

    def _left(self, output: Any) -> Left:
        if isinstance(output, torch.Tensor):
            return Left((output,), False)
        if type(output) is tuple and output and all(part is None or isinstance(part, torch.Tensor) for part in output):
            return Left(output, True)
        raise UserError(
            f"the block {self.blocks[self.high - 1][0]} gives a {type(output).__name__}",
            "to the next stage travel a tensor, or a tuple of tensors and None",
            f"return one of these from the block, or {ALONE}",
        )

    def _take_turn(self, index: int) -> None:
        if not self._is_running and torch._C._current_graph_task_id() == -1:
            raise UserError(
                f"a part of {type(self.model).__name__} was called, and not the model",
                "each stage runs the model's own forward, as far as it goes",
                f"call model(...), with engine.prepare(..., loss=fn) where the loss is outside, or {ALONE}",
            )
        if index != self._expected:
            raise UserError(
                f"the block {self.blocks[index][0]} is called where {self._name(self._expected)} is expected",
                "a pipeline's stages are called in turn, each of them once",
                ALONE,
            )
        self._expected += 1

    def _name(self, index: int) -> str:
        return self.blocks[index][0] if index < len(self.blocks) else "the end"

    def _pass(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Stand for a block of another stage."""
        if index >= self.high:
            self._take_turn(-1)
        self._take_turn(index)
        found = self._received if index == self.low - 1 else self._blank  # what lies between is on other stages
        self._hidden = _first(found)
        return found

    def _enter(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._take_turn(index)
        given = [*args, *kwargs.values()]
        self._grows = sizes_of(given)
        if self._hidden is not None and not any(_first(value) is self._hidden for value in given):
            raise UserError(
                f"the model changes what {self.blocks[index - 1][0]} gives before {self.blocks[index][0]} takes it",
                "between two stages lies nothing but one block's output, which is the next one's input",
                f"move it into the block, or {ALONE}",
            )
        if index == self.low and index and self._looked[self.index] < LOOKED_AT:
            self._looked[self.index] += 1
            if any(is_absent(value) for value in given if _first(value) is not self._hidden):
                raise UserError(
                    f"the block {self.blocks[index][0]} is given more than its hidden state by {', '.join(self.front)}",
                    f"these are on the first stage, this block is on stage {self.index}",
                    f"hand it on inside the block's output, or {ALONE}",
                )

    def _exit(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden = _first(output)
        refuse_growth(self._grows, self.blocks[index][0], ALONE)
        if index < self.high - 1:
            return
        if not self.is_last:
            raise _Leave(self, output)
        own = {number for stage in self.own for number in self.parts[stage]}
        self.left.guess([name for number, (name, _) in enumerate(self.blocks) if number not in own], "another stage")

    def _stand_in(
        self,
        name: str,
        module: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Stand for a module of the first stage."""
        if self._expected:
            self._refuse_module(name, "in front of", "behind")
        return stand_in(module, forward, self._shapes, args, kwargs)

    def _refuse_module(self, name: str, registered: str, called: str, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            f"{name} is registered {registered} the blocks and called {called} them",
            f"stage {self.index} of {self.num_stages} does not hold it",
            f"assign it to the model {called} the blocks, or {ALONE}",
        )


def _first(value: Any) -> Any:
    """Return the hidden state in what a block gives, or is given."""
    return value[0] if isinstance(value, tuple) and value else value
