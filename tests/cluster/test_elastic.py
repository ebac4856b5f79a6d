"""A host is lost for good, and the job goes on with the others: the same global batches, the same training.

The host is lost to a starter of somebody else's, which is found by its entry point.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distui.core.config.check import check
from distui.core.config.schema import Config
from distui.core.paths import RunFolder
from distui.launcher.cluster.attempt import Logs
from distui.launcher.cluster.elastic import fitting, too_few
from distui.proto import cluster_pb2 as pb
from tests.cluster.conftest import REPOSITORY, Place

STARTER = '''
import os
from distui.launcher.cluster.starters.local import LocalStarter

class FadingStarter(LocalStarter):
    """Hosts that are all this machine, until the file of their name is there."""

    async def start(self, host, command):
        if os.path.exists(f"{host.name}.off"):
            raise OSError("it was switched off")
        return await super().start(host, command)
'''
SCRIPT = '''
"""Trains with accumulation; the agent of a host is killed, and the host is off from then on."""
import json, os, signal, sys, time
import torch
import distui

options = json.loads(sys.argv[1])
engine = distui.Engine()
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
data = torch.utils.data.TensorDataset(torch.arange(240.0).reshape(60, 4) / 240)
loader = torch.utils.data.DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(3))
model, optimizer, loader = engine.prepare(model, optimizer, loader)
print(f"rank {engine.process_index} of {engine.num_processes}, attempt {attempt}", flush=True)
with open(f"{options['out']}-{engine.process_index}.jsonl", "a") as out:
    for epoch in range(options.get("epochs", 3)):
        for (batch,) in loader:
            with engine.accumulate(model):
                engine.backward((model(batch) - 1).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if not engine.sync_gradients:
                continue
            step, weights = engine.clock.step, sum(p.detach().double().sum().item() for p in model.parameters())
            out.write(json.dumps({"step": step, "weights": weights, "ranks": engine.num_processes}) + "\\n")
            out.flush()
            if "back" in options and attempt == 1:  # until the host is there, and the ranks are told to save
                if step == 6 and engine.process_index == 0:
                    os.unlink(f"{options['host']}.off")
                asked = os.path.join(os.environ["DISTUI_JOB"], "preempt")
                while step > 6 and engine.process_index == 0 and not os.path.exists(asked):
                    time.sleep(0.05)
            if attempt == 0 and step == 7 and engine.process_index == options.get("rank"):
                engine.saver.wait()
                open(f"{options['host']}.off", "w").close()
                os.kill(int(os.environ["DISTUI_AGENT_PID"]), signal.SIGKILL)
                signal.pause()
'''


def plug_in(place: Place) -> None:
    """Install the starter as a package of its own would be."""
    folder = place.path / "plugin"
    facts = folder / "fading-1.0.dist-info"
    facts.mkdir(parents=True)
    (folder / "fading.py").write_text(STARTER)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: fading\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[distui.starters]\nfading = fading:FadingStarter\n")
    place.environ["PYTHONPATH"] = str(folder)
    (place.path / "train.py").write_text(SCRIPT)


def launch(place: Place, out: str, **options: object) -> tuple[str, ...]:
    batch = ("--set", "batch.global_size=12", "--set", "batch.micro_size=2")
    saves = ("--set", "checkpoint.every_steps=5", "--set", f"checkpoint.dir={place.path}/ck-{out}")
    starter = ("--set", "cluster.starter=fading", "--max-restarts", "2")
    return (*batch, *saves, *starter, "train.py", json.dumps({"out": out, **options}))


def test_it_goes_on_with_the_hosts_that_are_left(place: Place) -> None:
    plug_in(place)
    # The first host is the one that is lost: rank 0 is another's then.
    done = place.distui("launch", "--hosts", "a:1,b:1,c:1", "--nodes", "2:3", *launch(place, "three", rank=0, host="a"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with 2 of 3 hosts (b, c), 2 ranks" in done.stderr
    steps = place.steps("three", 0)
    assert [one["ranks"] for one in steps] == [3] * 7 + [2] * 10
    assert [one["step"] for one in steps] == [*range(1, 8), *range(6, 16)]
    whole = place.distui("launch", "--nproc", "1", *launch(place, "one"))
    assert whole.returncode == 0, whole.stderr
    last = {one["step"]: one["weights"] for one in steps}
    assert last == pytest.approx({one["step"]: one["weights"] for one in place.steps("one", 0)}, abs=1e-5)
    run = place.runs()[0]
    log = run.rank_log(0).read_text()
    assert "rank 0 of 3, attempt 0" in log and "rank 0 of 2, attempt 1" in log, "both hosts' words are kept"
    status = json.loads(place.distui("status", run.run_id, "--json").stdout)
    assert [rank["step"] for rank in status["ranks"]] == [15, 15] and status["state"] == "finished"


@pytest.mark.cluster
def test_it_grows_again_once_the_host_is_back(place: Place) -> None:
    plug_in(place)
    words = launch(place, "grown", rank=0, host="a", back=True, epochs=8)
    words = ("--set", "cluster.retry_s=0.5", *words)
    done = place.distui("launch", "--hosts", "a:1,b:1,c:1", "--nodes", "2:3", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with 2 of 3 hosts (b, c), 2 ranks" in done.stderr
    assert "a is back" in done.stderr and "a can take part: the ranks save" in done.stderr
    assert "going on with 3 of 3 hosts (a, b, c), 3 ranks, from the checkpoint of step" in done.stderr, done.stderr
    assert "restart 1 of 2" in done.stderr and "restart 2 of 2" not in done.stderr, "growing is no failure"
    steps = place.steps("grown", 0)
    counts = [one["ranks"] for one in steps]
    shrunk = counts.index(2)
    assert counts == [3] * 7 + [2] * counts.count(2) + [3] * (len(counts) - 7 - counts.count(2)) and counts[-1] == 3
    grown = counts.index(3, shrunk)
    assert [one["step"] for one in steps[grown - 1 :]] == list(range(steps[grown - 1]["step"], 41)), "no step is lost"
    whole = place.distui("launch", "--nproc", "1", *launch(place, "one", epochs=8))
    assert whole.returncode == 0, whole.stderr
    last = {one["step"]: one["weights"] for one in steps}
    assert last == pytest.approx({one["step"]: one["weights"] for one in place.steps("one", 0)}, abs=1e-5)
    (run, _) = place.runs()
    assert not run.preempt.exists(), "what the ranks saved for was no end"


def elastic(least: int, **batch: int) -> Config:
    cluster = {"hosts": "a:2,b:2,c:2,d:2", "nproc": 2, "nodes": 4, "min_nodes": least, "max_restarts": 3}
    return Config.model_validate({"cluster": cluster, "batch": batch})


def test_only_what_divides_the_global_batch_is_gone_on_with() -> None:
    config = elastic(2, global_size=32, micro_size=2)
    assert not check(config)
    assert fitting(config, [2, 2, 2], 2) == 2, "6 ranks do not divide 32, 4 do"
    assert fitting(config, [2], 2) == 0 and "1 hosts are left" in too_few(config, [2], 2)
    config = elastic(3, global_size=32, micro_size=2)
    assert fitting(config, [2, 2, 2], 3) == 0 and "does not divide 32" in too_few(config, [2, 2, 2], 3)


def test_what_cannot_be_elastic_is_told_before() -> None:
    assert [one.path for one in check(elastic(2))] == ["batch.global_size"]
    config = elastic(5, global_size=32)
    assert [one.path for one in check(config)] == ["cluster.min_nodes"]
    config = elastic(2, global_size=32)
    config.cluster.max_restarts = 0
    assert [one.path for one in check(config)] == ["cluster.max_restarts"]
    alone = Config.model_validate({"cluster": {"nproc": 2, "min_nodes": 1}})
    assert [one.path for one in check(alone)] == ["cluster.min_nodes"]


def test_a_rank_that_moves_goes_on_below_what_it_had_printed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    logs = Logs(run)

    def piece(offset: int, data: bytes, name: str = "logs/rank0.log") -> pb.FilePiece:
        return pb.FilePiece(name=name, offset=offset, data=data)

    logs.keep(0, piece(0, b"one\n"))
    logs.keep(0, piece(4, b"two\n"))
    logs.keep(1, piece(0, b"three\n"))
    logs.keep(1, piece(6, b"four\n"))
    logs.keep(1, piece(0, b"x", "logs/rank0.stderr"))
    logs.keep(1, piece(0, b"x", "../evil"))
    assert run.rank_log(0).read_bytes() == b"one\ntwo\nthree\nfour\n"
    assert [path.name for path in run.logs.iterdir()] == ["rank0.log"]


def test_the_starter_of_the_docs_works_as_it_stands(place: Place) -> None:
    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    plug_in(place)
    folder = place.path / "plugin"
    (folder / "fading.py").write_text(page.split("```python\n")[1].split("```")[0])
    (folder / "fading-1.0.dist-info" / "entry_points.txt").write_text(
        "[distui.starters]\ndocker = fading:DockerStarter\n"
    )
    fake = place.path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\n[ "$1" = inspect ] && echo 127.0.0.1 && exit\n'
        '[ "$3" = off ] && echo "container off is not running" >&2 && exit 1\nshift 3; exec "$@"\n'
    )
    fake.chmod(0o755)
    place.environ["PATH"] = f"{fake.parent}:{place.environ['PATH']}"
    words = ("cluster", "check")
    done = place.distui(*words, "--hosts", "a:1,b:1", "--set", "cluster.starter=docker", "train.py")
    assert done.returncode == 0 and "2 hosts can train together" in done.stdout, done.stdout + done.stderr
    done = place.distui(*words, "--hosts", "a:1,off:1", "--set", "cluster.starter=docker", "train.py")
    assert done.returncode == 2 and "off: docker exec could not start the agent" in done.stdout, done.stdout
    assert "container off is not running" in done.stdout and "docker start off" in done.stdout
    done = place.distui(*words, "--hosts", "a:1", "--set", "cluster.starter=dokcer", "train.py")
    assert "there is no starter 'dokcer'" in done.stderr and "fix: write docker" in done.stderr, done.stderr


@pytest.mark.cluster
def test_a_spare_takes_the_place_of_a_host_that_is_lost(place: Place) -> None:
    plug_in(place)
    words = launch(place, "spare", rank=1, host="b")
    done = place.distui("launch", "--hosts", "a:1,b:1,c:1", "--set", "cluster.spare_nodes=1", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 2 nodes" in done.stderr
    assert "c takes the place of b; 0 spares left" in done.stderr
    steps = place.steps("spare", 0)
    assert {one["ranks"] for one in steps} == {2}, "as many as before"
    assert [one["step"] for one in steps] == [*range(1, 8), *range(6, 16)]
    whole = place.distui("launch", "--nproc", "2", *launch(place, "two"))
    assert whole.returncode == 0, whole.stderr
    last = {one["step"]: one["weights"] for one in steps}
    assert last == {one["step"]: one["weights"] for one in place.steps("two", 0)}, "bit for bit"


def test_spares_that_cannot_be_are_told_before() -> None:
    def problems(**cluster: object) -> list[str]:
        return [one.path for one in check(Config.model_validate({"cluster": {"nproc": 1, **cluster}}))]

    assert not problems(hosts="a,b,c", nodes=2, spare_nodes=1, max_restarts=1)
    assert problems(hosts="a,b,c", nodes=2, spare_nodes=1) == ["cluster.spare_nodes"]
    assert problems(hosts="a,b", nodes=1, spare_nodes=2, max_restarts=1) == ["cluster.spare_nodes"]
    assert problems(spare_nodes=1, max_restarts=1) == ["cluster.spare_nodes"]


@pytest.mark.cluster
def test_the_starter_of_the_docs_for_submitit_works_as_it_stands(place: Place) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    plug_in(place)
    folder = place.path / "plugin"
    (folder / "fading.py").write_text(page.split("```python\n")[2].split("```")[0])
    entry = "[distui.starters]\nsubmitit = fading:SubmititStarter\n"
    (folder / "fading-1.0.dist-info" / "entry_points.txt").write_text(entry)
    place.environ["DISTUI_DOOR"] = "127.0.0.1"
    starter = ("--set", "cluster.starter=submitit", "--set", "cluster.interface=lo")
    batch = ("--set", "batch.global_size=12", "--set", "batch.micro_size=2")
    done = place.distui("launch", "--hosts", "a:1,b:1", *starter, *batch, "train.py", json.dumps({"out": "s"}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one["step"] for one in place.steps("s", 1)] == list(range(1, 16))
