"""What cannot be right is refused: the error says what, why, and the way round, and what comes afterwards is right."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import distui
from distui.core.errors import UserError
from distui.core.sharding.transport.agreement import DisagreementError
from distui.core.sharding.units import partition
from tests.dist.sharding.trainings import DIM, OUT, STAGES, Net, batch, square

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


@contextlib.contextmanager
def _refused(what: str, fix: str) -> Iterator[None]:
    with pytest.raises(UserError, match=what) as refused:
        yield
    assert fix in refused.value.fix


def _engine(stage: int) -> distui.Engine:
    partition.SMALL_UNIT_NUMEL = 1
    return distui.Engine(strategy={"zero_stage": stage})


def _prepared(stage: int) -> tuple[distui.Engine, Any, Any]:
    engine = _engine(stage)
    torch.manual_seed(0)
    net = Net()
    model, optimizer = engine.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    return engine, model, optimizer


def _refused_when_prepared(stage: int) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(DIM, OUT)
            self.modes = nn.Parameter(torch.randn(DIM, dtype=torch.complex64))

    with _refused(r"parameter modes is complex \(torch.complex64\)", "torch.view_as_real(modes)"):
        _engine(stage).prepare(Spectral())
    with _refused(r"0 has max_norm=1\.0: its forward writes", "weight.data.renorm_"):
        _engine(stage).prepare(nn.Sequential(nn.Embedding(5, DIM, max_norm=1.0), nn.Linear(DIM, OUT)))
    tied = Net()
    tied.blocks[2].inner.weight.data = tied.blocks[0].inner.weight.data  # type: ignore[union-attr]
    with _refused(r"blocks\.0\.inner\.weight and blocks\.2\.inner\.weight lie in the same", "a.weight = b.weight"):
        _engine(stage).prepare(tied)
    kept = Net()
    kept.register_buffer("mirror", kept.head.weight.data[1:])
    with _refused("head.weight and mirror lie in the same memory", "in forward"):
        _engine(stage).prepare(kept)
    lazy = nn.Sequential(nn.LazyLinear(DIM), nn.Linear(DIM, OUT))
    with _refused("lazy parameters", "run one forward before engine.prepare"):
        _engine(stage).prepare(lazy)
    lazy(batch(0))
    model = _engine(stage).prepare(lazy)
    assert not model(batch(0)).isnan().any()
    with _refused("the model is wrapped for DistributedDataParallel", "prepare the plain model"):
        _engine(stage).prepare(nn.parallel.DistributedDataParallel(Net()))


def _added_and_stepped_alone(stage: int) -> None:
    engine, model, _ = _prepared(stage)
    model.extra = nn.Linear(OUT, OUT)
    alone = torch.optim.SGD(model.extra.parameters(), lr=0.1)
    engine.backward(square(model.extra(model(batch(0)))))
    with _refused(r"SGD steps extra\.weight.*added to the model after", "engine.prepare(module, optimizer)"):
        alone.step()
    _, alone = engine.prepare(model.extra, alone)
    engine.backward(square(model.extra(model(batch(0)))))
    alone.step()


def _refused_at_stage_3() -> None:
    engine, model, _ = _prepared(3)
    plain = Net()
    for act in (lambda: model.state_dict(), lambda: model.blocks[1].state_dict(), lambda: copy.deepcopy(model)):
        with _refused("of a model whose parameters are sharded", "engine.full_parameters(model)"):
            act()
    with _refused("load_state_dict of a model", "engine.load_state_dict(model, state)"):
        model.load_state_dict(plain.state_dict())
    with engine.full_parameters(model) as whole:
        inside = {name: value.clone() for name, value in whole.state_dict().items()}
        copied = copy.deepcopy(whole)
    assert type(copied.first.weight) is nn.Parameter  # type: ignore[union-attr]
    state = engine.get_state_dict(model)
    torch.testing.assert_close(inside, state)
    torch.testing.assert_close(dict(copied.state_dict()), state)


def _stale_graph(stage: int) -> None:
    """Plain torch refuses a backward through weights that a step has changed since; so does every stage."""
    for keeps in (lambda model, x: square(model(x)), lambda model, x: square(model.blocks[1](model.blocks[0](x)))):
        engine, model, optimizer = _prepared(stage)
        old = keeps(model, batch(1))
        engine.backward(square(model(batch(0))))
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"as they were|modified by an inplace operation"):
            engine.backward(old)
        optimizer.zero_grad()
        before = engine.get_state_dict(model)["blocks.1.inner.weight"].clone()
        engine.backward(square(model(batch(2))))
        optimizer.step()
        optimizer.zero_grad()
        after = engine.get_state_dict(model)
        assert not torch.equal(after["blocks.1.inner.weight"], before)
        assert not any(value.isnan().any() for value in after.values())


def _assigned_wrongly(stage: int) -> None:
    _, model, _ = _prepared(stage)
    for value in (torch.zeros(3), torch.zeros(DIM, DIM, dtype=torch.float64)):
        with _refused(
            r"inner\.weight\.data cannot become .*laid out as torch\.float32", "assign a tensor of that kind"
        ):
            model.blocks[1].inner.weight.data = value
    with _refused(
        r"blocks\.1\.inner\.weight\.data cannot become a view of blocks\.0\.inner\.weight", "assign a clone()"
    ):
        model.blocks[1].inner.weight.data = model.blocks[0].inner.weight.data


def _where_no_hook_is_called(stage: int) -> None:
    if stage == 0:
        return
    engine, model, _ = _prepared(stage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with _refused("torch.jit.trace of a sharded model", "torch.compile"):
            torch.jit.trace(model, batch(0))
        with _refused("is a ScriptModule", "torch.compile"):
            _engine(stage).prepare(nn.Sequential(torch.jit.script(nn.Linear(DIM, DIM)), nn.Linear(DIM, OUT)))
        if stage < 3:
            return
        for act in (
            lambda: torch.func.jvp(model, (batch(0),), (batch(1),)),
            lambda: torch.func.grad(lambda x: square(model(x)))(batch(0)),
        ):
            with _refused("a derivative by torch.func", "engine.full_parameters(model)"):
                act()
    with engine.full_parameters(model) as whole:
        assert torch.func.grad(lambda x: square(whole(x)))(batch(0)).abs().max() > 0


def _states_by_parameter(stage: int) -> None:
    _, model, optimizer = _prepared(stage)
    assert model.head.weight not in optimizer.state
    if stage > 0:
        with _refused(r"optimizer\.state\[head\.weight\] cannot be had", "optimizer.state.values()"):
            optimizer.state[model.head.weight]


def _states_of_parameters(stage: int) -> None:
    engine, model, optimizer = _prepared(stage)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    engine.backward(square(model(batch(0))))
    optimizer.step()
    weight = model.head.weight
    acts: list[Any] = [lambda: optimizer.state.pop(weight), lambda: optimizer.state.__delitem__(weight)]
    if stage == 0:
        acts += [
            lambda: optimizer.state[weight].clear(),
            lambda: optimizer.state[weight].update(more=1),
            lambda: optimizer.state.__setitem__(weight, {}),
            lambda: optimizer.state[weight].__setitem__("step", torch.tensor(0.0)),
        ]
        optimizer.state[weight]["momentum_buffer"] = torch.zeros(OUT, DIM)
        assert not optimizer.state[weight]["momentum_buffer"].any()
    for act in acts:
        with _refused(r"of head\.weight cannot|optimizer\.state\[head\.weight\] cannot be had", "optimizer.state"):
            act()


def _groups_changed_by_hand(stage: int) -> None:
    for change in (
        lambda groups: groups[0]["params"].pop(),
        lambda groups: groups[0]["params"].append(nn.Parameter(torch.ones(1))),
        lambda groups: groups[0].update(params=groups[0]["params"][::-1]),
        lambda groups: groups.pop(),
        lambda groups: groups.append({**groups[0], "params": []}),
    ):
        engine, model, optimizer = _prepared(stage)
        engine.backward(square(model(batch(0))))
        change(optimizer.param_groups)
        with _refused("in group . of the prepared SGD are not those", "optimizer.add_param_group"):
            optimizer.step()


def _optimizers_that_cannot_be_tried(stage: int) -> None:
    class NeedsClosure(torch.optim.SGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            closure()

    replaced: Any = torch.optim.SGD(Net().parameters(), lr=0.1)
    replaced.step = lambda closure=None: None
    for make in (lambda params: NeedsClosure(params, lr=0.1), lambda params: replaced):
        net = Net()
        made = make(net.parameters())
        made.param_groups[0]["params"] = list(net.parameters())
        with _refused("cannot step sharded parameters", "use an element-wise optimizer"):
            _engine(stage).prepare(net, made)


class _ByParameter(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.rates = {param: 0.1 for param in self.param_groups[0]["params"]}


class _ByPlace(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for place, param in enumerate(group["params"]):
                if param.grad is not None:
                    param.sub_(param.grad / (place + 1))


def _optimizers_that_know_parameters(stage: int) -> None:
    with _refused("cannot step sharded parameters", "use an element-wise optimizer"):
        _engine(stage).prepare(net := Net(), _ByParameter(net.parameters(), lr=0.1))
    if stage:  # at stage 0 it is given the parameters as they are
        with _refused("cannot step sharded parameters", "zero_stage=0"):
            _engine(stage).prepare(net := Net(), _ByPlace(net.parameters(), lr=0.1))


def _hooks_after_gradients(stage: int) -> None:
    engine, model, _ = _prepared(stage)
    with _refused("a hook after the gradient of a prepared parameter of root", "register_hook"):
        model.head.weight.register_post_accumulate_grad_hook(lambda param: None)
    engine.free_memory()
    net = Net()
    net.head.weight.register_post_accumulate_grad_hook(lambda param: None)
    with _refused(r"a hook after the gradient of the parameter head\.weight", "register_hook"):
        _engine(stage).prepare(net)


def _a_model_of_two_engines(stage: int) -> None:
    engine, model, _ = _prepared(stage)
    with _refused(r"first\.weight is prepared already", "free_memory()"):
        _engine(stage).prepare(model)
    engine.free_memory()
    if stage < 3:
        again = _engine(stage).prepare(model)
        assert not again(batch(0)).isnan().any()
        del engine, model, again
    with _refused("set_ of a prepared parameter", "assign to its data"), torch.no_grad():
        _prepared(stage)[1].head.weight.set_(torch.zeros(OUT, DIM))


def _memory_that_nothing_trains(stage: int) -> None:
    net = Net()
    net.head.requires_grad_(False)
    net.register_buffer("mirror", net.head.weight.data[1:])
    net.blocks[0].requires_grad_(False)
    net.blocks[1].requires_grad_(False)
    net.blocks[1].inner.weight.data = net.blocks[0].inner.weight.data  # type: ignore[union-attr]
    model = _engine(stage).prepare(net)
    assert not model(batch(0)).isnan().any()
    named = Net()
    named.register_buffer("same", named.head.weight)
    if stage == 3:
        with _refused("the buffer same is a parameter", "register the parameter"):
            _engine(stage).prepare(named)
        engine, model, _ = _prepared(stage)
        loss = square(model(batch(0)))
        with _refused("to the data of a parameter of", "write in place"):
            model.blocks[1].inner.weight.data = torch.zeros(DIM, DIM)
        engine.backward(loss)
        del loss
        model.blocks[1].inner.weight.data = torch.zeros(DIM, DIM)


def _gradients_over_groups(stage: int) -> None:
    engine, model, optimizer = _prepared(stage)
    engine.backward(square(model(batch(0))))
    (params,) = (group["params"] for group in optimizer.param_groups)
    assert all(one is other for one, other in zip(params, model.parameters(), strict=True))
    if stage == 0:
        assert params[0].grad is not None
        return
    with _refused(r"first\.weight\.grad cannot be read", "engine.gradients(model)"):
        params[0].grad  # noqa: B018


def _names_of_gradients(stage: int) -> None:
    engine, model, optimizer = _prepared(stage)
    engine.backward(square(model.head(model.first(batch(0)))))
    fix = "assign only names that engine.gradients gave"
    with _refused(r"blocks\.1\.inner\.weight has no gradient", fix), engine.gradients(model) as grads:
        assert "head.weight" in grads and "blocks.1.inner.weight" not in grads
        grads["blocks.1.inner.weight"] = torch.zeros(DIM, DIM)
    optimizer.step()


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_refused_at_every_stage(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_refused_when_prepared, 2, stage, timeout_s=120.0)
    run_ranks(_assigned_wrongly, 2, stage)
    run_ranks(_names_of_gradients, 2, stage)
    run_ranks(_where_no_hook_is_called, 2, stage)
    run_ranks(_states_by_parameter, 2, stage)
    run_ranks(_gradients_over_groups, 2, stage)
    for act in (_states_of_parameters, _groups_changed_by_hand, _optimizers_that_cannot_be_tried):
        run_ranks(act, 2, stage)
    for act in (_optimizers_that_know_parameters, _hooks_after_gradients, _added_and_stepped_alone):
        run_ranks(act, 2, stage)
    for act in (_a_model_of_two_engines, _memory_that_nothing_trains):
        run_ranks(act, 2, stage)


def test_what_needs_every_weight_is_refused_at_stage_3(run_ranks: RunRanks) -> None:
    run_ranks(_refused_at_stage_3, 2, timeout_s=120.0)


@pytest.mark.parametrize("stage", STAGES)
def test_backward_through_weights_of_an_earlier_step(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_stale_graph, 2, stage, timeout_s=120.0)


def _steps_without_a_backward(stage: int) -> None:
    engine, model, optimizer = _prepared(stage)
    with pytest.raises(DisagreementError, match=r"stepped without a backward of its own.*loss \* 0"):
        for step in range(4):
            if engine.process_index or step != 1:
                engine.backward(square(model(batch(step))))
            optimizer.step()
            optimizer.zero_grad()


def test_a_rank_that_steps_without_a_backward_is_told(run_ranks: RunRanks) -> None:
    run_ranks(_steps_without_a_backward, 2, 0)


def _written_by_an_old_view(moment: str) -> None:
    engine, model, optimizer = _prepared(3)
    views: list[torch.Tensor] = []
    block: Any = model.blocks[1].inner
    keep = block.register_forward_hook(lambda module, *_: views.append(module.weight.detach()))
    for step in range(2):
        engine.backward(square(model(batch(step))))
        keep.remove()
        if step == 1 and moment == "before the step":
            with _refused("written to by a view of it from an earlier step", "take the view anew"):
                views[0].mul_(0.5)
                optimizer.step()
            return
        optimizer.step()
        optimizer.zero_grad()
    views[0].mul_(0.5)
    with _refused("written to by a view of it from an earlier step", "take the view anew"):
        model(batch(2))
    engine.free_memory()


@pytest.mark.parametrize("moment", ["before the step", "between steps"])
def test_writes_by_views_of_memory_that_was_let_go(run_ranks: RunRanks, moment: str) -> None:
    run_ranks(_written_by_an_old_view, 2, moment)
