"""The collective ledger of one rank: a memory-mapped file that can be read while the rank is stopped, wedged or dead.

The training thread writes it with plain stores into the mapping and waits for no reader; any process reads it from the
file with `LedgerReader`. What makes that safe: a ring entry is published by its commit word, the status by the index of
one of two slots, and what changes later in an entry is one aligned 8-byte word. So a reader sees a thing whole, as it
was before or after, or not at all, even if the writer was killed in between. (The order of stores is that of x86 and
of Arm's stronger cores; on a weaker one a reader of a *running* rank may be one store behind.)

Layout, native byte order, all words 8 bytes: header (0), status slots (128, 192), table of names (256), ring entries,
the error that the rank ended with.
Each name of a group, operation, dtype or phase is stored once; a group's name carries its last sequence number.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from distui.core.paths import open_own
from distui.core.telemetry.collective import (
    END_UNKNOWN,
    FINISH_IS_SEEN,
    SIDE_THREAD,
    CollectiveEntry,
    LedgerState,
    LedgerUnreadable,
)
from distui.core.telemetry.mapped_file import map_new, publish

MAGIC = b"DISTUILG"
VERSION = 1
MAX_NAMES = 256
MAX_NAME_BYTES = 48
MAX_BYTES = 1 << 30
"""Of a file that is mapped to be read: what is larger was not written by us."""
OTHER_NAME = "(other)"
"""Stands for every name beyond the table's `MAX_NAMES`."""
NO_WAIT_S, LATE_S = 0.001, 0.005
"""A wait that is shorter, so long after the beginning, found the collective ended."""
RECENT = 256
"""So many of the newest collectives are searched for one that does not end."""

_HEADER = struct.Struct("@8sIIQqQQQ")  # magic, version, entry size, capacity, rank, world size, pid, incarnation
_HEAD = 64  # token of the newest entry
_NUM_NAMES = 72
_STATUS_INDEX = 80  # its lowest bit picks the slot
_ENDED = struct.Struct("@dq")  # when the rank closed its telemetry (NaN: it has not), exit status
_ENDED_AT = 88
_LOST = 104  # records that the rank could neither send nor write at its end
_STATUS = struct.Struct("@QQdQd")  # step, phase name, since, token waited for, since
_STATUS_AT = (128, 192)
_NAME = struct.Struct(f"@QQ{MAX_NAME_BYTES}s")  # last sequence number of a group, length, text
_NAMES_AT = 256
_ENTRIES_AT = _NAMES_AT + MAX_NAMES * _NAME.size
_ENTRY = struct.Struct("@QQQdddd4HI4x")  # commit, seq, bytes, enqueued, started, finished, blocked, names, group size
_BODY = struct.Struct("@QQdddd4HI4x")
_ENTRY_BYTES = _ENTRY.size
_ENQUEUED, _STARTED, _FINISHED, _BLOCKED, _FLAGS = 24, 32, 40, 48, 62  # offsets within an entry
_ERROR_BYTES = 512  # behind the entries: what the rank ended of, its length first
_HALF = struct.Struct("@H")
_WORD = struct.Struct("@Q")
_TIME = struct.Struct("@d")
_NAN = math.nan


def ledger_bytes(capacity: int) -> int:
    """Return where a ring of `capacity` entries ends in the file: the error text follows, but for older ledgers."""
    return _ENTRIES_AT + capacity * _ENTRY_BYTES


class Ledger:
    """The writer. Any thread begins and ends collectives; the status is the main thread's."""

    __slots__ = ("_capacity", "_counted", "_groups", "_head", "_lock", "_names", "_num_status", "_status", "buffer")

    def __init__(
        self, path: Path | None, *, rank: int, world_size: int, capacity: int = 4096, incarnation: int | None = None
    ) -> None:
        """Make the file at `path`, its blocks reserved; None keeps the ledger in memory only.

        An older file is replaced, not written over: who reads it goes on reading the old rank's.
        Raises: OSError where the file cannot be made, a full disk included.
        """
        self.buffer = map_new(path, ledger_bytes(capacity) + _ERROR_BYTES)
        self._capacity = capacity
        self._lock = threading.Lock()
        self._head = 0
        self._names: dict[object, int] = {}
        self._groups: dict[object, list[int]] = {}  # name -> [sequence number, name, offset of its last_seq]
        self._counted = 0
        self._num_status = 0
        self._status = [0, 0, 0.0, 0, 0.0]
        _ENDED.pack_into(self.buffer, _ENDED_AT, _NAN, 0)
        self._name("")
        self._write_status()
        began = incarnation if incarnation is not None else time.time_ns()
        header = (VERSION, _ENTRY.size, capacity, rank, world_size, os.getpid(), began)
        _HEADER.pack_into(self.buffer, 0, MAGIC, *header)
        if path is not None:
            publish(path)

    def begin(self, group: str, op: str, dtype: str, num_bytes: int, group_size: int, flags: int = 0) -> int:
        """Enter a collective as enqueued now; return its token, to be given to `end`."""
        with self._lock:
            return self._begin(group, op, dtype, num_bytes, group_size, flags)

    def _begin(self, group: str, op: str, dtype: str, num_bytes: int, group_size: int, flags: int) -> int:
        found = self._groups.get(group)
        if found is None:
            found = self._group(group)
        names = self._names
        op_name = names.get(op)
        if op_name is None:
            op_name = self._name(op)
        dtype_name = names.get(dtype)
        if dtype_name is None:
            dtype_name = self._name(dtype)
        buffer = self.buffer
        self._head = token = self._head + 1
        found[0] = seq = found[0] + 1
        at = _ENTRIES_AT + token % self._capacity * _ENTRY_BYTES
        _WORD.pack_into(buffer, at, 0)
        _BODY.pack_into(
            buffer,
            at + 8,
            seq,
            num_bytes,
            time.time(),
            _NAN,
            _NAN,
            0.0,
            found[1],
            op_name,
            dtype_name,
            flags,
            group_size,
        )
        _WORD.pack_into(buffer, at, token)
        _WORD.pack_into(buffer, found[2], seq)
        _WORD.pack_into(buffer, _HEAD, token)
        return token

    def started(self, token: int, time_s: float) -> None:
        """Say when the collective began to run, where that is known."""
        if 0 <= self._head - token < self._capacity:
            _TIME.pack_into(self.buffer, self._at(token) + _STARTED, time_s)

    def end(self, token: int, finished_s: float | None = None) -> None:
        """Say that the collective has finished, now or at `finished_s`; a token that was overrun is ignored."""
        if 0 <= self._head - token < self._capacity:
            _TIME.pack_into(self.buffer, self._at(token) + _FINISHED, time.time() if finished_s is None else finished_s)

    def blocked(self, token: int, seconds: float) -> None:
        """Add to the time for which the main thread waited for the collective."""
        if 0 <= self._head - token < self._capacity:
            self._add_blocked(self._at(token) + _BLOCKED, seconds)

    def waited(self, token: int, seconds: float) -> None:
        """Add a wait that is over, and end the collective where its end was not noted: now, or nobody knows when."""
        if 0 <= self._head - token < self._capacity:
            at = self._at(token)
            if math.isnan(_TIME.unpack_from(self.buffer, at + _FINISHED)[0]):
                now_s = time.time()
                if seconds < NO_WAIT_S and now_s - _TIME.unpack_from(self.buffer, at + _ENQUEUED)[0] > LATE_S:
                    self.set_flags(token, END_UNKNOWN)
                _TIME.pack_into(self.buffer, at + _FINISHED, now_s)
            self._add_blocked(at + _BLOCKED, seconds)

    def _add_blocked(self, at: int, seconds: float) -> None:
        _TIME.pack_into(self.buffer, at, _TIME.unpack_from(self.buffer, at)[0] + seconds)

    def set_flags(self, token: int, flags: int) -> None:
        """Add to the flags of the collective."""
        if 0 <= self._head - token < self._capacity:
            at = self._at(token) + _FLAGS
            _HALF.pack_into(self.buffer, at, _HALF.unpack_from(self.buffer, at)[0] | flags)

    def waiting(self, token: int | None) -> None:
        """Say in which collective the main thread is blocked from now on; None: in none."""
        self._status[3] = token or 0
        self._status[4] = time.time() if token else 0.0
        self._write_status()

    def set_step(self, step: int) -> None:
        """Say which step was completed last."""
        self._status[0] = step
        self._write_status()

    def set_phase(self, phase: str) -> None:
        """Say what the main thread does from now on."""
        name = self._names.get(phase)
        self._status[1] = self._name(phase) if name is None else name
        self._status[2] = time.time()
        self._write_status()

    def ended(self, exit_status: int, error: str = "") -> None:
        """Say that the rank has ended by itself, and of what: it may have no memory left to send it."""
        text = error.encode(errors="replace")[: _ERROR_BYTES - _WORD.size]
        at = ledger_bytes(self._capacity)
        _WORD.pack_into(self.buffer, at, len(text))
        self.buffer[at + _WORD.size : at + _WORD.size + len(text)] = text
        _ENDED.pack_into(self.buffer, _ENDED_AT, time.time(), exit_status)

    def lost(self, num_records: int) -> None:
        """Say how many records the rank could neither send nor write at its end."""
        _WORD.pack_into(self.buffer, _LOST, num_records)

    def _at(self, token: int) -> int:
        return _ENTRIES_AT + token % self._capacity * _ENTRY_BYTES

    def _write_status(self) -> None:
        self._num_status = index = self._num_status + 1
        _STATUS.pack_into(self.buffer, _STATUS_AT[index & 1], *self._status)
        _WORD.pack_into(self.buffer, _STATUS_INDEX, index)

    def _group(self, group: str) -> list[int]:
        name = self._name(group)
        found = [0, name, _NAMES_AT + name * _NAME.size]
        for other in self._groups.values():
            if other[1] == name:  # the table is full: these groups are told apart no longer
                found = other
        self._groups[group] = found
        return found

    def _name(self, name: str) -> int:
        if name in self._names:
            return self._names[name]
        index = min(self._counted, MAX_NAMES - 1)
        if self._counted < MAX_NAMES:
            full = index == MAX_NAMES - 1
            text = _cut(OTHER_NAME if full else str(name).removeprefix("torch."))
            _NAME.pack_into(self.buffer, _NAMES_AT + index * _NAME.size, 0, len(text), text)
            self._counted += 1
            _WORD.pack_into(self.buffer, _NUM_NAMES, self._counted)
        self._names[name] = index
        return index


class LedgerReader:
    """Reads a ledger, also while its rank writes it, hangs, or is no more."""

    def __init__(self, buffer: mmap.mmap | bytes) -> None:
        """Read from `buffer`; `LedgerReader.open` reads from a file."""
        if len(buffer) < _HEADER.size or bytes(buffer[:8]) != MAGIC:
            raise LedgerUnreadable("no collective ledger: the magic number is missing")
        header = _HEADER.unpack_from(buffer, 0)
        _, version, entry_bytes, self.capacity, self.rank, self.world_size, self.pid, self.incarnation = header
        if version != VERSION or entry_bytes != _ENTRY.size:
            raise LedgerUnreadable(f"ledger of version {version} ({entry_bytes} bytes an entry); this reads {VERSION}")
        if not self.capacity or len(buffer) < ledger_bytes(self.capacity):
            raise LedgerUnreadable(f"ledger cut short: {len(buffer)} of {ledger_bytes(self.capacity)} bytes")
        self._buffer = buffer
        self._names: list[str] = []

    @classmethod
    def open(cls, path: Path) -> LedgerReader:
        """Map the file at `path`. Raises: FileNotFoundError; NotOwn; LedgerUnreadable."""
        descriptor = open_own(path)
        try:
            if not 0 < (size := os.fstat(descriptor).st_size) <= MAX_BYTES:
                raise LedgerUnreadable(f"{path} has {size:,} bytes")
            mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        try:
            return cls(mapped)
        except LedgerUnreadable as error:
            mapped.close()
            raise LedgerUnreadable(f"{path}: {error}") from error

    def close(self) -> None:
        """Unmap the file."""
        if isinstance(self._buffer, mmap.mmap):
            self._buffer.close()

    def __enter__(self) -> LedgerReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def head(self) -> int:
        """Return the token of the newest collective; tokens count from 1, and the last `capacity` are kept."""
        return self._word(_HEAD)

    def entry(self, token: int) -> CollectiveEntry | None:
        """Return the collective of `token`; None where it is overrun or not yet written."""
        at = _ENTRIES_AT + token % self.capacity * _ENTRY_BYTES
        if token < 1:
            return None
        commit, seq, num_bytes, enqueued, started, finished, blocked, group, op, dtype, flags, size = (
            _ENTRY.unpack_from(self._buffer, at)
        )
        if commit != token or self._word(at) != token:
            return None
        return CollectiveEntry(
            token,
            self._text(group),
            seq,
            self._text(op),
            self._text(dtype),
            num_bytes,
            size,
            enqueued,
            None if started != started else started,
            None if finished != finished else finished,
            blocked,
            flags,
        )

    def finished(self, token: int) -> bool:
        """Tell whether the entry in the place of `token` has a time of finish; cheaper than `entry`."""
        at = _ENTRIES_AT + token % self.capacity * _ENTRY_BYTES + _FINISHED
        return not math.isnan(_TIME.unpack_from(self._buffer, at)[0])

    def entries(self, after: int = 0) -> Iterator[CollectiveEntry]:
        """Yield the kept collectives with a token above `after`, oldest first."""
        head = self.head()
        for token in range(max(after, head - self.capacity) + 1, head + 1):
            found = self.entry(token)
            if found is not None:
                yield found

    def unfinished(self) -> list[CollectiveEntry]:
        """Return the kept collectives that were entered and have not finished, oldest first."""
        return [entry for entry in self.entries() if entry.finished_s is None]

    def held_up(self) -> CollectiveEntry | None:
        """Return the oldest collective of the training step that has not ended, of those whose end would be seen."""
        head = self.head()
        for token in range(max(1, head - min(RECENT, self.capacity) + 1), head + 1):
            entry = None if self.finished(token) else self.entry(token)
            if entry is not None and entry.flags & (FINISH_IS_SEEN | SIDE_THREAD) == FINISH_IS_SEEN:
                return entry
        return None

    def state(self) -> LedgerState:
        """Return what the rank was doing when it last wrote."""
        index = self._word(_STATUS_INDEX)
        while True:
            step, phase, since, token, waiting_since = _STATUS.unpack_from(self._buffer, _STATUS_AT[index & 1])
            after = self._word(_STATUS_INDEX)
            if after == index:
                break
            index = after
        ended, exit_status = _ENDED.unpack_from(self._buffer, _ENDED_AT)
        last_seq: dict[str, int] = {}
        for name in range(min(self._word(_NUM_NAMES), MAX_NAMES)):
            if seq := self._word(_NAMES_AT + name * _NAME.size):
                last_seq[self._text(name)] = max(seq, last_seq.get(self._text(name), 0))
        return LedgerState(
            self.rank,
            self.world_size,
            self.pid,
            self.incarnation,
            step,
            self._text(phase),
            since,
            self.entry(token),
            waiting_since,
            last_seq,
            None if math.isnan(ended) else ended,
            exit_status,
            self._error() if exit_status else "",
            self._word(_LOST),
        )

    def _error(self) -> str:
        at = ledger_bytes(self.capacity)
        if len(self._buffer) < at + _ERROR_BYTES:
            return ""
        length = min(self._word(at), _ERROR_BYTES - _WORD.size)
        return bytes(self._buffer[at + _WORD.size : at + _WORD.size + length]).decode(errors="replace")

    def _word(self, at: int) -> int:
        value: int = _WORD.unpack_from(self._buffer, at)[0]
        return value

    def _text(self, name: int) -> str:
        if name >= MAX_NAMES:
            return OTHER_NAME
        while name >= len(self._names):
            _, length, text = _NAME.unpack_from(self._buffer, _NAMES_AT + len(self._names) * _NAME.size)
            if len(self._names) >= self._word(_NUM_NAMES):
                return OTHER_NAME
            self._names.append(text[: min(length, MAX_NAME_BYTES)].decode("utf-8", "replace"))
        return self._names[name]


def _cut(text: str) -> bytes:
    return text.encode()[:MAX_NAME_BYTES].decode(errors="ignore").encode()
