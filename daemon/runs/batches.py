"""What a batch must be, whether it comes from a source or from disk."""

from __future__ import annotations

import zlib

from google.protobuf.message import DecodeError

from distui.proto import telemetry_pb2 as pb

LAUNCHER = -1
DAEMON = -2
MAX_RANKS = 1 << 16
"""More than any job has: a source that says otherwise is mistaken, and would cost memory by the rank."""
MAX_DIGITS = 19
"""Of a number in words, as a message can hold it."""
MAX_BODY_BYTES = 64 << 20
"""Of a batch that is unpacked: a few KiB of zeros can stand for GiB."""

_STARTS = frozenset({"rank_started", "run_started"})
_OF_RANKS = frozenset({"rank_started", "rank_finished", "step", "memory", "heartbeat", "collective"})


class Malformed(Exception):
    """A batch that cannot be taken, and why."""


def check(batch: pb.Batch, *, forwarded: bool = False) -> None:
    """Raise Malformed unless the batch is what the contract says; a daemon's own records come only `forwarded`."""
    if not (DAEMON if forwarded else LAUNCHER) <= batch.source.rank < MAX_RANKS:
        raise Malformed(f"rank {batch.source.rank} is no rank and no launcher")
    if not batch.source.incarnation:
        raise Malformed("a source must give its incarnation")
    last = 0
    for record in batch.records:
        if record.seq <= last:
            raise Malformed(f"record {record.seq} follows record {last}: sequence numbers must ascend from 1")
        last = record.seq
        body = record.WhichOneof("body")
        if body in _STARTS and getattr(record, body).world_size > MAX_RANKS:
            raise Malformed(f"record {last}: a world of more than {MAX_RANKS} ranks")
        if body in _OF_RANKS and batch.source.rank < 0:
            raise Malformed(f"record {last}: a {body} of no rank")


def unpack(body: bytes) -> pb.Batch:
    """Return the batch of a frame's body. Raises: Malformed where it is none, or one that cannot be taken."""
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(body, MAX_BODY_BYTES)
        if not inflate.eof:
            raise Malformed(f"a batch that is cut short, or has more than {MAX_BODY_BYTES:,} bytes")
        batch = pb.Batch.FromString(data)
    except (zlib.error, DecodeError) as error:
        raise Malformed(f"no batch: {error}") from error
    check(batch, forwarded=True)
    return batch
