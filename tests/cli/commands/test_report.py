"""`distui report`: the page and the tables, read back by independent parsers."""

from __future__ import annotations

import csv
import json
import subprocess
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distui.core.config.schema import Config
from distui.core.hardware.detect import parse_hardware
from distui.core.paths import RunFolder, default_runs_dir
from distui.core.plan.models import load_model
from distui.daemon.runs.store import RunLog
from distui.launcher import cli
from distui.launcher.job.provenance import git_state, provenance
from distui.launcher.report.why import changed_config, what_if
from distui.proto import telemetry_pb2 as pb

SVG = "{http://www.w3.org/2000/svg}"
NUM_STEPS = 300
PROVENANCE = {
    "host": "node7",
    "system": "Linux 6.1",
    "folder": "/home/ada/work",
    "versions": {"distui": "0.1.0", "torch": "2.13.0"},
    "git": {"commit": "0a1b2c3d", "dirty": True},
    "origins": {"strategy.zero_stage": "command line"},
}


ORIGIN = ("node7, Linux 6.1", "distui 0.1.0, torch 2.13.0", "0a1b2c3d, with changes that are not", "command line")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """Make a run of two ranks that has failed, as the launcher and the daemon leave it."""
    monkeypatch.setenv("DISTUI_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("DISTUI_RUNTIME_DIR", str(tmp_path / "r"))
    monkeypatch.chdir(tmp_path)
    found = RunFolder(default_runs_dir() / "train-1")
    found.create()
    now_s = time.time()
    spec: dict[str, object] = {
        "run_id": "train-1",
        "name": "train",
        "strategy": "ZeRO-2",
        "command": ["train.py", "<b>"],
    }
    spec |= {"config_toml": "[strategy]\nzero_stage = 2\n", "provenance": PROVENANCE}
    planned = {"planned_memory_bytes": {"parameters": 100}}
    found.spec.write_text(json.dumps({**spec, **planned, "world_size": 2, "num_nodes": 1, "started_s": now_s - 60}))
    ranks = [{"rank": 1, "exit_status": 1, "signal": None, "error": "ValueError: bad"}]
    outcome = {"state": "failed", "exit_status": 3, "message": "rank 1", "finished_s": now_s, "failed_rank": 1}
    found.outcome.write_text(json.dumps({**outcome, "ranks": ranks}))
    report = {"rank": 1, "traceback": "Traceback ...\nValueError: <script>alert(1)</script>"}
    found.rank_error(1).write_text(json.dumps(report))
    found.rank_log(1).write_text("one\ntwo\n")
    log = RunLog(found)
    for rank in (0, 1):
        source = pb.Source(rank=rank, node="n", pid=7, incarnation=1)
        batch = pb.Batch(run_id="train-1", run_dir=str(found.path), source=source)
        seq = 0

        def add(batch: pb.Batch = batch, **body: object) -> None:
            nonlocal seq
            seq += 1
            batch.records.add(seq=seq, time_s=now_s - 50 + seq / 100, **body)

        add(rank_started=pb.RankStarted(world_size=2, device="cpu"))
        for step in range(1, NUM_STEPS + 1):
            add(step=pb.Step(step=step, step_s=0.1 * (rank + 1), forward_s=0.04, loss=4 / step, tokens=100))
        add(memory=pb.Memory(by_category_bytes={"parameters": 64, "gradients": 32}))
        collective = pb.Collective(group="world", seq=1, op="all_reduce", bytes=8, enqueued_s=1.0, group_size=2)
        add(collective=collective)
        add(event=pb.Event(level=pb.Event.ERROR, kind="nan_loss", message="the loss is NaN & more"))
        add(metrics=pb.Metrics(step=3, values={"acc": 0.5}))
        log.append(batch)
        log.append(batch)  # a resent batch counts once
    log.close()
    yield found


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_says_what_it_was_and_why_it_failed(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", "train"]) == 0
    assert capsys.readouterr().out.strip() == "train-1.html"
    page = _Text()
    page.feed(Path("train-1.html").read_text())
    words = " ".join(page.words)
    for expected in (
        "failed",
        "ZeRO-2",
        "train.py <b>",
        "ValueError: <script>",
        "the loss is NaN & more",
        "two",
        *ORIGIN,
    ):
        assert expected in words
    assert "script" not in page.tags and "b" not in page.tags[page.tags.index("table") :]  # what the run wrote is text
    assert page.tags.count("svg") == 8
    assert "n/a: no rank has sent it" in words  # no MFU on this machine
    assert cli.run(["report", "train"]) == 2 and "exists already" in capsys.readouterr().err
    assert cli.run(["report", "train", "--force"]) == 0


def test_the_svg_draws_every_step(run: RunFolder) -> None:
    assert cli.run(["report", "--output", "page.svg"]) == 0
    root = xml.parse("page.svg").getroot()
    assert root.tag == f"{SVG}svg"
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert "loss" in texts and "step 1" in texts and "300" in texts
    points = max((line.get("points", "").count(",") for line in root.iter(f"{SVG}polyline")), default=0)
    assert points == NUM_STEPS
    assert [title.text for title in root.iter(f"{SVG}title") if "nan_loss" in (title.text or "")]


def test_tables_hold_every_record_once(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", "--format", "csv", "-o", "out"]) == 0
    assert f"{2 * NUM_STEPS:,} rows" in capsys.readouterr().out
    with open("out/steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * NUM_STEPS
    assert {row["rank"] for row in rows} == {"0", "1"} and float(rows[0]["loss"]) == 4.0
    assert "grad_norm" not in rows[0]  # nobody sent it: no column of zeros
    with open("out/memory.csv", newline="") as file:
        assert next(csv.DictReader(file))["by_category_bytes.gradients"] == "32"
    with open("out/metrics.csv", newline="") as file:
        assert [(row["name"], row["value"]) for row in csv.DictReader(file)] == [("acc", "0.5")] * 2
    with open("out/events.csv", newline="") as file:
        assert next(csv.DictReader(file))["level"] == "error"
    assert cli.run(["report", "--format", "csv", "-o", "out"]) == 2
    assert "holds tables already" in capsys.readouterr().err


def test_parquet(run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert cli.run(["report", "--format", "parquet", "-o", "out"]) == 0
    table = parquet.read_table("out/steps.parquet")
    assert table.num_rows == 2 * NUM_STEPS
    assert table.column("step").to_pylist()[:3] == [1, 2, 3]
    assert str(table.schema.field("loss").type) == "double"


def test_without_pyarrow_it_says_what_to_do(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert cli.run(["report", "--format", "parquet"]) == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_a_run_without_telemetry(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for path in run.telemetry.iterdir():
        path.unlink()
    assert cli.run(["report", "--format", "csv"]) == 2
    assert "has no telemetry" in capsys.readouterr().err
    assert cli.run(["report"]) == 0
    assert "failed" in Path("train-1.html").read_text()


def second(run: RunFolder) -> RunFolder:
    """Return another run, of another stage and without telemetry."""
    other = RunFolder(run.path.with_name("other-2"))
    other.create()
    spec = json.loads(run.spec.read_text()) | {"run_id": "other-2", "name": "other", "strategy": "ZeRO-3"}
    other.spec.write_text(json.dumps(spec | {"config_toml": "[strategy]\nzero_stage = 3\n"}))
    return other


def test_runs_side_by_side(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    second(run)
    assert cli.run(["compare", "train", "other"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["train-1"] == ["other-2"] and rows["strategy.zero_stage"] == ["2", "3"]
    assert rows["strategy"] == ["ZeRO-2", "ZeRO-3"] and rows["steps"] == ["300", "n/a"]
    assert rows["least"][:2] == ["loss", "0.0133"] and rows["git"][0].startswith("0a1b2c3d")
    assert cli.run(["compare", "train", "other", "-o", "both.html"]) == 0
    page = _Text()
    page.feed(Path("both.html").read_text())
    words = " ".join(page.words)
    assert page.tags.count("svg") == 3 and "strategy.zero_stage" in words and "train.py <b>" in words
    capsys.readouterr()
    assert cli.run(["compare", "train"]) == 2 and "two runs or more" in capsys.readouterr().err


def test_a_launch_writes_where_it_comes_from(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert git_state(tmp_path) == {}
    git("init", "-q")
    (tmp_path / "train.py").write_text("1")
    git("add", "train.py")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "train.py").write_text("2")
    found = provenance(tmp_path, {"run.seed": "default", "strategy.zero_stage": "command line"})
    assert found["git"] == {"commit": commit, "dirty": True}
    assert found["origins"] == {"strategy.zero_stage": "command line"} and "torch" in found["versions"]  # type: ignore[operator]


def test_why_tells_the_parts_in_order_of_cost_with_remedies(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(["why", "train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train-1: ") and lines[0].endswith(" a step, ZeRO-2")
    first, second = lines[1].split(), lines[2].split()
    assert first[3] == "other:" and "(at most " in lines[1]
    assert second[1:4] == ["40.0", "ms", "forward:"] and "at most" not in lines[2]  # each rank spends 0.04 s there
    assert int(first[0][:-1]) + int(second[0][:-1]) in (99, 100, 101) and int(first[0][:-1]) > int(second[0][:-1])
    assert cli.run(["why", "train", "--what-if", "strategy.zero=1"]) == 2
    assert "changes no setting" in capsys.readouterr().err
    assert cli.run(["why", "train", "--what-if", "strategy.zero_stage=1"]) == 2
    assert "name it with --model" in capsys.readouterr().err


def test_what_if_scales_the_prediction_by_what_was_measured() -> None:
    model, hardware = load_model("llama-7b"), parse_hardware("8xA100-80GB")
    now = changed_config(Config(), ["strategy.zero_stage=3", "precision.dtype=bf16", "batch.micro_size=1"])
    same, then = what_if(now, now, model, hardware, 8, 2.0)[1], changed_config(now, ["strategy.zero_stage=2"])
    assert same is not None and same.step_s == pytest.approx(2.0)
    before, after = what_if(now, then, model, hardware, 8, 2.0)
    assert before is not None and after is not None and before.step_s and after.plan.step_s
    assert after.step_s == pytest.approx(2.0 * after.plan.step_s / before.step_s)
    assert after.plan.memory_per_rank_bytes > before.memory_per_rank_bytes
