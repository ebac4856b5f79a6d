"""`engine.use_kernels`: what is swapped computes what it computed before, and what is not known is left."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import distui
from distui.core.errors import UserError
from distui.core.model.kernel_swap import apply_kernels, undo_kernels

VOCAB = 31
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _model(kind: str = "Llama", **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for param in model.parameters():  # norms start at 1: a weight that is left out would not be seen
        nn.init.normal_(param, std=0.3)
    return model.train()


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :2] = -100
    return {"input_ids": ids, "labels": labels}


def _grads(model: Any, **batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: param.grad.clone() for name, param in model.named_parameters()}


def _counts(report: Any) -> dict[str, int]:
    return {kind: len(names) for kind, names in report.swapped.items()}


@pytest.mark.parametrize(
    ("kind", "counts", "left"),
    [
        ("Llama", (5, 2, 2, 1), {}),
        ("Mistral", (5, 2, 2, 1), {}),
        ("Qwen2", (5, 2, 2, 1), {}),
        ("Qwen3", (9, 2, 2, 1), {}),
        ("Phi3", (5, 2, 2, 1), {}),
        ("Gemma", (5, 0, 2, 1), {"swiglu": "silu"}),
        ("Gemma2", (9, 0, 2, 0), {"swiglu": "silu", "cross_entropy": "more than lm_head"}),
    ],
)
def test_known_models_give_what_they_gave(kind: str, counts: tuple[int, ...], left: dict[str, str]) -> None:
    model = _model(kind)
    batch, keys = _batch(), list(model.state_dict())
    expected = _grads(model, **batch)
    summed = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    report = apply_kernels(model)
    assert tuple(_counts(report).values()) == counts
    assert {item.kind for item in report.left} == set(left)
    assert all(left[item.kind] in item.why for item in report.left)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(_grads(model, **batch), expected, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(7)).loss, summed)
    # Without a loss, or outside of training, there are logits as before.
    assert model(input_ids=batch["input_ids"]).logits.shape == (2, 5, VOCAB)
    model.eval()
    assert model(**batch).logits.shape == (2, 5, VOCAB)
    assert isinstance(model(**batch, return_dict=False), tuple)
    report.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(_grads(model, **batch), expected, atol=0.0, rtol=0.0)


def test_a_swapped_model_runs_on_the_triton_kernels() -> None:
    model = _model(num_hidden_layers=1)
    batch = _batch()
    expected = _grads(model, **batch)
    apply_kernels(model, use_triton=True)
    found = _grads(model, **batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert model(**batch).logits is None


def test_bf16_rounds_where_the_module_did() -> None:
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    for kind in ("Llama", "Gemma"):
        norm = _model(kind).model.norm.to(torch.bfloat16)
        expected = norm(x)
        assert _counts(apply_kernels(norm))["rms_norm"] == 1
        assert torch.equal(norm(x), expected)


class _Gated(nn.Module):
    def __init__(self, negate: bool = False) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.sign = -1.0 if negate else 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x) * self.sign)


class _OffsetRMSNorm(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1.0


def test_modules_of_plain_torch_are_known_by_what_they_compute() -> None:
    parts = [nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-3, elementwise_affine=False), _Gated()]
    others = [_OffsetRMSNorm(8), nn.RMSNorm((2, 8)), _Gated(negate=True)]
    model = nn.Sequential(*parts, *others)
    x = torch.randn(3, 2, 8)
    expected = model(x)
    state = torch.get_rng_state()
    report = apply_kernels(model)
    assert torch.equal(state, torch.get_rng_state())
    assert report.swapped["rms_norm"] == ["0", "1"]
    assert report.swapped["swiglu"] == ["2"]
    assert [item.name for item in report.left] == ["3", "4", "5"]
    assert "left 3: on a sample it does not give x / rms(x) * weight" in str(report)
    assert "2 dimensions" in str(report)
    torch.testing.assert_close(model(x), expected)
    # What somebody else has replaced stays theirs, also after undoing.
    undo_kernels(model)
    model[0].forward = lambda x: x
    assert "replaced" in apply_kernels(model).left[0].why
    undo_kernels(model)
    assert "forward" in vars(model[0])


def test_copies_and_pickles_are_of_the_copy() -> None:
    model = _model()
    apply_kernels(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert model(**_batch()).loss > 0
    assert other(**_batch()).loss != model(**_batch()).loss
    assert other.model.norm.forward.__self__ is other.model.norm
    torch.testing.assert_close(pickle.loads(pickle.dumps(other))(**_batch()).loss, other(**_batch()).loss)


@pytest.mark.parametrize("first", [True, False])
def test_an_engine_trains_with_kernels(first: bool) -> None:
    """Before and after prepare, with recomputation in backward, to the same weights."""

    def train(kernels: bool) -> dict[str, torch.Tensor]:
        engine = distui.Engine(activation_checkpointing={"mode": "full"}, precision={"dtype": "fp32"})
        model = _model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if kernels and first:
            engine.use_kernels(model)
        model, optimizer = engine.prepare(model, optimizer)
        if kernels and not first:
            report = engine.use_kernels(model)
            assert str(report).startswith("rms_norm: 5 modules\nswiglu: 2 modules\nrotary: 2 modules\ncross_entropy: 1")
        for _ in range(3):
            engine.backward(model(**_batch()).loss)
            optimizer.step()
            optimizer.zero_grad()
        if kernels:
            engine.use_kernels(model, undo=True)
            assert model(**_batch()).logits is not None
        return engine.get_state_dict(model)

    torch.testing.assert_close(train(True), train(False), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="softmax"):
        distui.Engine().use_kernels(nn.Linear(2, 2), kinds=["softmax"])


def test_compiled_blocks_run_swapped_forwards() -> None:
    # The compiler asks every tensor for its gradient and hides the warning, which comes first where it is an error.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = _model(num_hidden_layers=1)
    expected = _grads(model, **_batch())
    model.model.layers[0].compile(backend="eager", fullgraph=True)
    model(**_batch())
    apply_kernels(model)  # also after it was compiled
    torch.testing.assert_close(_grads(model, **_batch()), expected, atol=2e-6, rtol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
