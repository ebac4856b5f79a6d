"""Run by tests as a process to kill: writes down each batch that comes on a socket, then acknowledges it."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc

from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc


class Telemetry(telemetry_pb2_grpc.TelemetryServicer):
    """Appends `[length][batch]` to a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def Publish(self, batches: Iterator[pb.Batch], context: grpc.ServicerContext) -> Iterator[pb.Ack]:
        with open(self.path, "ab", buffering=0) as file:
            for batch in batches:
                raw = batch.SerializeToString()
                file.write(struct.pack("<I", len(raw)) + raw)
                yield pb.Ack(seq=batch.records[-1].seq)


def read(path: str) -> list[pb.Batch]:
    """Return the batches of the file."""
    found = []
    with open(path, "rb") as file:
        while head := file.read(4):
            found.append(pb.Batch.FromString(file.read(struct.unpack("<I", head)[0])))
    return found


if __name__ == "__main__":
    server = grpc.server(futures.ThreadPoolExecutor(4))
    telemetry_pb2_grpc.add_TelemetryServicer_to_server(Telemetry(sys.argv[2]), server)
    server.add_insecure_port(f"unix:{sys.argv[1]}")
    server.start()
    print("ready", flush=True)
    threading.Event().wait()
