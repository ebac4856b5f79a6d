"""What NVML counts of a GPU's errors: XID, ECC, NVLink, PCIe, and why its clocks are held down.

What this GPU or driver does not tell stays unset, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distui.proto import telemetry_pb2 as pb

MAX_NVLINKS = 18
NVLINK_COUNTERS = (0, 1, 2, 3)
"""nvmlNvLinkErrorCounter_t: replays, recoveries, checksum errors of flits and of data."""

CORRECTED, UNCORRECTED, VOLATILE = 0, 1, 0
XID_EVENT = 8
"""nvmlEventTypeXidCriticalError."""

THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
"""nvmlClocksEventReasons in words, without those that only say that the GPU idles or was told to be slow."""

MAX_EVENTS = 64
"""Events read at a time, so that a storm of them does not hold the sampler."""


class GpuErrors:
    """Reads the counters, and keeps count of the XID events that the driver sends."""

    def __init__(self, nvml: Any, gpus: Sequence[tuple[int, Any]]) -> None:
        """Begin to watch for XID events where the driver sends them."""
        self._nvml = nvml
        self._xids: dict[int, list[int]] = {}
        """GPU index to the number of XIDs and the last one; only GPUs that are watched."""
        self._events = self._ask("nvmlEventSetCreate") if gpus else None
        if self._events is None:
            return
        for index, handle in gpus:
            try:
                nvml.nvmlDeviceRegisterEvents(handle, XID_EVENT, self._events)
            except nvml.NVMLError:
                continue
            self._xids[index] = [0, 0]

    def read_events(self) -> None:
        """Count the XID events that have come since the last call; does not wait."""
        for _ in range(MAX_EVENTS if self._xids else 0):
            event = self._ask("nvmlEventSetWait", self._events, 0)
            if event is None:  # the driver's word for "nothing has come" is an error
                return
            index = self._ask("nvmlDeviceGetIndex", event.device)
            if index in self._xids:
                self._xids[index] = [self._xids[index][0] + 1, int(event.eventData)]

    def fill(self, found: pb.Gpu, handle: Any) -> None:
        """Put what is counted of one GPU into its sample."""
        for field, kind in (("ecc_corrected", CORRECTED), ("ecc_uncorrected", UNCORRECTED)):
            if (count := self._ask("nvmlDeviceGetTotalEccErrors", handle, kind, VOLATILE)) is not None:
                setattr(found, field, int(count))
        counts = [
            self._ask("nvmlDeviceGetNvLinkErrorCounter", handle, link, counter)
            for link in range(MAX_NVLINKS)
            if self._ask("nvmlDeviceGetNvLinkState", handle, link) == 1
            for counter in NVLINK_COUNTERS
        ]
        known = [int(count) for count in counts if count is not None]
        if known:
            found.nvlink_errors = sum(known)
        if (replays := self._ask("nvmlDeviceGetPcieReplayCounter", handle)) is not None:
            found.pcie_replays = int(replays)
        if found.index in self._xids:
            found.xid_errors, last = self._xids[found.index]
            if found.xid_errors:
                found.last_xid = last
        mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
        found.throttle_reasons.extend(words for bit, words in THROTTLE_REASONS.items() if mask & bit)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Return what NVML answers; None where it has no such function, or cannot tell."""
        function = getattr(self._nvml, name, None)
        if function is None:
            return None
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None
