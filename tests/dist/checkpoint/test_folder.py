"""A checkpoint's folder: what others put there stays, a crash at any instant loses nothing, a full disk neither."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import distui
from distui.core.checkpoint import files, rotation
from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.formats.opening import open_checkpoint
from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

FORMAT_1 = Path(__file__).with_name("format1.zip")
"""Saved by distui before format 2, by two ranks at stage 3."""


def _job() -> tuple[distui.Engine, Any, Any]:
    engine = distui.Engine()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    return engine, *engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def _step(job: tuple[distui.Engine, Any, Any]) -> None:
    engine, model, optimizer = job
    engine.backward(model(torch.randn(4, 6)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def _put_foreign(folder: Path) -> dict[str, str]:
    """Put what a project has beside its checkpoint, names of ours among it; returns every file's text."""
    (folder / "logs" / "deep").mkdir(parents=True)
    (folder / "distui-notes").mkdir()
    (folder / "elsewhere").symlink_to(folder / "logs")
    texts = {
        "logs/run.txt": "log",
        "logs/deep/rank0.bin": "another's rank",
        "model.safetensors": "weights",
        "tokenizer.json": "{}",
        "state.pt": "the script's own",
        "rank00000.bin": "also its own",
        ".metadata": "hidden",
        "index.json": "[]",
        "distui-notes/index.json": "notes",
        "read_only.txt": "do not touch",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "link.txt").symlink_to(folder / "logs" / "run.txt")
    (folder / "read_only.txt").chmod(0o444)
    return texts


def _check_foreign(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        assert (folder / name).read_text() == text, name
    assert os.readlink(folder / "elsewhere") == str(folder / "logs")
    assert (folder / "link.txt").is_symlink()


def _data(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if folders._DATA.fullmatch(path.name)]


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    texts = _put_foreign(tmp_path)
    job = _job()
    for _ in range(3):
        _step(job)
        job[0].save_state(str(tmp_path))
        _check_foreign(tmp_path, texts)
        (only,) = _data(tmp_path)
        assert folders.verify(tmp_path)["data"] == only, "the data of the save before are gone"
    inside = tmp_path / only / "notes.txt"
    inside.write_text("in there as well")
    job[0].save_state(str(tmp_path))
    assert inside.read_text() == "in there as well" and os.listdir(inside.parent) == ["notes.txt"]
    _check_foreign(tmp_path, texts)
    folders.remove(tmp_path)
    assert inside.exists() and not (tmp_path / folders.MANIFEST).exists() and _data(tmp_path) == [only]
    _check_foreign(tmp_path, texts)


def test_a_folder_behind_a_link_and_one_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    job = _job()
    job[0].save_state(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / folders.MANIFEST).exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is no folder"):
        job[0].save_state(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ['{"name": "an extension", "version": 3}', "not JSON", "[]", '{"format": "x"}'])
def test_a_manifest_of_somebody_else_is_not_written_over(tmp_path: Path, text: str) -> None:
    (tmp_path / folders.MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is no manifest of a checkpoint"):
        _job()[0].save_state(str(tmp_path))
    assert (tmp_path / folders.MANIFEST).read_text() == text and len(list(tmp_path.iterdir())) == 1


# ---- crashes ---------------------------------------------------------------------------------------------------------

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def _act_at(number: int, folder: str, act: Any) -> None:
    """Call `act` just before the `number`-th change of something under `folder` in this process."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen += 1
        if seen == number:
            act()

    sys.addaudithook(hook)


def _fork(child: Any) -> int:
    """Run `child` in a fork, and return how it ended: 0, or the signal's number."""
    # What earlier calls left in this process may own C++ threads, which a collection in the fork would join: they are
    # not there.
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where other threads are
        pid = os.fork()
    if not pid:
        gc.disable()
        try:
            child()
        finally:
            os._exit(17)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _killed_everywhere(path: str, way: str) -> int:
    folder = Path(path)
    texts = _put_foreign(folder) if way != "format 1" else {}
    job = _job()
    engine = job[0]
    if way == "format 1":
        with zipfile.ZipFile(FORMAT_1) as packed:
            packed.extractall(folder.parent)
        (folder.parent / "ck").rename(folder)
        engine.clock.step = 100
    else:
        engine.save_state(path)
    held = folders.read_manifest(folder)["step"]
    for number in range(1, 100):
        _step(job)
        weights = engine.get_state_dict(job[1])

        def child(number: int = number) -> None:
            if way == "half a file":  # dies in the middle of each write
                real, left = files.SummedFile.write, [number]

                def write(self: Any, data: Any) -> None:
                    left[0] -= 1
                    if not left[0]:
                        self._file.write(memoryview(data).cast("B")[: len(data) // 2])
                        self._file.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(self, data)

                files.SummedFile.write = write  # type: ignore[method-assign]
            else:
                _act_at(number, path, lambda: os.kill(os.getpid(), signal.SIGKILL))
            engine.save_state(path)
            os._exit(0)

        ended = _fork(child)
        _check_foreign(folder, texts) if texts else None
        manifest = folders.verify(folders.find(folder))
        assert manifest["step"] in (held, engine.clock.step), "the old one or the new one"
        if manifest["step"] == engine.clock.step:
            checkpoint = open_checkpoint(folder)
            for name, value in weights.items():
                assert torch.equal(checkpoint.tensor(f"model0.{name}").view(value.shape), value)
        held = manifest["step"]
        if not ended:
            break
        assert ended == -signal.SIGKILL, (number, ended)
    engine.save_state(path)
    assert len(_data(folder)) == 1, "what the killed ones left is gone"
    if way == "format 1":
        assert {entry.name for entry in folder.iterdir()} >= {folders.MANIFEST, *_data(folder)}
    return number


@pytest.mark.parametrize(("way", "least"), [("every change", 12), ("half a file", 8), ("format 1", 14)])
def test_a_kill_at_every_instant_leaves_the_old_or_the_new(
    run_ranks: RunRanks, tmp_path: Path, way: str, least: int
) -> None:
    folder = tmp_path / "ckpt"
    if way != "format 1":
        folder.mkdir()
    assert run_ranks(_killed_everywhere, 1, str(folder), way, timeout_s=120)[0] >= least


def _full_everywhere(path: str) -> list[str]:
    folder = Path(path)
    texts = _put_foreign(folder)
    job, told = _job(), []
    engine = job[0]
    engine.save_state(path)
    _step(job)
    for number in range(1, 100):

        def child(number: int = number) -> None:
            def full() -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            _act_at(number, path, full)
            status = 0
            try:
                engine.save_state(path)
            except UserError as error:
                assert "No space left" in error.why and "was not written" in error.what, error.report()
                status = 1
            _check_foreign(folder, texts)
            step = folders.verify(folder)["step"]
            assert step == (0 if status and folders.read_manifest(folder)["step"] == 0 else 1)
            engine.save_state(path)  # there is room again
            assert folders.verify(folder)["step"] == 1 and len(_data(folder)) == 1
            os._exit(status)

        ended = _fork(child)
        assert ended in (0, 1), number
        told.append(str(ended))
        if not ended:
            return told
        job[0].clock.step = 0
        engine.save_state(path)
        job[0].clock.step = 1
    raise AssertionError("it never ended")


def test_a_full_disk_at_every_instant(run_ranks: RunRanks, tmp_path: Path) -> None:
    told = run_ranks(_full_everywhere, 1, str(tmp_path), timeout_s=120)[0]
    assert len(told) > 6, "it was full at this many instants, and each was told"


# ---- rotation --------------------------------------------------------------------------------------------------------


def _runs(path: str) -> list[list[str]]:
    found = []

    def names() -> list[str]:
        return [f"{kept.name.lstrip('step_0')}" for kept in rotation.checkpoints(Path(path))]

    def run(steps: int, load: str = "") -> None:
        engine = distui.Engine(checkpoint={"dir": path, "every_steps": 1, "keep": 2})
        model = nn.Linear(2, 1)
        model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if load:
            engine.load_state(f"{path}/{load}")
        for _ in range(steps):
            engine.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
        engine.saver.wait()
        found.append(names())

    run(9)
    (Path(path) / "step_00000009" / "notes.txt").write_text("mine")
    (Path(path) / ".step_00000009.writing").mkdir()  # a crash of format 1 left it
    (Path(path) / ".step_00000009.writing" / "__0_0.distcp").write_bytes(b"half")
    run(4)  # a fresh run, whose steps are lower
    unfinished = next((Path(path) / "step_00000004").glob("distui-*"))
    half = Path(path) / "step_00000005" / f"distui-00000005-{unfinished.name.split('-')[2]}-00000000"
    half.mkdir(parents=True)  # a crash of this run left it
    (half / "rank00000.bin").write_bytes(b"half")
    run(3, load="step_00000009")  # goes on from the first
    run(2, load="step_00000004")  # and from the second
    return [*found, sorted(os.listdir(path)), os.listdir(f"{path}/step_00000009")]


def test_a_run_keeps_its_own_newest(run_ranks: RunRanks, tmp_path: Path) -> None:
    first, second, third, fourth, entries, ninth = run_ranks(_runs, 1, str(tmp_path))[0]
    assert first == ["8", "9"]
    assert second == ["8", "9", "3", "4"], "by time, and the other run's stay"
    assert third == ["3", "4", "11", "12"], "a resumed run goes on with those of the run that it resumes"
    assert fourth == ["11", "12", "5", "6"]
    assert entries == [f"step_{step:08d}" for step in (5, 6, 9, 11, 12)] and ninth == ["notes.txt"]


def test_a_clock_that_goes_back_makes_nothing_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job()
    path = str(tmp_path / "step_00000001")
    job[0].save_state(path)
    saved_at = folders.read_manifest(Path(path))["saved_at_s"]
    monkeypatch.setattr("time.time", lambda: saved_at - 3600.0)
    other = _job()
    other[0].load_state(path)
    other[0].save_state(str(tmp_path / "step_00000002"))
    assert [kept.name for kept in rotation.checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


def test_a_file_that_is_there_twice_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "rank00000.bin").write_bytes(b"another's")
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path / "rank00000.bin", b"ours")
    assert (tmp_path / "rank00000.bin").read_bytes() == b"another's"
