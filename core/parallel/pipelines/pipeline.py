"""Runs a model whose blocks lie on several ranks: `model(**batch)` is one pass of the schedule over the micro-batches.

In training the batch is cut into micro-batches, and forwards and backwards run as the schedule's table says; gradients
land in the flat buffers of the stage, as after a backward of each micro-batch, and are reduced with the last one. What
comes back on all ranks is the loss, on which `engine.backward` has nothing left to do but to tell by what it was to be
multiplied. In evaluation the batch runs through the stages as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.axes.cut import part_of
from distui.core.axes.groups import Axes
from distui.core.axes.schedules import tables
from distui.core.config.schema import StrategySection
from distui.core.errors import DistuiError, UserError
from distui.core.parallel.batches import LOOKED_AT, CutBatch, compare_batch
from distui.core.parallel.outside import named_by
from distui.core.parallel.pipelines.messages import BACKWARD, FORWARD, Messages, Parts, PeerFailed
from distui.core.parallel.pipelines.outputs import Output, Told, loss_in, refuse_nan, refuse_outputs_of_all
from distui.core.parallel.pipelines.placeholders import Absent
from distui.core.parallel.pipelines.shared import SharedGradients
from distui.core.parallel.pipelines.stages import Left, Stage
from distui.core.parallel.pipelines.weights_later import Pair, WeightsLater, finish
from distui.core.ranks import ops
from distui.core.ranks.precision import cast_floating
from distui.core.sharding.sharded import ShardedModel

LossOf = Callable[..., torch.Tensor]
_NO_LOSS = "give one: engine.prepare(model, ..., loss=fn), where fn(output, **kwargs) gets what the model does not take"


@dataclass(slots=True)
class _Kept:
    """What of a micro-batch one of a rank's stages keeps between its forward and its backward."""

    inputs: Parts = ()
    outputs: Parts = ()
    loss: torch.Tensor | None = None
    later: list[Pair] = field(default_factory=list)


@dataclass(slots=True)
class _Micro:
    """One micro-batch, and what is kept of it, by the number of a rank's stage."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    for_loss: dict[str, Any]
    weight: float
    """Share of its loss in the batch's."""
    kept: dict[int, _Kept] = field(default_factory=dict)


class Pipeline:
    """One model's stage on this rank, and its way through the schedule."""

    def __init__(
        self,
        stage: Stage,
        messages: Messages,
        axes: Axes,
        schedule: str,
        num_micro: int,
        loss_of: LossOf | None,
        factor: Callable[[], float],
    ) -> None:
        """`loss_of` computes the loss outside of the model; `factor` is what it is multiplied by for its backward."""
        self._later = WeightsLater() if schedule == "zbv" else None
        self.stage, self.messages, self.schedule, self.num_micro = stage, messages, schedule, num_micro
        self.axes, self.loss_of, self.factor = axes, loss_of, factor
        self.before_micro: Callable[[], None] = lambda: None
        """Called before the backward of each micro-batch."""
        self._named_by_loss = named_by(loss_of) if loss_of is not None else frozenset()
        self._shared = SharedGradients(axes, set(stage.shared.values()))
        self._sharded: ShardedModel | None = None
        self.own_forward: Callable[..., Any] = stage.model.forward
        """Of the whole model; where sequences are cut too, with that around it."""
        self._before = stage.model.__dict__.get("forward")
        self.alongside: dist.ProcessGroup | None = None
        """The ranks of this stage among which tokens travel to experts: their passes have as many micro-batches."""
        self._broken = ""
        self._looked = self._num_losses = 0
        self._is_bare = False
        """Whether a call gives the loss itself, as the last stage told."""

    def begin(self, sharded: ShardedModel) -> None:
        """Have the model's forward be the schedule's."""
        assert sharded.cuts is not None
        self._sharded = self._shared.sharded = sharded
        self.stage.install()
        forward = functools.partial(self._forward)
        functools.update_wrapper(forward, self.stage.model.forward)  # libraries look up what a model's forward takes
        self.stage.model.forward = forward

    def remove(self) -> None:
        """Give the model its own forward back."""
        self.stage.remove()
        del self.stage.model.forward
        if self._before is not None:
            self.stage.model.forward = self._before

    # ---- a call ------------------------------------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._broken:
            raise UserError("the pipeline has failed before", self._broken, "build the engine anew")
        if len(args) == 1 and isinstance(args[0], CutBatch):
            return self._train_cut(args[0])
        refuse_outputs_of_all(self.stage.model, kwargs)
        for_loss = {key: kwargs.pop(key) for key in list(kwargs) if key in self._named_by_loss}
        if not (self.stage.model.training and torch.is_grad_enabled()):
            return self._evaluate(args, kwargs, for_loss)
        if self._looked < LOOKED_AT:
            self._looked += 1
            compare_batch((args, kwargs, for_loss), self.messages.control, "a pipeline's")
        return self._pass(list(self._cut(args, kwargs, for_loss)))

    def _train_cut(self, batch: CutBatch) -> Any:
        is_end = bool({0, self.stage.num_stages - 1} & {*self.stage.own})
        if self._looked < LOOKED_AT:
            self._looked += 1
            compare_batch(list(batch), self.messages.control, "a pipeline's", is_there=is_end)
        return self._pass([_Micro(*one, 1.0 / len(batch)) for one in batch])

    def _pass(self, micro: list[_Micro]) -> Any:
        factor = self.factor()
        loss = self._to_the_end(lambda: self._train(micro, factor))
        assert loss is not None
        anchor = torch.zeros((), device=loss.device, requires_grad=True)
        found = Told.apply(anchor, loss, factor)
        return found if self._is_bare else Output(found, "in training they are not kept")

    def _cut(self, args: Any, kwargs: Any, for_loss: Any) -> Iterator[_Micro]:
        """Cut what has a row for each sample; what has not is given to every micro-batch."""
        rows = next((len(tensor) for _, tensor in ops.iter_tensors((args, kwargs)) if tensor.dim()), 0)
        if not rows:
            raise UserError(
                "the model was called without a batch",
                "a pipeline cuts the first dimension of what it is given into micro-batches, and no tensor has one",
                "call model(**batch)",
            )
        count, ranks = self._agreed(min(self.num_micro, rows)), self.stage.num_ranks
        if self.schedule == "interleaved" and count > ranks:
            count -= count % ranks
        summed = kwargs.get("num_items_in_batch") is not None  # transformers: the losses are parts of a sum
        for index in range(count):
            low, high = part_of(rows, count, index)

            def piece(tensor: torch.Tensor, low: int = low, high: int = high) -> torch.Tensor:
                return tensor[low:high] if tensor.dim() and len(tensor) == rows else tensor

            own_args, own_kwargs, own_loss = ops.map_structure(piece, (args, kwargs, for_loss))
            yield _Micro(own_args, own_kwargs, own_loss, 1.0 if summed else (high - low) / rows)

    def _agreed(self, count: int) -> int:
        """Return the least count of those this stage shares experts with, whose last batches may have more rows."""
        if self.alongside is None:
            return count
        least = torch.tensor([count], device=ops.object_device(self.alongside))
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.alongside)
        return int(least)

    # ---- training ----------------------------------------------------------------------------------------------------

    def _train(self, micro: list[_Micro], factor: float) -> torch.Tensor | None:
        """Run this rank's table; who has the last stage returns the loss. Collective: all ranks."""
        stage, schedule = self.stage, self._schedule()
        wants_sync = schedule.sync
        table = tables(self.schedule, stage.num_ranks, len(micro), stage.num_chunks)[stage.rank]
        self._shared.reopen()
        total: torch.Tensor | None = None
        try:
            for number, step in enumerate(table):
                one = micro[step.micro]
                stage.at(step.chunk)
                if step.kind == "F":
                    self._run_forward(one, trains=True, notes=step.micro == 0)
                    if (loss := one.kept[stage.index].loss) is not None:
                        part = loss.detach().float() * one.weight
                        total = part if total is None else total + part
                    continue
                schedule.sync = wants_sync and number == len(table) - 1
                if step.kind == "B":
                    self._run_backward(one, factor * one.weight)
                else:
                    self._run_weights(one)
        finally:
            schedule.sync = wants_sync
        if wants_sync:
            self._shared.sum()
        return total

    def _schedule(self) -> Any:
        assert self._sharded is not None
        return self._sharded.schedule

    def _run_forward(self, one: _Micro, trains: bool, notes: bool = True) -> Any:
        """Run the forward of one stage; with `notes` what it leaves in attributes is told to the others."""
        stage, schedule = self.stage, self._schedule()
        received = None if stage.is_first else self.messages.receive(FORWARD, stage.index, self._device)
        kept = one.kept[stage.index] = _Kept(received[0] if received is not None else ())
        schedule.before_model(stage.model, ())
        if notes:
            stage.begin_notes()
        with self._later if trains and self._later is not None else nullcontext():
            output = stage.run(self.own_forward, one.args, one.kwargs, received)
        if notes:
            stage.left.end()
        schedule.after_model()
        if isinstance(output, Left):
            self.messages.send(FORWARD, stage.index, output.parts, output.is_tuple)
            kept.outputs = output.parts
        else:
            output = cast_floating(output, torch.float32)  # as at the border of a model that is not cut
            if trains:
                kept.loss = self._loss(output, one)
        if len(one.kept) == stage.num_chunks:
            one.args, one.kwargs, one.for_loss = (), {}, {}
        return output

    @property
    def _device(self) -> torch.device:
        return next(self.stage.model.parameters()).device

    def _loss(self, output: Any, one: _Micro) -> torch.Tensor:
        self._is_bare = self.loss_of is not None or isinstance(output, torch.Tensor)
        loss = self.loss_of(output, **one.for_loss) if self.loss_of is not None else loss_in(output)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = type(output if self.loss_of is None else loss).__name__
            raise UserError(
                f"{type(self.stage.model).__name__} gives no loss in a pipeline"
                if self.loss_of is None
                else "the function given as loss= returns no loss",
                f"it gives a {what}, and the last stage begins each backward with one number",
                _NO_LOSS,
            )
        self._num_losses += 1
        if self._num_losses <= LOOKED_AT or isinstance(loss, Absent):
            refuse_nan(loss, self.stage.model)
        return loss.reshape(())

    def _run_backward(self, one: _Micro, factor: float) -> None:
        stage, schedule, kept = self.stage, self._schedule(), one.kept[self.stage.index]
        flows = [part for part in kept.outputs if part is not None and part.requires_grad]
        grads: list[torch.Tensor] = []
        if flows and not stage.is_last:
            parts, _ = self.messages.receive(BACKWARD, stage.index, self._device)
            pairs = [(out, grad) for out, grad in zip(flows, parts, strict=True) if grad is not None]
            flows, grads = [out for out, _ in pairs], [grad for _, grad in pairs]
        self.before_micro()
        with self._later.putting_off() if self._later is not None else nullcontext():
            if kept.loss is not None and kept.loss.requires_grad:
                (kept.loss * factor).backward()
            elif flows:
                torch.autograd.backward(flows, grads)
        schedule.end_backward()
        wanted = [part for part in kept.inputs if part is not None and part.requires_grad]
        if wanted and not stage.is_first:
            self.messages.send(BACKWARD, stage.index, [part.grad for part in wanted])
        one.kept[stage.index] = _Kept(later=self._later.take() if self._later is not None else [])

    def _run_weights(self, one: _Micro) -> None:
        """Compute what the backward has left of the weights' gradients."""
        self.before_micro()
        finish(one.kept.pop(self.stage.index).later)
        self._schedule().end_backward()

    def end_backward(self) -> None:
        """After the script's backward of the loss: show the gradients. Raises: UserError where it brought any."""
        schedule = self._schedule()
        if schedule.is_open or (not schedule.has_shown and any([unit.collect() for unit in schedule.order])):
            raise UserError(
                "the loss of a pipelined model has other terms that reach its parameters",
                "the pass of the schedule has run the backward of the model's loss already, with its reductions",
                "compute all of it in the model, or in engine.prepare(..., loss=fn)",
            )
        if schedule.sync:
            schedule.show_gradients()

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def _evaluate(self, args: Any, kwargs: Any, for_loss: Any) -> Any:
        one, stage = _Micro(args, kwargs, for_loss, 1.0), self.stage

        def run() -> tuple[Any, torch.Tensor | None]:
            output: Any = None
            with torch.no_grad():
                for chunk in sorted(range(stage.num_chunks), key=lambda chunk: stage.own[chunk]):
                    stage.at(chunk)
                    output = self._run_forward(one, trains=False)
                if isinstance(output, Left):
                    return None, None
                if self.loss_of is not None and for_loss:
                    output = self._loss(output, _Micro((), {}, for_loss, 1.0))
                return output, loss_in(output)

        outputs: list[Any] = []

        def loss() -> torch.Tensor | None:
            output, value = run()
            outputs.append(output)
            self._is_bare = isinstance(output, torch.Tensor)
            return value.detach().float() if isinstance(value, torch.Tensor) and value.numel() == 1 else None

        value = self._to_the_end(loss)
        last = self.stage.rank_of(self.stage.num_stages - 1)
        if self.stage.rank == last:
            return outputs[0]
        if self._is_bare and value is not None:
            return value
        return Output(value, f"they are on the last stage, rank {self.messages.ranks[last]}")

    # ---- the end of a call -----------------------------------------------------------------------------------------

    def _to_the_end(self, run: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Run this stage, and tell all others how it went; return the last one's loss. Collective: the line.

        Raises: what this stage raised, or on the others DistuiError that says what and where.
        """
        failure: BaseException | None = None
        loss: torch.Tensor | None = None
        try:
            loss = run()
        except BaseException as error:  # noqa: BLE001 - raised again once all know
            failure = error
            self.messages.fail()
        number = 0.0 if loss is None else float(loss)
        left = self.stage.left
        is_failed, has_loss = failure is not None, loss is not None
        own = torch.tensor([is_failed, has_loss, self._is_bare, number, left.has_news], dtype=torch.float64)
        told = [torch.empty_like(own) for _ in self.messages.ranks]
        dist.all_gather(told, own, group=self.messages.control)
        failed = [index for index, values in enumerate(told) if values[0]]
        if failed:
            self._raise(failure)
        self.messages.finish()
        if any(values[4] for values in told):
            news: list[Any] = [None] * len(told)
            dist.all_gather_object(news, left.news(), group=self.messages.control)
            left.hear([(self.stage.words(rank), found) for rank, found in enumerate(news) if rank != self.stage.rank])
        _, has_loss, is_bare, value, _ = told[self.stage.rank_of(self.stage.num_stages - 1)].tolist()
        self._is_bare = bool(is_bare)
        if not has_loss:
            return None
        return loss if loss is not None else torch.tensor(value, dtype=torch.float32, device=self._device)

    def _raise(self, failure: BaseException | None) -> None:
        is_cause = failure is not None and not isinstance(failure, PeerFailed)
        words = f"{type(failure).__name__}: {failure}" if is_cause else ""
        told: list[Any] = [None] * len(self.messages.ranks)
        dist.all_gather_object(told, words, group=self.messages.control)
        index = next((index for index, text in enumerate(told) if text), 0)
        self._broken = f"{self.stage.words(index)} (rank {self.messages.ranks[index]}): {told[index]}"
        if failure is not None and is_cause:
            raise failure
        raise DistuiError(f"a stage of the pipeline failed: {self._broken}") from failure


def pipelined(
    model: nn.Module,
    axes: Axes,
    strategy: StrategySection,
    num_micro: int,
    loss_of: LossOf | None,
    factor: Callable[[], float],
) -> Pipeline:
    """Return the pipeline of `model`, whose stages hold nothing yet. Collective: all ranks."""
    stage = Stage(model, axes, strategy.pipeline_schedule, strategy.pipeline_chunks)
    messages = Messages(axes, stage.num_stages, stage.rank_of)
    return Pipeline(stage, messages, axes, strategy.pipeline_schedule, num_micro, loss_of, factor)
