"""A job with too many ranks to show: a line a host, the sick ones first and on top of the map."""

from __future__ import annotations

import numpy as np

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import seconds
from distui.tui.monitor.model import RunModel
from distui.tui.monitor.views.base import map_title
from distui.tui.widgets.heatmap import Heatmap

NUM_HOSTS = 40


def update(sick: int, times: list[float]) -> pb.Update:
    """Return an update of hosts of 8 ranks, one of them sick; `times` are its hosts' step times, by row."""
    found = pb.Update(steps=[pb.StepSummary(step=5, time_s=1.0, step_s=0.1, rank_step_s=times)])
    order = [sick, *(row for row in range(NUM_HOSTS) if row != sick)]
    for row in order:
        found.snapshot.hosts.add(node=f"gpu{row}", row=row, num_ranks=8, first_rank=8 * row, sick=row == sick)
    for row in range(NUM_HOSTS):
        found.snapshot.ranks.add(rank=8 * row + 3, node=f"gpu{row}", state="running")
    found.snapshot.run.world_size = 8 * NUM_HOSTS
    return found


def test_the_sickest_host_is_first() -> None:
    model = RunModel("train-1")
    model.apply(update(17, [0.1] * NUM_HOSTS), 0.0)
    assert [rank.node for rank in model.ranks[:3]] == ["gpu17", "gpu0", "gpu1"]
    assert map_title(model) == "step time by host, 1 sick, at the top"
    model.apply(update(2, [0.1] * NUM_HOSTS), 0.0)
    assert model.ranks[0].node == "gpu2"


def test_a_rank_is_drawn_by_the_times_of_its_host() -> None:
    model = RunModel("train-1")
    model.apply(update(17, [float(row) for row in range(NUM_HOSTS)]), 0.0)
    assert model.row(17 * 8 + 3) == 17 and model.host(17 * 8 + 3) == "gpu17"
    # A rank that is not shown is still known by its host: it can be looked into.
    assert model.rank(17 * 8) is None and model.host(17 * 8) == "gpu17" and model.row(17 * 8) == 17
    assert model.host(8 * NUM_HOSTS) == ""
    assert model.history.rank_times(model.row(17 * 8)) == [17.0]


def test_the_map_has_the_order_and_names_of_hosts() -> None:
    shown = Heatmap(unit=seconds)
    rows = [[float(row) for row in range(NUM_HOSTS)]]
    named = {17: "gpu17", **{row: f"gpu{row}" for row in range(NUM_HOSTS) if row != 17}}
    shown.show([5], rows, named)
    assert (shown.num_ranks, shown._order[:3], shown._label(0, 1)) == (NUM_HOSTS, [17, 0, 1], "gpu17")
    assert np.asarray(rows)[:, shown._order][0, :3].tolist() == [17.0, 0.0, 1.0]
    shown.show([5], rows)
    assert shown._label(0, 1) == "rank 0"


def test_few_ranks_are_shown_as_they_are() -> None:
    model = RunModel("train-1")
    found = update(3, [0.1] * NUM_HOSTS)
    del found.snapshot.hosts[:]
    model.apply(found, 0.0)
    assert [rank.rank for rank in model.ranks] == [8 * row + 3 for row in range(NUM_HOSTS)]
    assert model.row(11) == 11 and map_title(model) == "step time by rank"
