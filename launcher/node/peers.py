"""What the agents of several nodes tell each other, in the store that node 0 serves: who is there, who failed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from distui.core.config.schema import ClusterSection
from distui.launcher.node.store import serve

MEETING_S = 900.0
"""For so long the first node waits for the last."""
LEAVING_S = 30.0
"""For so long node 0 serves the store to nodes whose ranks have not ended, once its own have."""
_FAILURE = "distui/failure"
_FOREVER = timedelta(days=365)
_CALL = timedelta(seconds=10)
"""A failure that could not be told keeps the other nodes waiting: a busy node 0 gets its time to answer."""


class Peers(threading.Thread):
    """A thread of the agent that serves the store where this is node 0, and waits for another node's failure.

    `on_failure` is called once, in this thread, when another node has failed, has not come, or node 0 is gone.
    """

    def __init__(self, cluster: ClusterSection, store: socket.socket | None, on_failure: Callable[[], None]) -> None:
        """`store` is the listening socket where this is node 0."""
        super().__init__(name="peers", daemon=True)
        self._cluster, self._socket, self._on_failure = cluster, store, on_failure
        self._address = (cluster.master_addr, cluster.master_port)
        if store is not None:
            self._address = ("127.0.0.1", store.getsockname()[1])
        self._served: Any = None
        self.failure = ""
        """What another node told, in one line; "" while all is well."""

    def run(self) -> None:
        """Meet the others, then wait until a node has failed."""
        told = ""
        try:
            if self._socket is not None:
                self._served = serve(self._socket)
            store = self._connect(timedelta(seconds=MEETING_S))
            told = self._meet(store)
            if not told:
                store.wait([_FAILURE], _FOREVER)
                told = store.get(_FAILURE).decode()
        except RuntimeError as error:  # torch's store errors are RuntimeErrors
            told = f"node 0 is gone: {str(error).partition(chr(10))[0]}"
        if not told.startswith(self._me()):
            self.failure = told
            self._on_failure()

    def _meet(self, store: Any) -> str:
        """Wait for all nodes; return what stands against it, or ""."""
        cluster = self._cluster
        if store.add(f"distui/came/{cluster.node_rank}", 1) > 1:
            return f"another node was started with --node-rank {cluster.node_rank} too"
        store.set(f"distui/node/{cluster.node_rank}", "")
        names = {node: f"distui/node/{node}" for node in range(cluster.nodes)}
        try:
            store.wait(list(names.values()), timedelta(seconds=MEETING_S))
        except RuntimeError:
            missing = [str(node) for node, name in names.items() if not store.check([name])]
            return f"node {', '.join(missing)} of {cluster.nodes} has not come within {MEETING_S:.0f} s"
        return ""

    def tell(self, message: str) -> str:
        """Say that this node has failed; return the failure that was first, which may be another node's."""
        try:
            found = self._connect(_CALL).compare_set(_FAILURE, "", f"{self._me()}{message}")
        except RuntimeError as error:
            return f"{message} (node 0 could not be told: {str(error).partition(chr(10))[0]})"
        first = bytes(found).decode()
        return message if first.startswith(self._me()) else f"{message}; but first, {first}"

    def leave(self) -> None:
        """Say that this node's ranks have ended; node 0 waits for the others, whose ranks may need the store still."""
        nodes = self._cluster.nodes
        try:
            store = self._connect(_CALL)
            store.set(f"distui/left/{self._cluster.node_rank}", "")
            if self._socket is not None:
                store.wait([f"distui/left/{node}" for node in range(nodes)], timedelta(seconds=LEAVING_S))
        except RuntimeError as error:  # they are told by the end of the store, at the latest
            print(f"distui: leaving the other nodes: {str(error).partition(chr(10))[0]}", flush=True)

    def _me(self) -> str:
        return f"node {self._cluster.node_rank}: "

    def _connect(self, timeout: timedelta) -> Any:
        from torch.distributed import TCPStore

        return TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=timeout)
