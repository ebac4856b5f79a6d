"""The one batch equation: global_size = micro_size x accumulation x data-parallel ranks. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from distui.core.config.schema import BatchSection
from distui.core.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The three sizes of one optimizer step, in samples and micro-batches; None where nothing gives it."""

    global_size: int | None
    micro_size: int | None
    accumulation: int | None


def _divided(whole: int, whole_name: str, parts: list[tuple[str, int]], path: str) -> int:
    """Return `whole` over the product of `parts`; refuse a remainder, with the nearest sizes that have none."""
    product = 1
    for _, part in parts:
        product *= part
    if whole % product == 0:
        return whole // product
    formula = f"{' x '.join(name for name, _ in parts)} = {' x '.join(str(part) for _, part in parts)} = {product}"
    below = whole - whole % product
    nearest = [str(size) for size in (below, below + product) if size > 0]
    raise ConfigError(
        [
            Problem(
                path,
                f"{whole_name}={whole} cannot be divided among the ranks",
                f"{formula} does not divide {whole} ({whole} = {whole // product} x {product} + {whole % product})",
                f"set {path} to {' or '.join(nearest)}",
            )
        ]
    )


def solve_batch(batch: BatchSection, data_parallel: int) -> BatchPlan:
    """Return the sizes of one optimizer step from those that are given, over `data_parallel` ranks.

    Any two of the three give the third. `accumulation` alone unset is 1, unless `global_size` is given without
    `micro_size`: then the loader's own batch size decides, and what depends on it stays None.

    Raises:
        ConfigError: the numbers do not fit; the problem names the nearest ones that do.
    """
    whole, micro, accumulation = batch.global_size, batch.micro_size, batch.accumulation
    ranks = ("data-parallel ranks", data_parallel)
    path = "batch.global_size"
    if whole is None:
        accumulation = accumulation or 1
        return BatchPlan(micro * accumulation * data_parallel if micro else None, micro, accumulation)
    if micro is None and accumulation is None:
        _divided(whole, "global_size", [ranks], path)
        return BatchPlan(whole, None, None)
    if micro is None:
        assert accumulation is not None
        return BatchPlan(
            whole, _divided(whole, "global_size", [("accumulation", accumulation), ranks], path), accumulation
        )
    solved = _divided(whole, "global_size", [("micro_size", micro), ranks], path)
    if accumulation is not None and solved != accumulation:
        product = micro * accumulation * data_parallel
        raise ConfigError(
            [
                Problem(
                    path,
                    f"global_size={whole} contradicts micro_size and accumulation",
                    f"micro_size x accumulation x data-parallel ranks = "
                    f"{micro} x {accumulation} x {data_parallel} = {product}, not {whole}",
                    f"leave one of the three unset, or set {path} to {product}, or batch.accumulation to {solved}",
                )
            ]
        )
    return BatchPlan(whole, micro, solved)


def micro_size_of(plan: BatchPlan, data_parallel: int) -> int | None:
    """Return the samples of one forward on one rank; None where nothing says how many."""
    if plan.micro_size is None and plan.global_size is not None:
        return plan.global_size // (data_parallel * (plan.accumulation or 1))
    return plan.micro_size
