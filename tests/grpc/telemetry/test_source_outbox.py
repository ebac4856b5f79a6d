"""What the sender keeps: bounded in memory, then on the disk; sent again in order, dropped with a count."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from distui.core.telemetry import outbox as outbox_module
from distui.core.telemetry.outbox import Outbox
from distui.core.telemetry.ring import Ring
from distui.core.telemetry.spool import Spool
from distui.daemon.runs.unsent import read_unsent
from distui.proto import telemetry_pb2 as pb


def records(first: int, last: int) -> list[pb.Record]:
    return [pb.Record(seq=seq, step=pb.Step(step=seq)) for seq in range(first, last + 1)]


def taken(outbox: Outbox) -> list[int]:
    return [record.seq for record in outbox.take(lambda: True)]


def test_what_is_not_acknowledged_waits_again_before_what_is_new() -> None:
    outbox = Outbox(100)
    outbox.put(records(1, 4))
    assert taken(outbox) == [1, 2, 3, 4]
    outbox.acknowledge(2)
    outbox.put(records(5, 6))
    outbox.rewind()
    assert taken(outbox) == [3, 4, 5, 6] and outbox.num_unacknowledged() == 4
    outbox.acknowledge(6)
    assert outbox.num_unacknowledged() == 0 and outbox.dropped == 0 and outbox.wait_fewer(1, 0, lambda: True) == 0


def test_too_many_lose_the_oldest_but_for_who_the_rank_is() -> None:
    outbox = Outbox(4)
    outbox.put([pb.Record(seq=1, rank_started=pb.RankStarted(device="cpu"))])
    outbox.put(records(2, 5))
    assert taken(outbox) == [2, 3, 4, 5]
    outbox.put(records(6, 8))
    assert outbox.dropped == 3
    outbox.rewind()
    assert taken(outbox) == [1, 5, 6, 7, 8]
    outbox.acknowledge(8)
    outbox.rewind()
    assert outbox.num_unacknowledged() == 0


def as_batch(records: list[pb.Record]) -> pb.Batch:
    return pb.Batch(run_id="run-1", source=pb.Source(rank=3, incarnation=7), records=records)


def test_what_is_too_much_for_memory_goes_to_the_disk_and_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "rank3-7.unsent"
    outbox = Outbox(4, Spool(file, as_batch))
    outbox.put([pb.Record(seq=1, rank_started=pb.RankStarted(device="cpu")), *records(2, 3)])
    assert taken(outbox) == [1, 2, 3]
    outbox.put(records(4, 6))
    assert outbox.num_in_memory() == 0 and outbox.num_unacknowledged() == 6 and outbox.dropped == 0
    outbox.put(records(7, 8))
    assert taken(outbox) == [4, 5, 6]  # 1 to 3 are on their way already
    outbox.acknowledge(3)
    outbox.rewind()
    assert [taken(outbox), taken(outbox)] == [[4, 5, 6], [7, 8]] and not outbox.at_end()
    assert [record.seq for batch in read_unsent(file) for record in batch.records] == list(range(1, 7))
    outbox.acknowledge(7)
    assert not file.exists() and outbox.num_unacknowledged() == 1
    outbox.spill()
    assert [record.seq for batch in read_unsent(file) for record in batch.records] == [8]
    with open(file, "ab") as torn:
        torn.write(b"half a frame")
    assert len(read_unsent(file)) == 1


def test_a_full_spool_keeps_the_beginning_and_memory_the_end(tmp_path: Path) -> None:
    file = tmp_path / "rank3-7.unsent"
    outbox = Outbox(4, Spool(file, as_batch, max_bytes=1))
    for seq in range(1, 21):
        outbox.put(records(seq, seq))
    assert outbox.dropped == 11 and outbox.num_in_memory() == 4
    outbox.put([], rest=True)
    outbox.spill()  # the last ones may exceed the bound
    assert outbox.num_in_memory() == 0
    assert [record.seq for batch in read_unsent(file) for record in batch.records] == [1, 2, 3, 4, 5, 17, 18, 19, 20]


def test_a_disk_that_takes_nothing_leaves_memory_to_do(tmp_path: Path) -> None:
    outbox = Outbox(4, Spool(tmp_path / "no such folder" / "rank3-7.unsent", as_batch))
    outbox.put(records(1, 6))
    outbox.spill()
    assert (outbox.dropped, outbox.num_in_memory()) == (2, 4) and taken(outbox) == [3, 4, 5, 6]


def test_a_batch_is_bounded_by_number_and_bytes() -> None:
    outbox = Outbox(10_000)
    outbox.put(records(1, 600))
    assert len(taken(outbox)) == outbox_module.MAX_BATCH_RECORDS and len(taken(outbox)) == 88
    message = "x" * (outbox_module.MAX_BATCH_BYTES // 2)
    outbox.put([pb.Record(seq=seq, event=pb.Event(message=message)) for seq in range(601, 606)])
    assert [len(taken(outbox)) for _ in range(3)] == [2, 2, 1]


def test_a_stream_that_ends_takes_nothing() -> None:
    outbox = Outbox(10)
    is_open = True
    found: list[list[pb.Record]] = []
    taker = threading.Thread(target=lambda: found.append(outbox.take(lambda: is_open)))
    taker.start()
    is_open = False
    outbox.notify()
    outbox.put(records(1, 2))
    taker.join(120)
    assert found == [[]] and taken(outbox) == [1, 2]


def test_a_ring_counts_what_it_loses_whatever_the_order_of_threads() -> None:
    ring = Ring(100)

    def put() -> None:
        for number in range(1000):
            ring.put("event", (number,))

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    found = lost = 0
    while any(thread.is_alive() for thread in threads):
        items, more = ring.drain()
        found, lost = found + len(items), lost + more
    items, more = ring.drain()
    assert found + len(items) + lost + more == 4000


def test_importing_the_source_is_cheap() -> None:
    code = "import sys, distui.core.telemetry.source\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"grpc", "google.protobuf", "zmq", "torch", "pydantic", "psutil"} & set(loaded)
