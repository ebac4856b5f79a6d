"""One gRPC `Publish` stream to the daemon of the node.

It imports grpc, so it is itself imported late: on the side thread, once a daemon answers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # or gRPC's fork handlers meddle with DataLoader workers
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a daemon that is gone is no news to the training log

import grpc

from distui.core.telemetry.outbox import Outbox
from distui.proto import telemetry_pb2 as pb
from distui.proto.telemetry_pb2_grpc import TelemetryStub

_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]


class PublishStream:
    """Sends what waits in the outbox as batches, and takes the acknowledgements; ends at the first error."""

    def __init__(
        self, socket: Path, outbox: Outbox, batch: Callable[[list[pb.Record]], pb.Batch], on_end: Callable[[], None]
    ) -> None:
        """Start the stream at once; `on_end` is called, on a side thread, when it breaks or is closed."""
        self._outbox, self._batch, self._on_end = outbox, batch, on_end
        self._ended = self._closing = False
        self.acknowledged = False
        """Whether the daemon has acknowledged anything on this stream."""
        self.flush_s = 0.0
        """The time between two batches that the daemon asks for; 0 where it has not said. Units: seconds."""
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._call = TelemetryStub(self._channel).Publish(self._requests())
        self._reader = threading.Thread(target=self._read, name="distui-acks", daemon=True)
        self._reader.start()

    def is_open(self) -> bool:
        """Tell whether the stream still takes records."""
        return not (self._ended or self._closing)

    def close(self, timeout_s: float) -> None:
        """Say that no more comes, and wait for the daemon to end the stream; cut it when the time is over."""
        self._closing = True
        self._outbox.notify()
        self._reader.join(timeout_s)
        self.cancel()

    def cancel(self) -> None:
        """Cut the stream."""
        self._call.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[pb.Batch]:
        while records := self._outbox.take(self.is_open):
            yield self._batch(records)

    def _read(self) -> None:
        try:
            for ack in self._call:
                self.acknowledged, self.flush_s = True, ack.flush_s
                self._outbox.acknowledge(ack.seq)
        except grpc.RpcError:
            pass  # how a stream tells that it has ended: the sender starts the next one
        finally:
            self._ended = True
            self._outbox.notify()
            self._on_end()
