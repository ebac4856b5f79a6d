"""What a process does, as the kernel tells it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distui.daemon.node import activity, connections
from distui.daemon.node.activity import BUSY_CARRIED_S, Activity, waits_for_time_or_peer


@contextmanager
def _waiting(what: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process whose main thread waits for another one that does `what`."""
    code = (
        "import threading, time\n"
        f"worker = threading.Thread(target=lambda: {what}, daemon=True)\n"
        "worker.start()\n"
        "print(flush=True)\n"
        "worker.join()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.read(1)
            yield process
        finally:
            process.kill()


def test_what_a_connection_carries_is_known_by_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        taken, _ = server.accept()
        with taken:
            inodes = {os.fstat(one.fileno()).st_ino for one in (client, taken)}
            before = connections._all()
            if not inodes <= set(before):
                pytest.skip("this kernel does not tell of connections")
            client.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(taken.recv(left))
            after = connections._all()
            assert inodes <= set(connections._inodes(os.getpid()))
    grown = sorted(after[inode] - before[inode] for inode in inodes)
    assert grown[-1] == 100_000, "what was received; what was sent is acknowledged some time later"


def test_who_uploads_is_at_work_and_who_only_keeps_in_touch_is_not() -> None:
    uploads = Activity(0.02, 0.0, 2.0 * BUSY_CARRIED_S, False, 0, "futex_wait")
    assert uploads.busy and uploads.moves_data and "0.1 MiB/s of network" in uploads.text()
    assert not Activity(0.02, 0.0, 0.1 * BUSY_CARRIED_S, False, 0, "futex_wait").busy


def test_a_pool_whose_workers_wait_for_something_is_no_deadlock() -> None:
    with _waiting("time.sleep(600)") as process:
        while not waits_for_time_or_peer(process.pid):
            assert process.poll() is None


def test_threads_that_wait_for_locks_are_one() -> None:
    with _waiting("threading.Event().wait()") as process:
        assert not waits_for_time_or_peer(process.pid)


def test_a_connection_that_is_new_counts_and_one_that_is_closed_takes_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    carried = iter([{1: 10**9, 2: 50}, {2: 60, 3: 10**6}])
    monkeypatch.setattr(activity, "carried", lambda pids: next(carried))
    monkeypatch.setattr(activity, "MIN_WINDOW_S", 0.0)
    monkeypatch.setattr(activity, "_samples", {})
    activity.note(os.getpid(), 0.0)
    found = activity.activity(os.getpid(), 0.0)
    assert found is not None and found.moves_data
