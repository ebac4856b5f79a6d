"""What `distui status` shows a person: what is not known is n/a, never 0."""

from __future__ import annotations

from rich.console import Console

from distui.launcher.commands.status import rank_table, summary_lines
from distui.proto import telemetry_pb2 as pb


def shown(snapshot: pb.Snapshot) -> list[str]:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(rank_table(snapshot))
    return captured.get().splitlines()


def snapshot() -> pb.Snapshot:
    run = pb.RunInfo(
        run_id="train-1", run_dir="/runs/train-1", state="running", strategy="ZeRO-2, bf16", started_s=1.0, world_size=2
    )
    run.num_nodes = 1
    known = pb.RankState(rank=0, node="a", pid=41, state="running", step=12, loss=2.5, step_s=0.081)
    known.tokens_per_s, known.memory_bytes = 12_300, 3 << 20
    return pb.Snapshot(run=run, ranks=[known, pb.RankState(rank=1, node="b", state="dead")])


def test_the_table_has_a_row_a_rank() -> None:
    titles, first, second = shown(snapshot())
    assert titles.split() == ["rank", "node", "pid", "state", "step", "loss", "step", "time", "tokens/s", "memory"]
    assert first.split() == ["0", "a", "41", "running", "12", "2.500", "81.0", "ms", "12.3", "k", "3.00", "MiB"]
    assert second.split() == ["1", "b", "n/a", "dead", "n/a", "n/a", "n/a", "n/a", "n/a"]


def test_the_lines_above_tell_the_state_and_every_diagnosis() -> None:
    found = snapshot()
    found.diagnosis.append(pb.Diagnosis(kind="dead_rank", ranks=[1], message="rank 1 sends nothing for 9 s"))
    found.dropped = 1234
    lines = summary_lines(found)
    assert lines[0] == "train-1: running"
    assert "ZeRO-2, bf16; 2 ranks on 1 node; started " in lines[1] and "lasted" not in lines[1]
    assert lines[3:] == [
        "1,234 telemetry records were dropped under load",
        "dead_rank: rank 1 sends nothing for 9 s",
    ]
    found.run.state, found.run.message, found.run.finished_s = "failed", "rank 1: boom", 66.0
    lines = summary_lines(found)
    assert lines[0] == "train-1: failed (rank 1: boom)" and lines[1].endswith("lasted 1m 05s")
