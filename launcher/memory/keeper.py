"""What an agent keeps of its ranks' saves: memory files that ranks have handed over, gone when the agent is.

No name in a file system holds them, so that nothing is left of them however the agent ends. Ranks see them as a folder
of links into /proc. What a rank asks over the socket is in `core/checkpoint/memory`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from distui.core.paths import MEMORY_ENV, MEMORY_FOLDER_ENV

MAX_FILES = 64
"""More than a rank hands over at once."""
SETTLED_S = 240.0
"""For so long a save may take to be whole on all hosts; then its ranks hear that it is not kept."""
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
Fetch = Callable[[str, str, int], None]
"""Fills an open file with that of a name in a save, from wherever it is. Raises: OSError."""


def _nobody(save: str, name: str, into: int) -> None:
    raise OSError(f"no other host has {name}")


@dataclass(slots=True)
class Kept:
    """One save, as far as it is here."""

    step: int
    world_size: int
    files: dict[str, int] = field(default_factory=dict)
    """Open memory files by name."""
    own: set[str] = field(default_factory=set)
    """Those that ranks of this host wrote."""
    ranks: set[int] = field(default_factory=set)
    """Ranks of this host whose files are here."""
    settled: threading.Event = field(default_factory=threading.Event)
    problem: str = ""

    def close(self) -> None:
        """Give the memory back, and tell ranks that still wait."""
        self.problem = self.problem or "another attempt has begun"
        self.settled.set()
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()


class Keeper:
    """The saves of one host's ranks, and copies of other hosts'. From any thread."""

    def __init__(self, folder: Path, on_kept: Callable[[str, Kept], None]) -> None:
        """Serve a socket in `folder`, this user's alone; `on_kept` hears of a save that all ranks here have made."""
        self._folder, self._on_kept = folder, on_kept
        self._saves: dict[str, Kept] = {}
        self._ranks: frozenset[int] = frozenset()
        self._fetch: Fetch = _nobody
        self._restored = ""
        self._lock, self._fetching = threading.RLock(), threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(folder / "keep.sock"))
        self._socket.listen(256)
        threading.Thread(target=self._serve, name="keeper", daemon=True).start()

    # ---- attempts ----------------------------------------------------------------------------------------------------

    def begin(self, ranks: Iterable[int], save: str = "", fetch: Fetch = _nobody) -> dict[str, str]:
        """Begin an attempt with these ranks here, that goes on from `save`; give up all others.

        Returns what its ranks must have in their environment. Raises: OSError where the save cannot be had.
        """
        with self._lock:
            for name in [name for name in self._saves if name != save]:
                self._saves.pop(name).close()
            self._ranks, self._fetch, self._restored = frozenset(ranks), fetch, save
            shutil.rmtree(self._folder / "save", ignore_errors=True)
        environ = {MEMORY_ENV: str(self._folder / "keep.sock"), MEMORY_FOLDER_ENV: ""}
        if save:
            with self._lock:
                kept = self._saves.setdefault(save, Kept(0, 0))
                (self._folder / "save" / save).mkdir(mode=0o700, parents=True)
                for name in list(kept.files):
                    self._show(save, name)
            self._want(MANIFEST)
            (self._folder / "save" / MANIFEST).symlink_to(self._folder / "save" / save / MANIFEST)
            environ[MEMORY_FOLDER_ENV] = str(self._folder / "save")
        return environ

    def newest(self) -> tuple[str, int] | None:
        """Return the newest save that all ranks of this host have made, with its step; for a job on one host."""
        with self._lock:
            whole = [(kept.step, name) for name, kept in self._saves.items() if len(kept.ranks) == kept.world_size > 0]
        return (max(whole)[1], max(whole)[0]) if whole else None

    def settle(self, save: str) -> None:
        """Note that a save is whole on all hosts: those before it are given up."""
        with self._lock:
            if (kept := self._saves.get(save)) is None:
                return
            for name in [name for name, other in self._saves.items() if other.step < kept.step]:
                self._saves.pop(name).close()
            kept.settled.set()

    def take_copy(self, save: str, step: int, world_size: int, files: dict[str, int]) -> None:
        """Keep files of a save, another host's too; they are this object's from now on.

        Raises: ValueError for names that lead elsewhere.
        """
        if not all(map(_NAME.fullmatch, [save, *files])):
            for descriptor in files.values():
                os.close(descriptor)
            raise ValueError("names that lead elsewhere")
        with self._lock:
            kept = self._saves.setdefault(save, Kept(step, world_size))
            for name, descriptor in files.items():
                if name in kept.files:  # the manifest, which each host has
                    os.close(descriptor)
                else:
                    kept.files[name] = descriptor

    def opened(self, save: str, name: str) -> int:
        """Return a file, open anew, that the caller closes. Raises: OSError where it is not here."""
        with self._lock:
            kept = self._saves.get(save)
            if kept is None or name not in kept.files:
                raise FileNotFoundError(f"{name} of {save} is not here")
            return os.open(f"/proc/self/fd/{kept.files[name]}", os.O_RDONLY)

    # ---- what ranks ask ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            line, _ = self._socket.accept()
            threading.Thread(target=self._answer, args=(line,), name="kept", daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        files: list[int] = []
        with line:
            try:
                message, files, _, _ = socket.recv_fds(line, 1 << 16, MAX_FILES)
                asked = json.loads(message)
                names = [str(name) for name in asked["files"]]
                if len(names) != len(files):
                    raise ValueError(f"{len(files)} of {len(names)} files have come")
                if "want" in asked:
                    self._want(str(asked["want"]))
                    problem = ""
                else:
                    given, files = dict(zip(names, files, strict=True)), []
                    problem = self._keep(
                        str(asked["keep"]), int(asked["step"]), int(asked["rank"]), int(asked["num_ranks"]), given
                    )
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = str(error) or type(error).__name__
            for descriptor in files:
                os.close(descriptor)
            with suppress(OSError):  # the rank has been killed
                line.send(json.dumps({"problem": problem}).encode())

    def _keep(self, save: str, step: int, rank: int, num_ranks: int, files: dict[str, int]) -> str:
        """Take a rank's files, and wait until the save is whole everywhere; return what was in the way of that."""
        self.take_copy(save, step, num_ranks, files)
        with self._lock:
            kept = self._saves[save]
            kept.ranks.add(rank)
            kept.own |= set(files)
            is_all = kept.ranks == self._ranks
        if is_all:
            self._on_kept(save, kept)
        if not kept.settled.wait(SETTLED_S):
            return f"the other hosts have not kept it within {SETTLED_S:.0f} s"
        return kept.problem

    def _want(self, name: str) -> None:
        """Have a file of the save that this attempt goes on from. Raises: OSError."""
        if not _NAME.fullmatch(name):
            raise OSError("a name that leads elsewhere")
        with self._fetching:  # several ranks want the same ones
            save = self._restored
            with self._lock:
                if name in self._saves[save].files:
                    return
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
            try:
                self._fetch(save, name, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            with self._lock:
                self._saves[save].files[name] = descriptor
                self._show(save, name)

    def _show(self, save: str, name: str) -> None:
        """Let ranks see a file in the folder."""
        path = self._folder / "save" / save / name
        with suppress(FileExistsError):
            path.symlink_to(f"/proc/{os.getpid()}/fd/{self._saves[save].files[name]}")

    def close(self) -> None:
        """Give all memory back."""
        self._socket.close()
        with self._lock:
            for kept in self._saves.values():
                kept.close()
            self._saves.clear()
