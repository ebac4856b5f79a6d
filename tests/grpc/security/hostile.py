"""Makes run folders that mean harm: what another user may plant beside my runs, or what is in a folder I was given."""

from __future__ import annotations

import json
import os
import signal
import socket as sockets
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distui.core.paths import RunFolder
from distui.proto import telemetry_pb2 as pb

SECRET = "the-secret-of-a-file-of-mine"
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1mbold\u202eback\r[/nope][@click=app.quit]"
"""Sets the title, clears the screen, colours, in 7 and 8 bits, turns the writing round, goes to the line's start; and
markup, which closes what is not open."""
SPARSE_BYTES = 20 << 30


def frame(batch: pb.Batch) -> bytes:
    """Return a batch as a frame of the log."""
    return raw_frame(zlib.compress(batch.SerializeToString()))


def raw_frame(body: bytes) -> bytes:
    """Return a frame with any body."""
    return struct.pack("<II", len(body), zlib.crc32(body)) + body


@dataclass
class Plot:
    """A hostile folder in the making. `secret` is a file of mine, mode 0600, that is to be read or destroyed."""

    run: RunFolder
    secret: Path
    elsewhere: Path
    """A folder of mine, with more of mine in it."""

    def segment(self, number: int = 1) -> Path:
        """Return a segment of its telemetry."""
        return self.run.telemetry / f"{number:08d}.log"

    def batch(self, *records: pb.Record, rank: int = 0) -> pb.Batch:
        """Return a batch of a rank whose process is no more, so that there is something to be said of it."""
        for number, record in enumerate(records, 1):
            record.seq, record.time_s = number, time.time()
        source = pb.Source(rank=rank, node=sockets.gethostname(), pid=(1 << 22) - 1, incarnation=1)
        return pb.Batch(run_id=self.run.run_id, run_dir=str(self.run.path), source=source, records=records)

    def started(self, **fields: object) -> pb.Record:
        """Return a record that a rank has started."""
        return pb.Record(rank_started=pb.RankStarted(world_size=1, device="cpu", **fields))  # type: ignore[arg-type]


KINDS: dict[str, Callable[[Plot], None]] = {}


def _kind(make: Callable[[Plot], None]) -> Callable[[Plot], None]:
    KINDS[make.__name__.replace("_", "-")] = make
    return make


@_kind
def nothing_but_its_owner(plot: Plot) -> None:
    pass


@_kind
def next_segment_is_a_link(plot: Plot) -> None:
    plot.segment(2).symlink_to(plot.secret)


@_kind
def next_segment_is_a_hard_link(plot: Plot) -> None:
    os.link(plot.secret, plot.segment(2))


@_kind
def telemetry_is_a_link(plot: Plot) -> None:
    plot.segment().rename(plot.elsewhere / plot.segment().name)
    plot.run.telemetry.rmdir()
    plot.run.telemetry.symlink_to(plot.elsewhere)


@_kind
def logs_are_links(plot: Plot) -> None:
    for log in (plot.run.rank_log(0), plot.run.logs / "launcher.log"):
        log.symlink_to(plot.secret)


@_kind
def log_folder_is_a_link(plot: Plot) -> None:
    plot.run.logs.rmdir()
    plot.run.logs.symlink_to(plot.elsewhere)


@_kind
def log_is_a_hard_link(plot: Plot) -> None:
    os.link(plot.secret, plot.run.rank_log(0))


@_kind
def log_is_a_device(plot: Plot) -> None:
    plot.run.rank_log(0).symlink_to("/dev/zero")


@_kind
def all_files_are_fifos(plot: Plot) -> None:
    plot.segment().unlink()
    files = (plot.segment(), plot.run.outcome, plot.run.rank_log(0), plot.run.logs / "launcher.log")
    for path in (*files, plot.run.rank_ledger(0), plot.run.ledger / "rank0.stack", plot.run.rank_error(0)):
        os.mkfifo(path)


@_kind
def spec_is_a_fifo(plot: Plot) -> None:
    plot.run.spec.unlink()
    os.mkfifo(plot.run.spec)


@_kind
def spec_is_a_link(plot: Plot) -> None:
    plot.run.spec.unlink()
    (plot.elsewhere / "of-mine.json").write_text(json.dumps({"name": SECRET, "started_s": time.time() + 1e6}))
    plot.run.spec.symlink_to(plot.elsewhere / "of-mine.json")


@_kind
def spec_is_endless(plot: Plot) -> None:
    os.truncate(plot.run.spec, SPARSE_BYTES)


@_kind
def spec_is_nested(plot: Plot) -> None:
    plot.run.spec.write_text('{"name": ' + "[" * 2_000_000)


@_kind
def spec_has_wrong_types(plot: Plot) -> None:
    wrong = {"command": 7, "planned_memory_bytes": {"all": "much", "x": -1}, "world_size": "all", "name": ["a"]}
    plot.run.spec.write_text(json.dumps({**wrong, "started_s": "now", "num_nodes": 1e300, "config_toml": {}}))
    outcome = {"state": "failed", "ranks": 7, "failed_rank": "x", "exit_status": 1 << 80, "message": 5}
    plot.run.outcome.write_text(json.dumps(outcome))


@_kind
def segment_is_sparse(plot: Plot) -> None:
    plot.run.outcome.write_text('{"state": "finished"}')
    os.truncate(plot.segment(), SPARSE_BYTES)


@_kind
def frame_of_four_gib(plot: Plot) -> None:
    plot.segment().write_bytes(plot.segment().read_bytes() + struct.pack("<II", 0xFFFFFFFF, 0) + b"x" * 4096)


@_kind
def frame_that_inflates(plot: Plot) -> None:
    bomb = zlib.compressobj()
    start = bomb.compress(bytes(1 << 20)) + bomb.flush(zlib.Z_FULL_FLUSH)
    again = bomb.compress(bytes(1 << 20)) + bomb.flush(zlib.Z_FULL_FLUSH)
    plot.segment(2).write_bytes(raw_frame(start + 4095 * again))


@_kind
def frame_of_noise(plot: Plot) -> None:
    plot.segment(2).write_bytes(raw_frame(b"noise") + raw_frame(zlib.compress(b"\xff\xff\xff\xff")))


@_kind
def records_that_lie(plot: Plot) -> None:
    rows = [
        plot.batch(pb.Record(rank_started=pb.RankStarted(world_size=1 << 30))),
        plot.batch(pb.Record(step=pb.Step(step=1, step_s=1.0)), rank=(1 << 31) - 1),
        plot.batch(pb.Record(event=pb.Event(kind="source_closed", attributes={"rank": "x"})), rank=-2),
    ]
    plot.segment(2).write_bytes(b"".join(map(frame, rows)))


@_kind
def ledger_is_noise(plot: Plot) -> None:
    head = struct.pack("@8sIIQqQQQ", b"DISTUILG", 1, 80, 16, 0, 1, 1, 1)
    plot.run.rank_ledger(0).write_bytes(head.ljust(64, b"\0") + b"\xff" * 30_000)


@_kind
def text_with_escapes(plot: Plot) -> None:
    spec = {"name": f"n{ESCAPE}", "strategy": f"s{ESCAPE}", "command": [f"c{ESCAPE}"], "world_size": 1, "num_nodes": 1}
    plot.run.spec.write_text(json.dumps({**spec, "started_s": time.time(), "config_toml": f"[run]\n# {ESCAPE}\n"}))
    ended = {"rank": 0, "exit_status": 1, "signal": None, "error": f"e{ESCAPE}"}
    outcome = {"state": "failed", "exit_status": 3, "message": f"m{ESCAPE}", "failed_rank": 0, "ranks": [ended]}
    plot.run.outcome.write_text(json.dumps({**outcome, "finished_s": time.time()}))
    report = {"rank": 0, "host": f"h{ESCAPE}", "type": f"t{ESCAPE}", "message": f"m{ESCAPE}", "fix": f"f{ESCAPE}"}
    plot.run.rank_error(0).write_text(json.dumps({**report, "traceback": f"tb{ESCAPE}\nline", "step": 3, "time_s": 1}))
    plot.run.rank_log(0).write_text(f"log{ESCAPE}\n")
    records = [
        plot.started(device_name=f"d{ESCAPE}"),
        pb.Record(step=pb.Step(step=1, step_s=0.5, loss=1.0)),
        pb.Record(heartbeat=pb.Heartbeat(step=1, phase=f"p{ESCAPE}", last_seq={f"g{ESCAPE}": 3})),
        pb.Record(memory=pb.Memory(rss_bytes=1 << 20, by_category_bytes={f"c{ESCAPE}": 1 << 20})),
        pb.Record(collective=pb.Collective(group=f"g{ESCAPE}", op=f"o{ESCAPE}", seq=1, bytes=8, group_size=1)),
        pb.Record(event=pb.Event(level=pb.Event.ERROR, kind=f"k{ESCAPE}", message=f"m{ESCAPE}")),
        pb.Record(metrics=pb.Metrics(step=1, values={f"m{ESCAPE}": 1.0})),
        pb.Record(rank_finished=pb.RankFinished(exit_status=1, error=f"e{ESCAPE}")),
    ]
    batch = plot.batch(*records)
    batch.source.node = f"n{ESCAPE}"
    plot.segment().write_bytes(frame(batch))


ONLY_OF_OTHERS = {"nothing-but-its-owner", "segment-is-sparse", "log-is-a-hard-link"}
CONTENT = [name for name in KINDS if name not in ONLY_OF_OTHERS]
"""What is hostile also in a folder of my own: one that was copied from somebody."""


def plant(kind: str, parent: Path, secret: Path, elsewhere: Path) -> RunFolder:
    """Make a hostile run in `parent`, newer than any other; its name is its kind."""
    run = RunFolder(parent / kind)
    run.create()
    run.path.chmod(0o755)
    plot = Plot(run, secret, elsewhere)
    spec = {"run_id": kind, "name": kind, "strategy": "plain", "command": ["train.py"], "world_size": 1, "num_nodes": 1}
    run.spec.write_text(json.dumps({**spec, "started_s": time.time() + 1e5, "config_toml": ""}))
    plot.segment().write_bytes(frame(plot.batch(plot.started())))
    KINDS[kind](plot)
    return run


def give_away(run: RunFolder, uid: int) -> None:
    """Make another user the owner of all that is in a run; a hard link has only the owner that its file has."""
    for path in (run.path, *run.path.rglob("*")):
        if path.is_symlink() or path.is_dir() or path.lstat().st_nlink == 1:
            os.chown(path, uid, -1, follow_symlinks=False)


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return what is in a folder: mode, size and time of every name."""
    found = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {str(path): (one.st_mode, one.st_size, one.st_mtime_ns) for path, one in found.items()}


class Stranger:
    """Another user of this machine."""

    def __init__(self, uid: int) -> None:
        self.uid = uid

    def does(self, script: str, *arguments: Path | str) -> None:
        """Run a script of the shell as this user."""
        command = ["sh", "-euc", script, "sh", *map(str, arguments)]
        subprocess.run(command, user=self.uid, group=self.uid, extra_groups=[], check=True, cwd="/")


def make_stranger() -> Iterator[Stranger]:
    """Add a user to this machine and take it away again."""
    name = f"distui-{os.getpid()}"
    subprocess.run(["useradd", "--system", "--user-group", "--no-create-home", name], check=True, capture_output=True)
    try:
        import pwd

        uid = pwd.getpwnam(name).pw_uid
        yield Stranger(uid)
    finally:
        for pid in [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]:
            try:
                if os.stat(f"/proc/{pid}").st_uid == uid:
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
        subprocess.run(["userdel", name], check=True, capture_output=True)
