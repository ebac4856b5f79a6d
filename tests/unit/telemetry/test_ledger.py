"""The collective ledger: what is written is read, from this process or another, whatever has become of the writer."""

from __future__ import annotations

import math
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distui.core.telemetry import ledger as ledger_module
from distui.core.telemetry.cursor import LedgerCursor
from distui.core.telemetry.ledger import MAX_NAMES, OTHER_NAME, Ledger, LedgerReader, LedgerUnreadable, ledger_bytes
from distui.core.telemetry.records import _collective

NAMES = st.text(min_size=1, max_size=12).filter(lambda name: not name.startswith("torch."))
COLLECTIVES = st.lists(
    st.tuples(NAMES, NAMES, NAMES, st.integers(0, 2**63), st.integers(1, 2**32 - 1), st.booleans(), st.floats(0, 1e6)),
    max_size=40,
)


def in_memory(capacity: int = 8) -> tuple[Ledger, LedgerReader]:
    ledger = Ledger(None, rank=3, world_size=8, capacity=capacity)
    return ledger, LedgerReader(ledger.buffer)


@given(collectives=COLLECTIVES, capacity=st.integers(1, 16))
def test_round_trip(collectives: list[tuple[str, str, str, int, int, bool, float]], capacity: int) -> None:
    ledger, reader = in_memory(capacity)
    seqs: dict[str, int] = {}
    written = []
    for group, op, dtype, num_bytes, size, finishes, blocked in collectives:
        seqs[group] = seqs.get(group, 0) + 1
        token = ledger.begin(group, op, dtype, num_bytes, size)
        ledger.blocked(token, blocked)
        if finishes:
            ledger.end(token, 5.5)
        written.append((token, group, seqs[group], op, dtype, num_bytes, size, 5.5 if finishes else None, blocked))
    read = [
        (e.token, e.group, e.seq, e.op, e.dtype, e.num_bytes, e.group_size, e.finished_s, e.blocked_s)
        for e in reader.entries()
    ]
    assert read == written[-capacity:]
    assert [entry.token for entry in reader.unfinished()] == [w[0] for w in written[-capacity:] if w[7] is None]
    assert reader.state().last_seq == seqs


@given(st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(1, 200))), max_size=30), st.integers(1, 16))
def test_a_cursor_hands_out_or_counts_each_collective_once(rounds: list[tuple[int, set[int]]], capacity: int) -> None:
    ledger, reader = in_memory(capacity)
    cursor = LedgerCursor(reader)
    found: list[int] = []
    lost = newest = 0
    for num_begun, ends in rounds:
        for _ in range(num_begun):
            newest = ledger.begin("world", "barrier", "uint8", 0, 2)
        for token in ends:
            ledger.end(token)
        entries, more = cursor.drain()
        found += [entry.token for entry in entries]
        assert all(entry.finished_s is not None for entry in entries)
        lost += more
    entries, more = cursor.drain(rest=True)
    found += [entry.token for entry in entries]
    assert len(found) == len(set(found))
    assert len(found) + lost + more == newest


def test_a_late_end_does_not_touch_the_entry_that_took_the_place() -> None:
    ledger, reader = in_memory(capacity=2)
    first = ledger.begin("world", "all_reduce", "float32", 4, 2)
    ledger.begin("world", "all_reduce", "float32", 4, 2)
    third = ledger.begin("world", "all_reduce", "float32", 4, 2)
    ledger.end(first)
    ledger.blocked(first, 1.0)
    ledger.end(0)
    ledger.end(third + 1)
    assert reader.entry(first) is None
    entry = reader.entry(third)
    assert entry is not None and entry.finished_s is None and entry.blocked_s == 0.0


def test_state_says_what_the_main_thread_does() -> None:
    ledger, reader = in_memory()
    assert reader.state().waiting_in() == "" and reader.state().phase == "" and reader.state().ended_s is None
    ledger.set_step(41)
    ledger.set_phase("backward")
    token = ledger.begin("data_parallel", "reduce_scatter", "torch.bfloat16", 1024, 8)
    ledger.started(token, 2.0)
    ledger.waiting(token)
    state = reader.state()
    assert (state.rank, state.world_size, state.pid, state.step, state.phase) == (3, 8, os.getpid(), 41, "backward")
    assert state.waiting_in() == "reduce_scatter data_parallel#1" and state.waiting_since_s >= state.phase_since_s > 0
    assert state.waiting is not None and state.waiting.dtype == "bfloat16" and state.waiting.started_s == 2.0
    ledger.waiting(None)
    ledger.ended(7)
    state = reader.state()
    assert state.waiting is None and state.waiting_since_s == 0 and state.ended_s and state.exit_status == 7


def test_more_names_than_fit_are_told_together() -> None:
    ledger, reader = in_memory(capacity=2 * MAX_NAMES)
    for number in range(MAX_NAMES + 50):
        ledger.begin(f"group{number}", "all_reduce", "float32", 4, 2)
    groups = [entry.group for entry in reader.entries()]
    assert groups[:100] == [f"group{number}" for number in range(100)] and groups[-1] == OTHER_NAME
    others = [entry.seq for entry in reader.entries() if entry.group == OTHER_NAME]
    assert others == list(range(1, len(others) + 1)) and reader.state().last_seq[OTHER_NAME] == len(others)


def test_a_long_name_is_cut_at_a_character() -> None:
    ledger, reader = in_memory()
    token = ledger.begin("ü" * 40, "all_reduce", "float32", 4, 2)
    entry = reader.entry(token)
    assert entry is not None and entry.group == "ü" * 24


def test_a_half_written_entry_is_not_read() -> None:
    ledger, reader = in_memory()
    token = ledger.begin("world", "all_reduce", "float32", 4, 2)
    start = ledger_bytes(0) + token * (ledger_bytes(1) - ledger_bytes(0))
    ledger.buffer[start : start + 8] = bytes(8)  # as a writer killed within `begin` leaves it
    assert reader.entry(token) is None and list(reader.entries()) == []


def test_a_writer_that_dies_while_it_overwrites_leaves_neither_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, reader = in_memory(capacity=1)
    first = ledger.begin("world", "all_reduce", "float32", 4, 2)

    class HalfWritten:
        @staticmethod
        def pack_into(buffer: mmap.mmap, at: int, *fields: object) -> None:
            buffer[at : at + 8] = b"\xff" * 8
            raise InterruptedError

    monkeypatch.setattr(ledger_module, "_BODY", HalfWritten)
    with pytest.raises(InterruptedError):
        ledger.begin("world", "all_gather", "float32", 8, 2)
    assert reader.head() == first and list(reader.entries()) == [] and reader.entry(first + 1) is None


def test_it_says_what_the_rank_ended_of_and_one_without_that_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "rank0.bin"
    ledger = Ledger(path, rank=0, world_size=1, capacity=4)
    ledger.ended(1, "MemoryError: " + "é" * 400)
    ledger.lost(17)
    with LedgerReader.open(path) as reader:
        state = reader.state()
    assert state.error.startswith("MemoryError: éé") and 480 < len(state.error.encode()) <= 507
    assert (state.exit_status, state.lost) == (1, 17)
    path.write_bytes(path.read_bytes()[: ledger_bytes(4)])  # as an earlier version wrote it
    with LedgerReader.open(path) as reader:
        assert (reader.state().exit_status, reader.state().error) == (1, "")


@pytest.mark.parametrize("damage", ["empty", "cut", "magic", "version"])
def test_what_is_no_ledger_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rank0.bin"
    Ledger(path, rank=0, world_size=1, capacity=4)
    raw = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": raw[: ledger_bytes(4) - 1],
        "magic": b"x" * len(raw),
        "version": raw[:8] + b"\x63" + raw[9:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(LedgerUnreadable):
        LedgerReader.open(path)


def test_a_restarted_rank_takes_a_new_file_and_leaves_the_old_one_to_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "rank0.bin"
    first = Ledger(path, rank=0, world_size=1, incarnation=1)
    first.set_step(5)
    with LedgerReader.open(path) as old:
        Ledger(path, rank=0, world_size=1, incarnation=2)
        with LedgerReader.open(path) as new:
            assert (old.incarnation, old.state().step, new.incarnation, new.state().step) == (1, 5, 2, 0)
    assert [file.name for file in path.parent.iterdir()] == ["rank0.bin"]


WRITER = textwrap.dedent("""
    import sys, pathlib
    from distui.core.telemetry.ledger import Ledger
    ledger = Ledger(pathlib.Path(sys.argv[1]), rank=1, world_size=2, capacity=64)
    ledger.set_phase("backward")
    step = 0
    while True:
        step += 1
        token = ledger.begin("world", "all_reduce", "float32", step, 2)
        ledger.waiting(token)
        ledger.end(token)
        ledger.blocked(token, 1.0)
        ledger.waiting(None)
        ledger.set_step(step)
        if step == 100:
            print("ready", flush=True)
""")


@contextmanager
def writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def assert_whole(reader: LedgerReader) -> int:
    """Check everything that a writer at any point of its loop may have left; return the newest token."""
    entries = list(reader.entries())
    for entry in entries:
        assert entry.seq == entry.token == entry.num_bytes
        assert (entry.group, entry.op, entry.dtype, entry.group_size) == ("world", "all_reduce", "float32", 2)
        assert entry.blocked_s in (0.0, 1.0) and (entry.finished_s or math.inf) >= entry.enqueued_s
    state = reader.state()
    assert state.phase == "backward" and state.pid == reader.pid
    assert state.waiting is None or state.waiting.op == "all_reduce"
    return entries[-1].token if entries else 0


def test_read_while_the_writer_runs_is_stopped_and_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "rank1.bin"
    with writer(path) as process, LedgerReader.open(path) as reader:
        for _ in range(50):  # racing with it: overrun entries may be missing, none may be torn
            assert_whole(reader)
        for _ in range(5):
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            with LedgerReader.open(path) as other:
                newest = assert_whole(other)
                assert newest >= 1 and len(list(other.entries())) >= min(newest, 64) - 1
                assert other.state().step in (newest - 1, newest)
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with LedgerReader.open(path) as other:
            last = assert_whole(other)
            assert last >= newest and other.state().step in (last - 1, last) and other.state().ended_s is None


def test_a_wait_that_comes_late_does_not_make_the_collective_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("distui.core.telemetry.ledger.time.time", lambda: now_s)
    ledger, reader = in_memory(capacity=8)
    late, early, seen = (ledger.begin("world", "send", "float32", 4, 2) for _ in range(3))
    ledger.end(seen, 100.1)
    now_s = 100.2
    ledger.waited(late, 0.0001)  # nothing was left to wait for: it ended some time before
    ledger.waited(early, 0.2)
    ledger.waited(seen, 0.0001)
    times = [_collective(entry).collective for entry in reader.entries()]
    assert [one.HasField("finished_s") and round(one.finished_s - one.enqueued_s, 3) for one in times] == [
        False,
        0.2,
        0.1,
    ]
    assert all(entry.finished_s is not None for entry in reader.entries())


DIRECT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from distui.core.config.schema import TelemetrySection
from distui.core.paths import RunFolder
from distui.core.telemetry.collective import FINISH_IS_SEEN, IS_ROOT
from distui.core.telemetry.collectives import install, install_dispatched
from distui.core.telemetry.ledger import LedgerReader
from distui.core.telemetry.source import open_source

run = RunFolder(Path(sys.argv[1]))
run.create()
source = open_source(0, 0, 1, run, TelemetrySection())
install()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
work = dist.group.WORLD.allreduce([torch.ones(8)])
with LedgerReader.open(run.rank_ledger(0)) as ledger:
    print(ledger.entry(ledger.head()).op, ledger.entry(ledger.head()).flags & FINISH_IS_SEEN)
    work.wait()
    ones, found = torch.ones(8), [torch.ones(8)]
    dist.broadcast(ones, 0)
    dist.gather(ones, found, 0)
    dist.reduce(ones, 0)
    dist.scatter(ones, found, 0)
    dist.all_gather(found, ones)
    dist.group.WORLD.broadcast(ones, 0).wait()
    install_dispatched()
    torch.ops.c10d.broadcast_([ones], dist.group.WORLD.boxed(), 0, 0, False, 1000)
    print(*(f"{entry.op}:{int(bool(entry.flags & IS_ROOT))}" for entry in ledger.entries(1)))
source.close(0)
"""


def test_the_end_of_a_group_s_own_method_is_seen_when_it_comes(tmp_path: Path) -> None:
    """As a checkpoint calls it: without torch's options, and waited for some time later."""
    environ = {**os.environ, "DISTUI_STATE_DIR": str(tmp_path), "DISTUI_RUNTIME_DIR": str(tmp_path / "r")}
    command = [sys.executable, "-c", DIRECT, str(tmp_path / "run-1")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180, check=True)
    first, roots = done.stdout.splitlines()
    assert first == "all_reduce 1"
    assert (
        roots == "broadcast:1 gather:1 reduce:1 scatter:1 all_gather:0 broadcast:1 broadcast:1"
    )  # a group of one: the root is this rank
