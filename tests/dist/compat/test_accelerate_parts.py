"""Parts of Accelerate's API that scripts and libraries lean on: hooks, optimizer states, loaders, trackers, compiling."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def _accelerator(**options: Any) -> Any:
    from distui.compat.accelerate import Accelerator, state

    state.GradientState._reset_state()
    state.AcceleratorState._reset_state(True)
    return Accelerator(**options)


def _batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def _hooked(name: str) -> list[Any]:
    """Train on the face and on torch's DDP with the same hook; both weights."""
    from torch.nn.parallel import DistributedDataParallel

    from distui.compat.accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    options = {"start_powerSGD_iter": 2} if name == "power_sgd" else {}
    handler = DistributedDataParallelKwargs(
        comm_hook=DDPCommunicationHookType(name), comm_wrapper=DDPCommunicationHookType("fp16" if options else "no"),
        comm_state_option=options,
    )  # fmt: skip
    accelerator = _accelerator(kwargs_handlers=[handler])
    rank = accelerator.process_index
    ours = _model()
    ours, optimizer = accelerator.prepare(ours, torch.optim.SGD(ours.parameters(), lr=0.5))
    theirs = DistributedDataParallel(_model())
    found = handler.hook()
    assert found is not None
    theirs.register_comm_hook(*found)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for step in range(4):
        accelerator.backward(ours(_batch(rank, step)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        theirs(_batch(rank, step)).pow(2).mean().backward()
        plain.step()
        plain.zero_grad()
    return [[p.detach().clone() for p in model.parameters()] for model in (ours, theirs.module)]


@pytest.mark.parametrize("name", ["fp16", "power_sgd"])
def test_a_comm_hook_is_torchs_own(name: str, run_ranks: RunRanks) -> None:
    for ours, theirs in run_ranks(_hooked, 2, name):
        for own, right in zip(ours, theirs, strict=True):
            assert torch.equal(own, right)


def _refused_hook() -> str:
    from distui.compat.accelerate import NotOffered
    from distui.compat.accelerate.utils import DDPCommunicationHookType, DeepSpeedPlugin, DistributedDataParallelKwargs

    with pytest.raises(NotOffered) as caught:
        _accelerator(
            deepspeed_plugin=DeepSpeedPlugin(zero_stage=2),
            kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)],
        )
    return str(caught.value)


def test_a_comm_hook_where_states_are_sharded_is_refused() -> None:
    assert "launch with --zero 0 (it is 2" in _refused_hook()


def _synced(way: str) -> list[Any]:
    accelerator = _accelerator()
    model = _model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rank = accelerator.process_index
    inside = model.no_sync() if way == "model" else accelerator.no_sync(model)
    with inside:
        accelerator.backward(model(_batch(rank, 0)).mean())
        local = model[0].weight.grad.clone()
    accelerator.backward(model(_batch(rank, 1)).mean())
    both = model[0].weight.grad.clone()
    optimizer.step()
    with copy.deepcopy(model).no_sync():
        pass
    return [local, both, model[0].weight.detach().clone()]


def test_no_sync_of_a_prepared_model(run_ranks: RunRanks) -> None:
    first, second = run_ranks(_synced, 2, "model")
    assert not torch.equal(first[0], second[0])
    for number in (1, 2):
        torch.testing.assert_close(first[number], second[number])
    for found, right in zip(first, run_ranks(_synced, 2, "accelerator")[0], strict=True):
        torch.testing.assert_close(found, right)


def _optimizer_states(stage: int) -> None:
    from distui.compat.accelerate.utils import DeepSpeedPlugin
    from distui.core.errors import UserError

    accelerator = _accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage))
    plain, model = _model(), _model()
    steps = []
    for which in (plain, model):
        groups = [{"params": which[0].parameters()}, {"params": which[2].parameters(), "lr": 0.1}]  # type: ignore[index]
        steps.append(torch.optim.AdamW(groups, lr=0.05, foreach=False, fused=False))
    model, optimizer = accelerator.prepare(model, steps[1])

    def run(step: int) -> None:
        for which, opt in ((plain, steps[0]), (model, optimizer)):
            loss = which(_batch(0, step)).pow(2).mean()
            loss.backward() if which is plain else accelerator.backward(loss)
            opt.step()
            opt.zero_grad()

    run(0)
    run(1)
    kept = copy.deepcopy(steps[0].state_dict())
    found = copy.deepcopy(optimizer.state_dict())  # as plain torch's, it may be views
    assert [group["params"] for group in found["param_groups"]] == [[0, 1], [2, 3]]
    for number, state in kept["state"].items():
        assert found["state"][number].keys() == state.keys()
        for key, value in state.items():
            assert found["state"][number][key].shape == value.shape
            torch.testing.assert_close(found["state"][number][key], value)
    run(2)
    steps[0].load_state_dict(found)  # into a plain optimizer, and back
    optimizer.load_state_dict(kept)
    weights = {name: value.fill_(0.1) for name, value in accelerator.get_state_dict(model).items()}
    accelerator.engine.load_state_dict(model, weights)
    plain.load_state_dict(weights)
    run(3)
    for name, own in accelerator.get_state_dict(model).items():
        torch.testing.assert_close(own, plain.state_dict()[name])
    if stage and accelerator.num_processes > 1:
        with pytest.raises(UserError, match="cannot be pickled or copied"):
            pickle.dumps(optimizer)
    else:
        for value in (accelerator, optimizer):
            pickle.loads(pickle.dumps(value))
    run(4)  # torch patches the class of an optimizer that it unpickles


def test_optimizer_states_have_the_parameters_shapes(run_ranks: RunRanks) -> None:
    for stage in (0, 1, 3):
        run_ranks(_optimizer_states, 2, stage)
    _optimizer_states(3)


def _stateful(dispatch: bool) -> None:
    from distui.compat.accelerate.utils import DataLoaderConfiguration

    config = DataLoaderConfiguration(use_stateful_dataloader=True, dispatch_batches=dispatch)
    accelerator = _accelerator(dataloader_config=config)
    data: Any = torch.arange(24.0)
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=2))
    whole, state = [], {}
    for count, batch in enumerate(loader, 1):
        whole.append(batch)
        if count == 2:
            state = loader.state_dict()
            assert state["_num_yielded"] == state["_sampler_iter_yielded"] == 2
            assert not state["_iterator_finished"]
    assert loader.state_dict()["_iterator_finished"]
    theirs = {key: value for key, value in state.items() if key.startswith("_")}
    for given in (state, theirs):  # as torchdata writes it
        again = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=2))
        again.load_state_dict(given)
        rest = list(again)
        assert len(rest) == len(whole) - 2
        assert all(torch.equal(own, right) for own, right in zip(rest, whole[2:], strict=True))
        assert len(list(again)) == len(whole)  # the next epoch is whole
    pickle.loads(pickle.dumps(loader))


def test_stateful_loaders_speak_torchdatas_states(run_ranks: RunRanks) -> None:
    run_ranks(_stateful, 2, False)
    run_ranks(_stateful, 2, True)


def test_a_loader_of_a_scripts_own_takes_part() -> None:
    from distui.compat.accelerate.data_loader import DataLoaderStateMixin
    from distui.compat.accelerate.state import GradientState

    class Own(DataLoaderStateMixin):
        def __init__(self) -> None:
            self.gradient_state = GradientState()
            self.dataset, self.total_batch_size = list(range(10)), 4

    own = Own()
    own.begin()
    assert (own.remainder, own.end_of_dataloader, own.gradient_state.active_dataloader) == (2, False, own)
    own.end()
    assert not own.gradient_state.in_dataloader


def test_trackers_of_a_script_and_of_the_real_library() -> None:
    from distui.compat.accelerate import tracking

    bases: list[Any] = [tracking.GeneralTracker]
    if importlib.util.find_spec("accelerate") is not None:
        bases.append(importlib.import_module("accelerate.tracking").GeneralTracker)
    for number, base in enumerate(bases):
        told: list[Any] = []

        class Mine(base):  # type: ignore[misc,valid-type]
            name = f"mine{number}"
            requires_logging_directory = True
            tracker = None

            def __init__(self, run_name: str, folder: Any, tone: str = "") -> None:
                super().__init__()
                told.append([run_name, folder, tone])

            def log(self, values: Any, step: Any = None, **kwargs: Any) -> None:
                told.append([values, step])

        tracking.register_tracker_class(Mine)
        for log_with in (f"mine{number}", Mine("run", "there", tone="low")):
            told.clear()
            if not isinstance(log_with, str):
                told.append(["run", "there", "low"])
            accelerator = _accelerator(log_with=log_with, project_dir="there")
            accelerator.init_trackers("run", init_kwargs={f"mine{number}": {"tone": "low"}})
            accelerator.log({"a": 1.0}, step=3)
            assert told == [["run", "there", "low"], [{"a": 1.0}, 3]]
        del tracking.LOGGER_TYPE_TO_CLASS[f"mine{number}"]
    with pytest.raises(ValueError, match="must be a subclass"):
        tracking.register_tracker_class(int)
    with pytest.raises(ValueError, match="non-empty `name`"):
        tracking.register_tracker_class(tracking.GeneralTracker)


def test_compiling_by_plugin_and_unwrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    from distui.compat.accelerate.utils import TorchDynamoPlugin, extract_model_from_parallel

    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "yes")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
    assert TorchDynamoPlugin().mode == "reduce-overhead"
    plugin = TorchDynamoPlugin(backend="eager", mode="default")
    assert plugin.use_regional_compilation
    assert "use_regional_compilation" not in plugin.to_kwargs()
    assert plugin.to_dict()["backend"] == "eager"
    accelerator = _accelerator(dynamo_plugin=plugin)
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    model = accelerator.prepare(nn.ModuleDict({"blocks": blocks}))
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert model._compiled_call_impl is None
    inner = _model()
    wrapped: Any = torch.compile(nn.DataParallel(inner), backend="eager")
    assert extract_model_from_parallel(wrapped, keep_torch_compile=False) is inner
    kept: Any = extract_model_from_parallel(wrapped)
    assert kept is wrapped
    assert kept._orig_mod is inner
    inside = nn.Sequential(nn.DataParallel(inner))
    assert extract_model_from_parallel(inside, recursive=True)[0] is inner
