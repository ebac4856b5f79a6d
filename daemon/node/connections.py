"""How much the TCP connections of this node have carried, by their inode: what /proc tells of files only.

The kernel's sock_diag says it to everybody who asks, without rights. Where it does not (another system, a sandbox),
nothing is known of connections.
"""

from __future__ import annotations

import os
import socket
import struct
import time

_ACCOUNTED_S = 0.2
"""Several processes are looked at, one after the other: one answer is for all."""
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_REQUEST_DUMP = 0x301
_DONE, _ERROR = 3, 2
_TCP_INFO = 2
_OPEN_STATES = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8  # established, and those of which one side has closed
_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
_REQUEST = struct.Struct("=BBBxI48x")
_INODE_AT, _MESSAGE_BYTES = 68, 72
_CARRIED, _CARRIED_AT = struct.Struct("=QQ"), 120

_answer: tuple[float, dict[int, int]] = (0.0, {})


def carried(pids: list[int]) -> dict[int, int]:
    """Return what each open connection of these processes has sent and received, by inode. Units: bytes."""
    global _answer
    if time.monotonic() - _answer[0] > _ACCOUNTED_S:
        _answer = (time.monotonic(), _all())
    known = _answer[1]
    return {inode: known[inode] for pid in pids for inode in _inodes(pid) if inode in known} if known else {}


def _inodes(pid: int) -> list[int]:
    found = []
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                kind, _, inode = os.readlink(entry.path).partition(":[")
                if kind == "socket":
                    found.append(int(inode.rstrip("]")))
    except OSError:
        return found  # it has ended, has closed one meanwhile, or is not this user's
    return found


def _all() -> dict[int, int]:
    found: dict[int, int] = {}
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as asked:
            asked.settimeout(1.0)
            for family in (socket.AF_INET, socket.AF_INET6):
                request = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_TCP_INFO - 1), _OPEN_STATES)
                size = _HEADER.size + len(request)
                asked.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 0, 0) + request)
                while _take(asked.recv(1 << 18), found):
                    pass
    except (OSError, AttributeError, struct.error):
        return {}
    return found


def _take(data: bytes, found: dict[int, int]) -> bool:
    """Take in one part of an answer; False where it was the last."""
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, *_ = _HEADER.unpack_from(data, at)
        if kind in (_DONE, _ERROR) or size < _HEADER.size:
            return False
        (inode,) = struct.unpack_from("=I", data, at + _HEADER.size + _INODE_AT)
        attribute, end = at + _HEADER.size + _MESSAGE_BYTES, at + size
        while attribute + _ATTRIBUTE.size <= end:
            length, what = _ATTRIBUTE.unpack_from(data, attribute)
            if what == _TCP_INFO and length >= _ATTRIBUTE.size + _CARRIED_AT + _CARRIED.size:
                found[inode] = sum(_CARRIED.unpack_from(data, attribute + _ATTRIBUTE.size + _CARRIED_AT))
            attribute += max(_ATTRIBUTE.size, length + 3 & ~3)
        at += size + 3 & ~3
    return bool(data)
