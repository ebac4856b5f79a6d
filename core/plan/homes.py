"""Time of a step whose states rest in host memory or on a disk (docs/offload.md says what moves when). Torch-free.

With the optimizer at home the update runs on the host: gradients come down (at stages 2 and 3 under the backward), new
parameters go up, and masters and moments move between the disk and host memory, unit by unit, so the slowest of update,
disk and link is what counts. Units: seconds, bytes, bytes/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from distui.core.plan.memory import Strategy
from distui.core.plan.rates import Rates, home_rates


@dataclass(frozen=True, slots=True)
class HomeTime:
    """What homes add to a step, and the update itself where it runs on the host."""

    offload_s: float = 0.0
    hidden_s: float = 0.0
    update_s: float | None = None
    """The optimizer's own time on the host; None where it runs on the device."""
    missing: tuple[str, ...] = ()


def home_time(
    strategy: Strategy,
    rates: Rates,
    *,
    moved: float,
    bytes_each: tuple[int, int, float],
    stepped: float,
    shard: float,
    forward_s: float,
    recomputed: float,
) -> HomeTime:
    """Return what the homes of `strategy` add.

    `moved`: bytes a parameter that the update reads and writes; `bytes_each`: of a parameter, a gradient, an optimizer
    state; `stepped`, `shard`: parameters that a rank updates and holds.
    """
    c, g, o = bytes_each
    m, on_gpu = strategy.accumulation, rates.device_kind == "cuda"
    compute_s = m * (3 + recomputed) * forward_s
    offload_s = hidden_s = 0.0
    update_s: float | None = None
    missing: list[str] = []

    def rate(home: str) -> tuple[float, float]:
        one_way, back, name = home_rates(home, rates)
        if one_way is None or back is None:
            missing.append(name)
            return float("inf"), float("inf")
        return one_way, back

    def beside(seconds: float, work_s: float) -> None:
        nonlocal offload_s, hidden_s
        under = min(seconds, work_s) if on_gpu else 0.0  # a CPU's ranks copy with the cores they compute with
        offload_s, hidden_s = offload_s + seconds - under, hidden_s + under

    sharded_gradients = strategy.zero_stage >= 2
    if strategy.optimizer_home != "none" and (on_gpu or strategy.optimizer_home == "nvme"):
        busiest = 0.0
        if on_gpu:
            down, up = rate("cpu")
            if sharded_gradients:
                beside(m * g * stepped / down, m * 2 * forward_s)
            else:
                busiest = g * stepped / down
            busiest = max(busiest, c * stepped / up)
            update_s = moved * stepped * rates.ranks_per_node / rates.host_bandwidth
        if strategy.optimizer_home == "nvme":
            read, write = rate("nvme")
            if sharded_gradients:  # each further micro-batch reads what is there and adds to it
                beside(m * g * stepped / write + (m - 1) * g * stepped / read, m * 2 * forward_s)
            fetched = o + (g if sharded_gradients else 0)
            busiest = max(busiest, fetched * stepped / read + o * stepped / write)
        offload_s += max(0.0, busiest - (update_s or 0.0))
    if strategy.params_home == "nvme" or (strategy.params_home == "cpu" and on_gpu):
        read, write = rate(strategy.params_home)
        beside(2 * m * c * shard / read, compute_s)
        if strategy.params_home == "nvme":
            offload_s += c * shard / write
    return HomeTime(offload_s, hidden_s, update_s, tuple(missing))
