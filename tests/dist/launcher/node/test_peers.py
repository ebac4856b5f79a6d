"""The agents of several nodes, as threads here, over a real store: who is missing, who came twice, who failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from distui.core.config.schema import ClusterSection
from distui.launcher.node import peers as module
from distui.launcher.node.peers import Peers
from distui.launcher.node.ranks import listen


@dataclass
class Node:
    """One node's agent."""

    peers: Peers
    stopped: threading.Event = field(default_factory=threading.Event)


Start = Callable[..., list[Node]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Give a function that starts the agents of the nodes with these places, the first of which is node 0."""
    begun: list[Node] = []

    def begin(num_nodes: int, *places: int) -> list[Node]:
        begun.extend(_start(num_nodes, places))
        return begun

    yield begin
    begun[0].peers.tell("the end of the test")
    for node in begun:
        node.peers.join(120)
        assert not node.peers.is_alive()


def _start(num_nodes: int, places: tuple[int, ...]) -> list[Node]:
    nodes: list[Node] = []
    store = listen(ClusterSection(nodes=num_nodes, master_addr="127.0.0.1", nproc=1))
    port = store.getsockname()[1]
    for place in places:
        cluster = ClusterSection(nodes=num_nodes, node_rank=place, master_addr="127.0.0.1", master_port=port, nproc=1)
        stopped = threading.Event()
        nodes.append(Node(Peers(cluster, store if place == 0 and not nodes else None, stopped.set), stopped))
    for node in nodes:
        node.peers.start()
    return nodes


def test_the_first_failure_is_told_to_all(start: Start) -> None:
    first, second, third = start(3, 0, 1, 2)
    assert third.peers.tell("rank 2: ValueError: bad") == "rank 2: ValueError: bad"
    assert (
        second.peers.tell("rank 1: lost its peer")
        == "rank 1: lost its peer; but first, node 2: rank 2: ValueError: bad"
    )
    for node in (first, second):
        assert node.stopped.wait(120) and node.peers.failure == "node 2: rank 2: ValueError: bad"
    assert not third.stopped.is_set(), "it knows"


def test_a_node_that_does_not_come_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEETING_S", 1.0)
    (first,) = start(3, 0)
    assert first.stopped.wait(120)
    assert first.peers.failure == "node 1, 2 of 3 has not come within 1 s"


def test_a_place_that_is_given_twice_is_told(start: Start) -> None:
    nodes = start(2, 0, 1, 1)
    failed = next(node for node in _as_they_stop(nodes))
    assert failed.peers.failure == "another node was started with --node-rank 1 too"


def _as_they_stop(nodes: list[Node]) -> Iterator[Node]:
    while True:
        yield from (node for node in nodes if node.stopped.wait(0.05))


def test_node_0_leaves_last(start: Start) -> None:
    first, second = start(2, 0, 1)
    leaving = threading.Thread(target=first.peers.leave)
    leaving.start()
    leaving.join(0.5)
    assert leaving.is_alive(), "the other node's ranks may need the store"
    second.peers.leave()
    leaving.join(120)
    assert not leaving.is_alive()
