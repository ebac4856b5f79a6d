"""An agent's saves in memory, among those of other hosts: copied to the next one, fetched from whoever has them.

Agents of one job know each other by a certificate and a token of the job, which the supervisor gave to each on stdin.
"""

from __future__ import annotations

import hmac
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from distui.launcher.memory.keeper import Keeper, Kept
from distui.launcher.node.link import OPTIONS, SERVER_NAME
from distui.proto import cluster_pb2 as pb
from distui.proto import cluster_pb2_grpc as rpc

PIECE_BYTES = 1 << 20
NUM_THREADS = 8
COPY_S = 180.0
"""A copy that is not there by then is given up; the save is kept on its own host alone."""


class HostMemory(rpc.KeepingServicer):
    """The keeper of one host in a job on many, and its port for the agents of the others."""

    def __init__(self, folder: Path, secrets: Mapping[str, str], say: Callable[[pb.AgentSays], None]) -> None:
        """`secrets`: certificate, key and token that all agents of the job have."""
        self._certificate, self._key = secrets["certificate"].encode(), secrets["key"].encode()
        self._metadata = (("authorization", f"Bearer {secrets['token']}"),)
        self._say, self._partner = say, ""
        self.keeper = Keeper(folder, self._kept)
        self._server: grpc.Server | None = None

    def open(self, address: str) -> str:
        """Serve agents of other hosts on `address`; return HOST:PORT. Raises: OSError."""
        server = grpc.server(ThreadPoolExecutor(NUM_THREADS, "copies"), options=[*OPTIONS, ("grpc.so_reuseport", 0)])
        rpc.add_KeepingServicer_to_server(self, server)
        name = f"[{address}]" if ":" in address else address
        try:
            port = server.add_secure_port(f"{name}:0", grpc.ssl_server_credentials([(self._key, self._certificate)]))
        except RuntimeError as error:
            raise OSError(str(error)) from error
        server.start()
        self._server = server
        return f"{name}:{port}"

    def begin(self, start: pb.Start) -> dict[str, str]:
        """Begin an attempt; return what its ranks must have in their environment. Raises: OSError."""
        self._partner, asked = start.partner, start.restore
        where = {rank: holder.address for holder in asked.holders for rank in holder.ranks}

        def fetch(save: str, name: str, into: int) -> None:
            rank = int(name[4:9]) if name.startswith("rank") and name[4:9].isdecimal() else 0
            # The manifest and the index are with everybody.
            address = where.get(rank) or next(iter(where.values()), "")
            if not address:
                raise OSError(f"no host has {name}")
            self._fetch(address, save, name, into)

        ranks = range(start.first_rank, start.first_rank + start.num_ranks)
        return self.keeper.begin(ranks, asked.save.save, fetch)

    def close(self) -> None:
        """Hang up, and give all memory back."""
        if self._server is not None:
            self._server.stop(None)
        self.keeper.close()

    # ---- to other hosts ----------------------------------------------------------------------------------------------

    def _kept(self, save: str, kept: Kept) -> None:
        facts = pb.SaveFacts(save=save, step=kept.step, world_size=kept.world_size, ranks=sorted(kept.ranks))
        self._say(pb.AgentSays(kept=pb.Kept(save=facts, pending=bool(self._partner))))
        if self._partner:
            arguments = (self._partner, facts, sorted(kept.own))
            threading.Thread(target=self._copy, args=arguments, name="copy", daemon=True).start()

    def _copy(self, partner: str, facts: pb.SaveFacts, names: list[str]) -> None:
        told = pb.Kept(save=facts)

        def pieces() -> Iterator[pb.KeptPiece]:
            yield pb.KeptPiece(save=facts)
            for name in names:
                yield pb.KeptPiece(name=name)
                for data in _read(self.keeper.opened(facts.save, name)):
                    yield pb.KeptPiece(data=data)

        try:
            with self._channel(partner) as channel:
                rpc.KeepingStub(channel).Put(pieces(), metadata=self._metadata, timeout=COPY_S)
        except (grpc.RpcError, OSError) as error:
            words = error.details() if isinstance(error, grpc.Call) else str(error)
            told.problem = f"no copy of step {facts.step} is at {partner}: {words}"
        self._say(pb.AgentSays(kept=told))

    def _fetch(self, address: str, save: str, name: str, into: int) -> None:
        try:
            with self._channel(address) as channel, os.fdopen(os.dup(into), "wb") as file:
                asked = pb.KeptFile(save=save, name=name)
                for piece in rpc.KeepingStub(channel).Get(asked, metadata=self._metadata, timeout=COPY_S):
                    file.write(piece.data)
        except grpc.RpcError as error:
            words = error.details() if isinstance(error, grpc.Call) else str(error)
            raise OSError(f"{name} cannot be had from {address}: {words}") from error

    def _channel(self, address: str) -> grpc.Channel:
        options = [*OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME)]
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(self._certificate), options=options)

    # ---- from other hosts --------------------------------------------------------------------------------------------

    def _check(self, context: grpc.ServicerContext) -> None:
        brought = str(dict(context.invocation_metadata()).get("authorization", ""))
        if not hmac.compare_digest(brought.encode(), self._metadata[0][1].encode()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not one of this job")

    def Put(self, pieces: Iterator[pb.KeptPiece], context: grpc.ServicerContext) -> pb.KeptAll:
        """Keep a copy of what another host has."""
        self._check(context)
        facts = next(pieces).save
        files: dict[str, int] = {}
        into = -1
        try:
            for piece in pieces:
                if piece.name:
                    into = files[piece.name] = os.memfd_create(piece.name, os.MFD_CLOEXEC)
                rest = memoryview(piece.data)
                while rest:
                    rest = rest[os.write(into, rest) :]
        except BaseException:  # also where the call ends early: half a copy is none
            for descriptor in files.values():
                os.close(descriptor)
            raise
        self.keeper.take_copy(facts.save, facts.step, facts.world_size, files)
        self._say(pb.AgentSays(kept=pb.Kept(save=facts, copy=True)))
        return pb.KeptAll()

    def Get(self, asked: pb.KeptFile, context: grpc.ServicerContext) -> Iterator[pb.Piece]:
        """Give a file."""
        self._check(context)
        try:
            descriptor = self.keeper.opened(asked.save, asked.name)
        except OSError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        for data in _read(descriptor):
            yield pb.Piece(data=data)


def _read(descriptor: int) -> Iterator[bytes]:
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        while data := file.read(PIECE_BYTES):
            yield data
