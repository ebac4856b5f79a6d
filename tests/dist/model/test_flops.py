"""Measured FLOPs equal the closed formulas, whatever the stage, accumulation, checkpointing and precision."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distui
from distui.core.telemetry.source import NullSource

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB, WIDTH, HEADS, LAYERS, LENGTH, SAMPLES = 96, 32, 4, 3, 16, 24


class Mlp(nn.Sequential):
    """Is compiled in a test; torch 2.13 compiles nothing of a plain Sequential."""

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Run the layers."""
        for layer in self:
            x_BLD = layer(x_BLD)
        return x_BLD


class Block(nn.Module):
    """Attention and an MLP, as in GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = Mlp(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Shapes: B batch, L length, D width."""
        heads = self.qkv(self.norm(x_BLD)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x_BLD = x_BLD + self.out(attended.transpose(1, 2).flatten(2))
        return x_BLD + self.mlp(x_BLD)


class Gpt(nn.Module):
    """A small GPT with an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x_BLD = self.embedding(ids_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.head(x_BLD)


class Recorder(NullSource):
    """Keeps the steps."""

    sent: list[dict[str, Any]]

    def step(self, **fields: Any) -> None:
        """Keep `fields`."""
        self.sent.append(fields)


def _formula(num_tokens: int) -> float:
    """6 N + 12 l h s a token (PaLM, arXiv 2204.02311, appendix B); N: parameters that multiply."""
    num_parameters = LAYERS * 12 * WIDTH**2 + VOCAB * WIDTH
    return num_tokens * (6 * num_parameters + 12 * LAYERS * WIDTH * LENGTH)


def _train(global_size: int, accumulation: int, compiled: bool, count: bool, sections: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    # The compiler asks every tensor for its gradient and hides the warning, which comes first where it is an error.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
    torch._dynamo.reset()
    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    engine = distui.Engine(
        batch={"global_size": global_size, "accumulation": accumulation},
        telemetry={"profile_flops": count},
        **sections,
    )
    model = Gpt()
    if compiled:
        for block in model.blocks:
            block.get_submodule("mlp").compile(backend=compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = TensorDataset(torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1)))
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(data, batch_size=global_size))
    recorder = Recorder()
    sent: list[dict[str, Any]] = []
    recorder.sent = sent
    engine.clock.telemetry = recorder
    printed = io.StringIO()
    with redirect_stdout(printed):
        for (ids,) in loader:
            with engine.accumulate(model):
                loss = F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
                engine.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return {
        "steps": [(fields["tokens"], fields["flops"]) for fields in sent],
        "losses": [float(fields["loss"]()) for fields in sent],
        "tally": engine.clock.flops.tally,
        "table": printed.getvalue(),
        "graphs": len(graphs),
        "state": {name: value.clone() for name, value in engine.get_state_dict(model).items()},
        "problem": engine.clock.flops.problem,
    }


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 0": (1, {"strategy": {"zero_stage": 0}}),
    "stage 1": (1, {"strategy": {"zero_stage": 1}}),
    "stage 3": (1, {"strategy": {"zero_stage": 3}}),
    "stage 3, accumulation": (2, {"strategy": {"zero_stage": 3}}),
    "stage 0, accumulation, bf16": (2, {"strategy": {"zero_stage": 0}, "precision": {"dtype": "bf16"}}),
    "stage 2, checkpointing": (1, {"strategy": {"zero_stage": 2}, "activation_checkpointing": {"mode": "full"}}),
    "stage 3, checkpointing, bf16": (
        1,
        {
            "strategy": {"zero_stage": 3},
            "activation_checkpointing": {"mode": "full"},
            "precision": {"dtype": "bf16"},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_flops_of_a_gpt_are_the_closed_formula(case: str, run_ranks: RunRanks) -> None:
    accumulation, sections = CASES[case]
    for rank, found in enumerate(run_ranks(_train, 2, 12, accumulation, False, True, sections)):
        assert found["problem"] == ""
        assert [tokens for tokens, _ in found["steps"]] == [6 * LENGTH, 6 * LENGTH]
        (_, first), (tokens, flops) = found["steps"]
        assert first is None
        assert flops == pytest.approx(_formula(tokens), rel=0.01)
        tally = found["tally"]
        micro = _formula(6 * LENGTH // accumulation)
        assert tally.forward == pytest.approx(micro / 3, rel=0.01)
        checkpointed = "activation_checkpointing" in sections
        attention = tally.forward * 4 * LAYERS * WIDTH * LENGTH / (_formula(1) / 3)
        head = 2 * VOCAB * WIDTH * 6 * LENGTH // accumulation
        again = attention / 2 + (tally.forward - head if checkpointed else 0)
        # A checkpoint stops early: behind the last tensor that backward needs, an MLP's last multiplication.
        unneeded = LAYERS * 8 * WIDTH**2 * 6 * LENGTH if checkpointed else 0
        assert again - unneeded - 1 <= tally.recomputed <= again + 1
        assert ("module" in found["table"]) == (rank == 0)


def test_counting_changes_no_bit(run_ranks: RunRanks) -> None:
    sections: dict[str, Any] = {"strategy": {"zero_stage": 3}}
    (counted, _), (plain, _) = (run_ranks(_train, 2, 12, 2, False, count, sections) for count in (True, False))
    assert plain["steps"][-1][1] is None
    assert counted["losses"] == plain["losses"]
    for name, value in plain["state"].items():
        assert torch.equal(counted["state"][name], value), name


def test_compiled_blocks_are_counted_and_stay_compiled(run_ranks: RunRanks) -> None:
    sections: dict[str, Any] = {"strategy": {"zero_stage": 1}}
    found, plain = (run_ranks(_train, 2, 8, 1, True, count, sections)[0] for count in (True, False))
    assert found["steps"][-1][1] == pytest.approx(_formula(4 * LENGTH), rel=0.01)
    assert found["graphs"] == plain["graphs"] >= 1
