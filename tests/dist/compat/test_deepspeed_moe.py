"""`deepspeed.moe.layer.MoE` whose experts lie on several ranks, under `deepspeed.initialize`: what one process computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

ROWS, STEPS = 8, 4


class Mixture(nn.Module):
    """Two mixtures between an embedding and a head."""

    def __init__(self, ep_size: int, k: int) -> None:
        from distui.compat.deepspeed.moe.layer import MoE

        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        expert = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        given: dict[str, Any] = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
        self.moes = nn.ModuleList(MoE(8, expert, num_experts=4, ep_size=ep_size, k=k, **given) for _ in range(2))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT[:, :-1])
        moes: Any = self.moes
        for moe in moes:
            out_BTD, _, counts_E = moe(x_BTD)
            assert int(counts_E.sum()) == x_BTD[..., 0].numel() * moe.deepspeed_moe.gate.k
            x_BTD = x_BTD + out_BTD
        return F.cross_entropy(self.head(x_BTD).flatten(0, 1), ids_BT[:, 1:].flatten())


def train(ep_size: int, k: int, stage: int) -> dict[str, Any]:
    from distui.compat import deepspeed
    from distui.compat.deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(0)
    model = Mixture(ep_size, k)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    experts = [param for param in model.parameters() if is_moe_param(param)]
    assert [id(param) for group in groups if group.get("moe") for param in group["params"]] == [*map(id, experts)]
    config = {
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": ROWS // deepspeed.comm.get_world_size(),
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.5,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(STEPS):
        ids_BT = torch.randint(20, (ROWS, 6), generator=generator)
        own_BT = ids_BT.chunk(engine.dp_world_size)[engine.global_rank]
        loss = engine(own_BT)
        engine.backward(loss)
        engine.step()
        losses.append(float(engine.engine.reduce(loss.detach(), "mean")))
    held = sum(param.numel() for param in experts)
    engine.destroy()
    return {"losses": losses, "held": held}


@pytest.mark.parametrize(("k", "stage"), [(1, 1), (2, 3)])
def test_experts_over_two_ranks_train_as_in_one_process(run_ranks: RunRanks, k: int, stage: int) -> None:
    alone = run_ranks(train, 1, 1, k, 0)[0]
    for ep_size in (1, 2):
        for found in run_ranks(train, 2, ep_size, k, stage):
            assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
