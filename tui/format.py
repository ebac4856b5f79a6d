"""Numbers as people read them: three significant digits, SI for rates and counts, IEC for bytes, n/a where absent.

Every screen takes its numbers from here, so that one quantity looks the same everywhere. `None` and NaN are not
available and give `n/a`, never 0.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distui.proto.telemetry_pb2 import Effort

NA = "n/a"
NONE = "–"
"""It is known that there is none: not the same as not available."""
_SI = ("", "k", "M", "G", "T", "P", "E")
_IEC = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def absent(value: float | None) -> bool:
    """Return whether `value` is not available: None or NaN."""
    return value is None or math.isnan(value)


def three_digits(value: float) -> str:
    """Return 1.23, 12.3 or 123: three significant digits below 1,000, whole numbers above."""
    size = abs(value)
    if size == 0:
        return "0"
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"


def _scaled(value: float, base: float, names: tuple[str, ...]) -> tuple[str, str]:
    index = 0
    # 999.5 would be written as 1000: take the next prefix already there.
    while abs(value) >= min(999.5, base) and index < len(names) - 1:
        value, index = value / base, index + 1
    return (f"{value:.0f}" if index == 0 and value == int(value) else three_digits(value)), names[index]


def si(value: float | None, unit: str = "") -> str:
    """Return `1.49 kW`, `1.23 M tok/s` or `1.23 M`: with an SI prefix, which belongs to a unit but not to a word."""
    if value is None or math.isnan(value):
        return NA
    number, prefix = _scaled(value, 1000.0, _SI)
    if unit[:1].isupper():
        return f"{number} {prefix}{unit}"
    return " ".join(part for part in (number, prefix, unit) if part)


def num_bytes(value: float | None) -> str:
    """Return `12.3 GiB`. Units: bytes."""
    if value is None or math.isnan(value):
        return NA
    return " ".join(_scaled(value, 1024.0, _IEC))


def seconds(value: float | None) -> str:
    """Return `12.3 ms`, `850 µs` or `1.23 s`; from two minutes on like `duration`. Units: seconds."""
    if value is None or math.isnan(value):
        return NA
    size = abs(value)
    if size == 0:
        return "0 s"
    if size < 0.9995e-3:
        return f"{three_digits(value * 1e6)} µs"
    if size < 0.9995:
        return f"{three_digits(value * 1e3)} ms"
    return f"{three_digits(value)} s" if size < 120 else duration(value)


def duration(value: float | None) -> str:
    """Return `12s`, `3m 05s`, `2h 07m` or `4d 03h`: how long something has lasted. Units: seconds."""
    if value is None or math.isnan(value):
        return NA
    whole = max(0, int(value))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def count(value: float | None) -> str:
    """Return `1,234`: a number that is counted exactly."""
    return NA if value is None or math.isnan(value) else f"{int(value):,}"


def percent(ratio: float | None) -> str:
    """Return `45.2%` of a ratio of 0.452."""
    return NA if ratio is None or math.isnan(ratio) else f"{three_digits(ratio * 100)}%"


def scalar(value: float | None) -> str:
    """Return a loss, norm or learning rate with four significant digits: `2.345`, `3.000e-4`."""
    if value is None or math.isnan(value):
        return NA
    if value == 0:
        return "0"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if 1e-2 <= abs(value) < 1e5:
        return f"{value:.{max(0, min(4, 3 - math.floor(math.log10(abs(value)))))}f}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def clock(time_s: float | None) -> str:
    """Return the local time of day, `14:03:59`. Units: Unix seconds."""
    return NA if time_s is None or time_s <= 0 else time.strftime("%H:%M:%S", time.localtime(time_s))


def ranks(numbers: list[int], limit: int = 4) -> str:
    """Return `rank 3` or `ranks 0, 1, 2, 3 and 12 more`."""
    if not numbers:
        return "no rank"
    shown = ", ".join(str(number) for number in numbers[:limit])
    more = f" and {len(numbers) - limit} more" if len(numbers) > limit else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"


def cut(text: str, width: int) -> str:
    """Return `text` in at most `width` cells of plain characters, with an ellipsis where it was cut."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…" if width > 0 else ""


def lost_time(effort: Effort) -> str:
    """Return `93% of 2m 10s was new training; start 4.20 s, notice 1.00 s, ...`: a run's time, and where it went."""
    names = [field.name for field in effort.DESCRIPTOR.fields if field.name not in ("wall_s", "effective")]
    parts = ", ".join(f"{name.removesuffix('_s')} {seconds(getattr(effort, name))}" for name in names)
    return f"{effort.effective:.0%} of {duration(effort.wall_s)} was new training; {parts}"
