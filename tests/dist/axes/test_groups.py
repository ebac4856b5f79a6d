"""The groups of a job, on ranks: whom each talks to, its label in the ledger, and torch's DeviceMesh over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from distui.core.axes.cut import Cut
from distui.core.axes.groups import Axes, beside
from distui.core.axes.sizes import AxisSizes
from distui.core.axes.tensors import assemble, take
from distui.core.telemetry.collectives import group_label


def _talk() -> dict[str, Any]:
    axes = Axes(AxisSizes(dp=2, tp=2))
    found: dict[str, Any] = {}
    for kind in ("tp", "data", "shard", "model", "cp", "pp"):
        group = axes[kind]
        total = torch.tensor([10.0 ** dist.get_rank()])
        if group is not None:
            dist.all_reduce(total, group=group)
        label = group_label(group).split(" ")[0] if group is not None else ""
        found[kind] = (int(total), label, axes.index(kind))
    same = (axes["data"] is axes["shard"], axes["tp"] is axes["model"], axes["cp"])
    data = axes["data"]
    assert data is not None
    own = beside(data)
    dist.destroy_process_group(beside(data))
    assert beside(beside(data)).group_desc == "data"
    total = torch.tensor([10.0 ** dist.get_rank()])
    dist.all_reduce(total, group=own)
    mesh = axes.mesh("cpu")
    assert axes.mesh("cpu") is mesh and mesh["tp"].get_group() is axes["tp"]
    whole = torch.arange(35.0).view(5, 7)
    cuts = [Cut.split((5, 7), 1, 2, rank) for rank in range(2)]
    mine = cuts[axes.index("tp")]
    group = axes["tp"]
    assert group is not None
    again = assemble(take(whole, mine), mine, group)
    copies = Cut.heads((4, 2), 0, 1, 2, axes.index("tp"))
    shared = torch.arange(8.0).view(4, 2)
    return found | {
        "same": same,
        "beside": int(total),
        "mesh": (mesh.mesh_dim_names, tuple(mesh.mesh.shape), list(mesh.get_coordinate() or ())),
        "assembled": torch.equal(again, whole) and torch.equal(assemble(shared, copies, group), shared),
    }


def test_groups_span_what_they_should(run_ranks: Callable[..., Any]) -> None:
    found = run_ranks(_talk, 4)
    assert [of["tp"] for of in found] == [(11, "tp", 0), (11, "tp", 1), (1100, "tp", 0), (1100, "tp", 1)]
    assert [of["data"] for of in found] == [(101, "data", 0), (1010, "data", 0), (101, "data", 1), (1010, "data", 1)]
    assert [of["shard"][0] for of in found] == [101, 1010, 101, 1010] == [of["beside"] for of in found]
    assert all(of["same"] == (True, True, None) and of["assembled"] for of in found)
    assert [of["mesh"] for of in found] == [
        (("pp", "dp", "cp", "tp"), (1, 2, 1, 2), [0, dp, 0, tp]) for dp in range(2) for tp in range(2)
    ]
