"""The failure of one node, told to the others: elastic's static meeting does not, and their ranks would wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from distui.core.config import ClusterSection

_KEY = "distui/failure"
_FOREVER = timedelta(days=365)
_CALL = timedelta(seconds=2)


class Peers(threading.Thread):
    """A thread of the agent that waits for the first failure of another node, in the store that node 0 hosts.

    `on_failure` is called once, in this thread, when another node has failed or node 0 is gone.
    """

    def __init__(self, cluster: ClusterSection, on_failure: Callable[[], None]) -> None:
        super().__init__(name="peers", daemon=True)
        self._cluster, self._on_failure = cluster, on_failure
        self.failure = ""
        """What another node told, in one line; "" while all is well."""

    def run(self) -> None:
        """Wait until a node has failed."""
        try:
            store = self._connect(_FOREVER)
            store.wait([_KEY], _FOREVER)
            told = store.get(_KEY).decode()
        except RuntimeError as error:  # torch's store errors are RuntimeErrors
            told = f"node 0 is gone: {str(error).partition(chr(10))[0]}"
        if not told.startswith(self._me()):
            self.failure = told
            self._on_failure()

    def tell(self, message: str) -> str:
        """Say that this node has failed; return the failure that was first, which may be another node's."""
        try:
            found = self._connect(_CALL).compare_set(_KEY, "", f"{self._me()}{message}")
        except RuntimeError as error:
            return f"{message} (node 0 could not be told: {str(error).partition(chr(10))[0]})"
        first = bytes(found).decode()
        return message if first.startswith(self._me()) else f"{message}; but first, {first}"

    def _me(self) -> str:
        return f"node {self._cluster.node_rank}: "

    def _connect(self, timeout: timedelta) -> Any:
        from torch.distributed import TCPStore

        return TCPStore(
            self._cluster.master_addr,
            self._cluster.master_port,
            is_master=False,
            wait_for_workers=False,
            timeout=timeout,
        )
