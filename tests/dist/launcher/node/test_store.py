"""Who serves the store of a node: rank 0 where it asks, else the agent; and for how long."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from distui.launcher.node import store
from distui.launcher.node.store import RankStore, Standby


def _standby() -> tuple[Standby, str, int]:
    """Return the agent's side, started; the numbers that rank 0 finds, as a child would have them; and the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    standby = Standby(listening)
    numbers = ",".join(str(os.dup(number)) for number in standby.inherited())
    port = listening.getsockname()[1]
    standby.start()
    return standby, numbers, port


def _uses(port: int) -> bool:
    client = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
    client.set("key", "value")
    return bool(client.get("key") == b"value")


def test_rank_0_serves_until_the_others_have_ended() -> None:
    standby, numbers, port = _standby()
    rank = RankStore(numbers)
    rank.serve()
    standby.join(120)
    assert not standby.is_alive() and _uses(port)
    waiting = threading.Thread(target=rank.wait, daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and _uses(port)
    standby.release()
    waiting.join(120)
    assert not waiting.is_alive()
    rank.close()
    standby.close()


def test_the_agent_serves_where_rank_0_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE_S", 0.05)
    standby, numbers, port = _standby()
    rank = RankStore(numbers)
    assert _uses(port)  # a process that rank 0's script started has come
    rank.serve()  # rank 0 imports torch after all
    assert rank._served is None and _uses(port)
    rank.outlive_others(0)  # at once: nobody needs this process
    rank.close()
    standby.join(120)
    standby.close()

    standby, numbers, port = _standby()
    gone = RankStore(numbers)
    gone.close()
    assert _uses(port)
    standby.join(120)
    standby.close()
