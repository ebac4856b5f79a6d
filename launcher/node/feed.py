"""What ranks of this host print, copied to the launching side as it comes; nothing where both have one disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from distui.core.paths import RunFolder, open_own
from distui.launcher.node.streams import marks_of
from distui.proto import cluster_pb2 as pb

PIECE_BYTES = 1 << 18


class FileFeed:
    """Sends what is new in the logs of this host's ranks. From any thread."""

    def __init__(self, run: RunFolder, say: Callable[[pb.FilePiece], None]) -> None:
        self._run, self._say = run, say
        self._sent: dict[Path, int] = {}
        self._lock = threading.Lock()

    def begin(self, first_rank: int, num_ranks: int, shared: bool) -> None:
        """Begin with the logs of an attempt, which go on from those of the one before."""
        with self._lock:
            logs = [self._run.rank_log(first_rank + number) for number in range(num_ranks)]
            for path in [] if shared else [*logs, marks_of(logs[0])]:
                self._sent.setdefault(path, 0)

    def take(self) -> None:
        """Send what is new."""
        with self._lock:
            for path, sent in self._sent.items():
                try:
                    with open(open_own(path), "rb") as file:
                        file.seek(sent)
                        while data := file.read(PIECE_BYTES):
                            name = str(path.relative_to(self._run.path))
                            self._say(pb.FilePiece(name=name, offset=sent, data=data))
                            sent += len(data)
                except OSError:
                    continue  # the rank has not begun to write
                finally:
                    self._sent[path] = sent
