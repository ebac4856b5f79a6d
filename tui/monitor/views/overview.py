"""View 1: how the run is doing, on one screen."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widget import Widget

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import NA, num_bytes, percent, scalar, seconds, si
from distui.tui.monitor.model import optional
from distui.tui.monitor.views.base import (
    Curve,
    Frame,
    Key,
    Panel,
    View,
    draw_curve,
    draw_map,
    draw_memory,
    draw_split,
    map_title,
    window_newest,
)
from distui.tui.monitor.views.rank_columns import RANK_COLUMNS, RankLine, show_ranks
from distui.tui.widgets.chart import LineChart
from distui.tui.widgets.heatmap import Heatmap
from distui.tui.widgets.stack import StackedBars
from distui.tui.widgets.table import Column, LineTable

_NODE_COLUMNS: tuple[Column[pb.NodeState], ...] = (
    Column("node", lambda n: n.node, str, "left"),
    Column("CPU", lambda n: n.hardware.cpu_percent / 100 if n.HasField("hardware") else None, percent, width=5),
    Column("memory", lambda n: n.hardware.memory_used_bytes if n.HasField("hardware") else None, num_bytes, width=8),
    Column("of", lambda n: n.hardware.memory_total_bytes if n.HasField("hardware") else None, num_bytes, width=8),
    Column(
        "GPUs",
        lambda n: len(n.hardware.gpus) if n.HasField("hardware") else None,
        lambda v: NA if v is None else str(v),
    ),
    Column("GPU use", lambda n: _mean_use(n), percent, priority=1),
    Column("power", lambda n: _power(n), lambda v: si(v, "W"), priority=2),
)


def _mean_use(node: pb.NodeState) -> float | None:
    known = [use for gpu in node.hardware.gpus if (use := optional(gpu, "utilization_percent")) is not None]
    return sum(known) / len(known) / 100 if known else None


def _power(node: pb.NodeState) -> float | None:
    known = [power for gpu in node.hardware.gpus if (power := optional(gpu, "power_w")) is not None]
    return sum(known) if known else None


class OverviewView(View):
    """Loss, throughput, where the time and the memory go, and the ranks."""

    TITLE = "Overview"
    KEYS = (Key("Enter", "look into the rank under the cursor"),)

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Horizontal(id="overview-charts"):
            yield Panel("loss", LineChart(id="overview-loss"), id="overview-loss-panel")
            yield Panel(
                "throughput",
                LineChart(unit=si, from_zero=True, id="overview-throughput"),
                id="overview-throughput-panel",
            )
        with Horizontal(id="overview-bars"):
            yield Panel(
                "step time", StackedBars(unit=seconds, shares=True, id="overview-split"), id="overview-split-panel"
            )
            yield Panel("memory", StackedBars(unit=num_bytes, id="overview-memory"), id="overview-memory-panel")
        with Horizontal(id="overview-ranks"):
            yield Panel(
                "ranks",
                LineTable[RankLine](RANK_COLUMNS, lambda r: r.rank, empty="no rank yet", id="overview-table"),
                id="overview-table-panel",
            )
            with Panel("step time by rank", id="overview-map-panel"):
                yield Heatmap(unit=seconds, id="overview-map")
            with Panel("nodes", id="overview-nodes-panel"):
                yield LineTable[pb.NodeState](_NODE_COLUMNS, lambda n: n.node, empty="n/a", id="overview-nodes")

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        model = frame.model
        draw_curve(
            self.query_one("#overview-loss", LineChart), frame, Curve("loss", 0, "n/a: the script reports no loss")
        )
        self.query_one("#overview-loss-panel", Panel).tell("loss", scalar(window_newest(frame, "loss")))
        column, unit = model.rate
        curve = Curve(column, 2, "n/a: no tokens counted", marks=False)
        draw_curve(self.query_one("#overview-throughput", LineChart), frame, curve)
        rate = si(window_newest(frame, column), unit)
        self.query_one("#overview-throughput-panel", Panel).tell("throughput", rate)
        # On few lines the ranks are worth more than a whole legend.
        brief = not self.screen.has_class("-tall")
        for bars in (self.query_one("#overview-split", StackedBars), self.query_one("#overview-memory", StackedBars)):
            bars.brief = brief
        draw_split(self.query_one("#overview-split", StackedBars), frame)
        self.query_one("#overview-split-panel", Panel).tell("step time", seconds(window_newest(frame, "step_s")))
        fullest = model.fullest_rank()
        shown = [fullest] if fullest is not None else []
        draw_memory(self.query_one("#overview-memory", StackedBars), shown, model, labels=False)
        where = "memory"
        if fullest is not None and len(model.ranks) > 1:
            where = f"memory, rank {fullest.rank}" if brief else f"memory of rank {fullest.rank}, the fullest"
        planned = f"planned {num_bytes(model.planned_bytes())}"
        self.query_one("#overview-memory-panel", Panel).tell(f"{where}, {planned}")
        show_ranks(self.query_one("#overview-table", LineTable), model, frame.now_s)
        self.query_one("#overview-table-panel", Panel).tell(
            "ranks", f"{len(model.ranks):,} of {model.run.world_size:,}"
        )
        if self.query_one("#overview-map-panel").display:
            draw_map(self.query_one("#overview-map", Heatmap), frame)
            self.query_one("#overview-map-panel", Panel).tell(map_title(model))
            nodes = list(model.snapshot.nodes) if model.snapshot is not None else []
            if model.hosts:
                places = {host.node: place for place, host in enumerate(model.hosts)}
                nodes.sort(key=lambda node: places.get(node.node, len(places)))
            self.query_one("#overview-nodes", LineTable).show(nodes)

    def main_widget(self) -> Widget:
        """The table of ranks takes the keys."""
        return self.query_one("#overview-table")
