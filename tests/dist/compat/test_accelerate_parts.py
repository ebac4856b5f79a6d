"""Parts of Accelerate's API that scripts and libraries lean on: hooks, optimizer states, loaders, trackers, compiling."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
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


class _Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    """Its own iterator, which knows where it stands."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> torch.Tensor:
        if self.at == 24:
            self.at = 0
            raise StopIteration
        self.at += 1
        return torch.tensor(float(self.at))

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def _stateful(dispatch: bool, num_workers: int, stream: bool) -> None:
    from distui.compat.accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
    from distui.compat.accelerate.utils import DataLoaderConfiguration
    from distui.compat.accelerate.utils.imports import stateful_class

    config = DataLoaderConfiguration(
        use_stateful_dataloader=True, dispatch_batches=dispatch, use_seedable_sampler=True, data_seed=3
    )
    accelerator = _accelerator(dataloader_config=config)
    values: Any = list(range(24)) if num_workers else torch.arange(24.0)

    def prepared() -> Any:
        torch.manual_seed(1)
        # Plain numbers: tensors would come from the forked workers as open files, of which a rank with threads may hang.
        context: Any = {"multiprocessing_context": "fork", "collate_fn": list} if num_workers else {}
        order: Any = {"dataset": _Stream()} if stream else {"dataset": values, "shuffle": True}
        options = {**order, "batch_size": 2, "num_workers": num_workers, **context}
        return accelerator.prepare(torch.utils.data.DataLoader(**options))

    def read(loader: Any, until: int = 99) -> list[list[float]]:
        found: list[list[float]] = []
        for batch in loader:
            found.append([float(value) for value in batch])
            if len(found) == until:
                states[:] = [copy.deepcopy(loader.state_dict()), copy.deepcopy(loader.rank_state_dict())]
        return found

    states: list[Any] = []
    loader = prepared()
    assert isinstance(loader, stateful_class())
    assert isinstance(loader, DataLoaderDispatcher if dispatch else DataLoaderShard)
    assert loader.state_dict()["num_batches"] == 0
    whole, following = read(loader, 2), read(loader)
    state, own = states
    reading = not dispatch or accelerator.is_main_process
    if reading:
        each = accelerator.num_processes if dispatch else 1
        assert (state["_snapshot"]["_snapshot_step"] if num_workers else state["_num_yielded"]) == 2 * each
    assert not state["_iterator_finished"] and loader.state_dict()["_iterator_finished"]
    again = prepared()
    again.load_state_dict(state)
    assert again.state_dict()["num_batches"] == 2
    if own is not None:
        again.load_rank_state_dict(own)
    for right, found in ((whole[2:], read(again)), (following, read(again))):
        assert found == right
    if not dispatch and not stream:
        third = prepared()
        third.load_state_dict({key: value for key, value in state.items() if key[0] == "_" or key.endswith("_state")})
        assert len(read(third)) == len(whole) - 2  # torchdata's alone
    alike = pickle.loads(pickle.dumps(loader))
    assert isinstance(alike, stateful_class()) and len(read(alike)) == len(whole)


@pytest.mark.parametrize("stream", [False, True])
def test_stateful_loaders_are_torchdatas(stream: bool, run_ranks: RunRanks) -> None:
    run_ranks(_stateful, 2, False, 0, stream)
    run_ranks(_stateful, 2, True, 0, stream)
    _stateful(False, 0, stream)


@pytest.mark.matrix  # a worker that is forked from a rank of the warm pool has ended by a segmentation fault once
def test_a_stateful_loader_with_workers(run_ranks: RunRanks) -> None:
    run_ranks(_stateful, 2, False, 2, False)


def test_stateful_loaders_need_torchdata(monkeypatch: pytest.MonkeyPatch) -> None:
    from distui.compat.accelerate import NotOffered
    from distui.compat.accelerate.data_loader import prepare_data_loader
    from distui.compat.accelerate.utils import DataLoaderConfiguration

    monkeypatch.setitem(sys.modules, "torchdata", None)
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    loader: Any = torch.utils.data.DataLoader(list(range(4)))  # type: ignore[arg-type]
    for use in (DataLoaderConfiguration, lambda **options: prepare_data_loader(loader, **options)):
        with pytest.raises(ImportError, match="pip install torchdata") as caught:
            use(use_stateful_dataloader=True)
        assert isinstance(caught.value, NotOffered)


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
