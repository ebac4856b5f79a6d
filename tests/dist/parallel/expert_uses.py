"""What else is done with experts over ranks: states saved and loaded, starts from nothing, frozen parts, refusals."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tests.dist.parallel import test_tensor_states, trainings
from tests.dist.parallel.experts import Mixture, Skewed, _mixtral, plain_loss
from tests.dist.parallel.trainings import loss_of, prepared, steps, trained
from torch import nn

import distui
from distui.core.errors import UserError


EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def saved(name: str, layout: tuple[int, int], folder: str) -> dict[str, Any]:
    """`layout` is how many ranks share the experts, and the ZeRO stage."""
    return test_tensor_states._save(name, (1, layout[1]), folder, strategy={"expert_parallel": layout[0]})


def loaded(name: str, layout: tuple[int, int], folder: str) -> dict[str, Any]:
    return test_tensor_states._load(name, (1, layout[1]), folder, strategy={"expert_parallel": layout[0]})


def features(folder: str, stage: int) -> dict[str, Any]:
    """Return whole gradients and weights, what a rank holds, and what is refused."""
    found: dict[str, Any] = {}
    engine, model, optimizer, loader = prepared("deepseek", 1, stage, strategy={"expert_parallel": 2})
    batch = next(iter(loader))
    engine.backward(loss_of("deepseek", model, batch))
    with engine.gradients(model) as gradients:
        found["gradients"] = {name: grad.clone() for name, grad in gradients.items()}
        gradients[EXPERTS].mul_(2.0)
    with engine.gradients(model) as gradients:
        found["doubled"] = torch.equal(gradients[EXPERTS], 2 * found["gradients"][EXPERTS])
    optimizer.step()
    optimizer.zero_grad()
    found["shapes"] = [tuple(param.shape) for name, param in model.named_parameters() if name == EXPERTS]
    found["data"] = engine.num_data_ranks, engine.data_index
    for what, act in {
        "state_dict": model.state_dict,
        "full": lambda: engine.full_parameters(model).__enter__(),
        "shape": lambda: engine.load_state_dict(model, {EXPERTS: torch.zeros(3, 3)}, strict=False),
    }.items():
        try:
            act()
            found[what] = "nothing was said"
        except UserError as error:
            found[what] = error.what
    engine.save_model(model, folder)
    before = engine.get_state_dict(model)
    steps("deepseek", engine, model, optimizer, loader)
    engine.load_weights(model, folder)
    after = engine.get_state_dict(model)
    found["weights"] = all(torch.equal(before[name], after[name]) for name in before)
    engine.free_memory()
    return found


def gradients() -> dict[str, torch.Tensor]:
    """Return those of one process, of the batch that four ranks have together."""
    engine, model, _, _ = prepared("deepseek", 1, 0)
    engine.backward(loss_of("deepseek", model, torch.stack(trainings.samples()[: trainings.ROWS])))
    with engine.gradients(model) as found:
        kept = {name: grad.clone() for name, grad in found.items()}
    engine.free_memory()
    return kept


# ---- refusals --------------------------------------------------------------------------------------------------------


def refusals(kinds: list[str]) -> list[str]:
    """Return what each kind of model, or of use, is told on this rank."""
    return [_refusal(kind) for kind in kinds]


def _refusal(kind: str) -> str:
    engine = distui.Engine(strategy={"expert_parallel": 2})
    model: Any = Skewed("")
    if kind == "llama":
        model = trainings.build("llama")
    if kind == "three":
        model = _mixtral(num_local_experts=3)
    if kind == "tied":
        model.other = nn.ParameterList([model.layers[0].experts.up])
    if kind == "buffer":
        model.layers[0].experts.register_buffer("limits", torch.ones(4))
    try:
        if kind == "trained":
            model(torch.ones(1, 3, dtype=torch.int64)).sum().backward()
        if kind == "again":
            engine.prepare(model)
            distui.Engine().prepare(model)
        if kind == "muon":
            engine.prepare(model, Whole(model.parameters()))
        engine.prepare(model)
        if kind == "named":
            given = {"weights": torch.ones(3, 2), "indices": torch.zeros(3, 2, dtype=torch.int64)}
            hidden = torch.ones(3, 16)
            return str(torch.equal(model.layers[0].experts(hidden, **given), model.layers[0].experts(hidden, given["indices"], given["weights"])))
        model.layers[0].experts(torch.zeros(3, 16))
    except UserError as error:
        return str(error)
    finally:
        engine.free_memory()
    return "nothing"


class Whole(torch.optim.Optimizer):
    """Steps a parameter by the norm of all of its gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad / param.grad.norm())


# ---- starts, overflows, frozen parts ---------------------------------------------------------------------------------


def from_meta(num_experts: int, stage: int, folder: str) -> dict[str, Any]:
    """Start from nothing on meta: by seeds, and out of files."""
    found = {}
    for kind, weights in (("seeds", None), ("files", folder)):
        engine = distui.Engine(strategy={"expert_parallel": num_experts, "zero_stage": stage})
        with distui.init_empty_weights():
            model: Any = Mixture() if kind == "seeds" else _mixtral()
        model = engine.prepare(model, weights=weights)
        found[kind] = engine.get_state_dict(model)
        engine.free_memory()
    return found


def overflowing(num_experts: int, stage: int) -> list[tuple[bool, float]]:
    """Let one expert's gradient overflow in fp16; return of each step whether it was skipped, and the scale."""
    strategy = {"expert_parallel": num_experts}
    engine, model, optimizer, loader = prepared("mixtral", 1, stage, strategy=strategy, precision={"dtype": "fp16"})
    found = []
    for number, ids_BT in enumerate(loader):
        engine.backward(loss_of("mixtral", model, ids_BT))
        if number == 0:
            with engine.gradients(model) as gradients:
                gradients["model.layers.0.mlp.experts.down_proj"][3, 0, 0] = float("inf")
        optimizer.step()
        optimizer.zero_grad()
        assert engine.scaler is not None
        found.append((engine.optimizer_step_was_skipped, engine.scaler.scale))
    engine.free_memory()
    return found


def thawing(cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Train with experts that are frozen at first, and a layer that is later; beside Muon, which takes matrices."""
    torch.set_num_threads(1)
    return [_thawing(*case) for case in cases]


def _thawing(num_experts: int, stage: int) -> dict[str, Any]:
    engine = distui.Engine(strategy={"expert_parallel": num_experts, "zero_stage": stage})
    torch.manual_seed(engine.process_index)
    model: Any = Skewed("experts")
    matrices = [param for name, param in model.named_parameters() if param.dim() == 2 and "embedding" not in name]
    rest = [param for param in model.parameters() if all(param is not matrix for matrix in matrices)]
    loader: Any = torch.utils.data.DataLoader(
        trainings.samples(),  # type: ignore[arg-type]
        batch_size=trainings.ROWS // engine.num_data_ranks,
    )
    model, muon, adam, loader = engine.prepare(
        model, torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3, eps=1e-5), loader
    )
    norms = []
    for number, ids_BT in enumerate(loader):
        if number == 2:
            for name, param in model.named_parameters():
                param.requires_grad_("layers.1" not in name)
        engine.backward(plain_loss("", model, ids_BT))
        norm = engine.clip_grad_norm_(model.parameters(), 0.5)
        assert norm is not None
        norms.append(float(norm))
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
    found = {"weights": engine.get_state_dict(model), "norms": norms, "losses": []}
    engine.free_memory()
    return found


def frozen(num_experts: int, stage: int, folder: str, loads: bool) -> dict[str, Any]:
    """Save, or load, a model whose experts are frozen."""
    engine = distui.Engine(strategy={"expert_parallel": num_experts, "zero_stage": stage})
    model: Any = trainings.build("skewed-frozen-experts", int(loads))
    model, _ = engine.prepare(model, torch.optim.AdamW(model.parameters()))
    (engine.load_state if loads else engine.save_state)(folder)
    found = engine.get_state_dict(model)
    engine.free_memory()
    return found


def idle(num_experts: int, stage: int) -> dict[str, Any]:
    """Train where all ranks but the first have empty batches, with evaluations between the steps."""
    engine = distui.Engine(strategy={"expert_parallel": num_experts, "zero_stage": stage})
    model: Any = trainings.build("mixture", engine.process_index)
    model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5))
    for ids_BT in torch.stack(trainings.samples()[:8]).split(4):
        if engine.process_index == 0:
            loss = plain_loss("", model, ids_BT) * engine.num_processes
        else:
            loss = model(ids_BT[:0, :-1]).sum() * 0
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(ids_BT)
        model.train()
    found = {"weights": engine.get_state_dict(model), "norms": [], "losses": []}
    engine.free_memory()
    return found


def compiled(name: str, num_experts: int, stage: int) -> dict[str, Any]:
    """Train with compiled layers."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    strategy = {"expert_parallel": num_experts}
    engine, model, optimizer, loader = prepared(name, 1, stage, strategy=strategy)
    for layer in model.layers if name == "mixture" else model.model.layers:
        layer.compile(backend="eager")
    return trained(name, engine, model, optimizer, loader, plain_loss if name == "mixture" else loss_of)


def two_models() -> list[list[int] | None]:
    """Step one of two models that both have run; return the loads that their mixtures know after that."""
    engine = distui.Engine()
    pair: list[Any] = [Mixture(), Mixture()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in pair]
    one, other, first, second = engine.prepare(*pair, *optimizers)
    ids_BT = torch.ones(2, 3, dtype=torch.int64)
    engine.backward(one(ids_BT).sum() + other(ids_BT).sum() * 0)
    first.step()
    first.zero_grad()
    found = [model.layers[0].moe.load for model in (one, other)]
    second.zero_grad()
    engine.free_memory()
    return [None if load is None else load.tolist() for load in found]
