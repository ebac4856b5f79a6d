"""In which order the stages of a pipeline run their micro-batches, and what that costs. Torch-free.

A table is one rank's list of steps: F a forward, B a backward, W the weights' part of a backward where the schedule has
it apart. Whoever executes the steps one by one, with receives that wait and sends that do not, comes to the end.

    gpipe         all forwards, then all backwards              Huang et al., arXiv 1811.06965
    1f1b          as few micro-batches under way as go          Narayanan et al., arXiv 2104.04473, section 2.2
    interleaved   as 1f1b, a rank has several chunks of blocks  the same, section 2.2.2
    zbv           two chunks in a V, and W fills the gaps       Qi et al., arXiv 2405.15362
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv")


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank does with one micro-batch and one of its chunks."""

    kind: Literal["F", "B", "W"]
    micro: int
    chunk: int = 0


Table = list[Step]


def num_chunks(schedule: str, chunks: int = 2) -> int:
    """Return how many chunks of blocks a rank has; `chunks` where the schedule leaves it open."""
    return {"gpipe": 1, "1f1b": 1, "interleaved": chunks, "zbv": 2}[schedule]


def stage_of(schedule: str, num_ranks: int, rank: int, chunk: int) -> int:
    """Return which stage, counted along the model, a chunk of a rank is."""
    if schedule == "zbv" and chunk == 1:
        return 2 * num_ranks - 1 - rank
    return chunk * num_ranks + rank


def tables(schedule: str, num_ranks: int, num_micro: int, chunks: int = 2) -> list[Table]:
    """Return every rank's table.

    Raises: ValueError where micro-batches and ranks do not fit the schedule; `config.check` says so to users.
    """
    if schedule not in SCHEDULES or num_ranks < 1 or num_micro < 1:
        raise ValueError(f"schedule {schedule} of {num_micro} micro-batches on {num_ranks} ranks")
    if schedule == "interleaved" and num_micro % num_ranks and num_micro > num_ranks:
        raise ValueError(f"interleaved: {num_micro} micro-batches on {num_ranks} ranks")
    return [_table(schedule, num_ranks, num_micro, chunks, rank) for rank in range(num_ranks)]


def _table(schedule: str, num_ranks: int, num_micro: int, chunks: int, rank: int) -> Table:
    if schedule == "zbv":
        return _zbv(num_ranks, num_micro, rank)
    if schedule == "interleaved":
        if num_micro % num_ranks:  # a last batch of a few rows: one chunk after the other
            pairs = [(chunk, micro) for chunk in range(chunks) for micro in range(num_micro)]
            forwards = [Step("F", micro, chunk) for chunk, micro in pairs]
            return [*forwards, *(Step("B", micro, chunks - 1 - chunk) for chunk, micro in pairs)]
        return _interleaved(num_ranks, num_micro, num_chunks(schedule, chunks), rank)
    ahead = num_micro if schedule == "gpipe" else min(num_ranks - 1 - rank, num_micro)
    steps = [Step("F", micro) for micro in range(ahead)]
    for micro in range(num_micro):
        if micro + ahead < num_micro:
            steps.append(Step("F", micro + ahead))
        steps.append(Step("B", micro))
    return steps


def _interleaved(num_ranks: int, num_micro: int, chunks: int, rank: int) -> Table:
    total = num_micro * chunks

    def step(kind: Literal["F", "B"], number: int) -> Step:
        turn, within = divmod(number, num_ranks * chunks)
        chunk, micro = divmod(within, num_ranks)
        return Step(kind, turn * num_ranks + micro, chunk if kind == "F" else chunks - 1 - chunk)

    ahead = min((chunks - 1) * num_ranks + 2 * (num_ranks - 1 - rank), total)
    steps = [step("F", number) for number in range(ahead)]
    for number in range(total):
        if number + ahead < total:
            steps.append(step("F", number + ahead))
        steps.append(step("B", number))
    return steps


def _zbv(num_ranks: int, num_micro: int, rank: int) -> Table:
    """Lay out as if there were enough micro-batches to fill the V, and leave out those that there are not."""
    enough, steps = max(2 * num_ranks - 1, num_micro), Table()
    done = {(kind, chunk): 0 for kind in "FBW" for chunk in (0, 1)}

    def add(*kinds: tuple[Literal["F", "B", "W"], int]) -> None:
        for kind, chunk in kinds:
            steps.append(Step(kind, done[kind, chunk], chunk))
            done[kind, chunk] += 1

    for _ in range(2 * (num_ranks - rank) - 1):
        add(("F", 0))
    for _ in range(rank):
        add(("F", 1), ("F", 0))
    for _ in range(num_ranks - rank):
        add(("F", 1), ("B", 1), ("W", 1))
    while done["F", 1] < enough:
        if done["F", 0] < enough:
            add(("F", 0))
        add(("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1))
    for _ in range(rank):
        add(("B", 0), ("B", 1))
    for _ in range(num_ranks - rank):
        add(("B", 0), ("W", 0))
    for chunk in (1, 0):
        while done["W", chunk] < enough:
            add(("W", chunk))
    return [step for step in steps if step.micro < num_micro]


@dataclass(frozen=True, slots=True)
class Course:
    """What a pass through tables takes."""

    end: float
    """When the last rank is done, in the units of the durations."""
    bubble: float
    """Share of the ranks' time in which they wait."""
    peak: float
    """Micro-batches' activations of all of a rank's blocks that the fullest rank holds at a time."""
    times: tuple[tuple[tuple[float, float], ...], ...]
    """For each rank and step, when it begins and ends."""


def course(
    schedule: str,
    all_tables: Sequence[Table],
    forward: float = 1.0,
    backward: float = 2.0,
    weights: float = 1.0,
    message: float = 0.0,
) -> Course:
    """Follow the tables with stages of equal length; `backward` is a whole one, of which W is `weights`.

    Raises: ValueError where a step waits for what never comes.
    """
    num_ranks = len(all_tables)
    chunks = 1 + max(step.chunk for table in all_tables for step in table)
    last = num_ranks * chunks - 1
    apart = any(step.kind == "W" for table in all_tables for step in table)
    lengths = {"F": forward / chunks, "B": (backward - weights * apart) / chunks, "W": weights / chunks}
    ends: dict[tuple[str, int, int], float] = {}
    at, clock = [0] * num_ranks, [0.0] * num_ranks
    times: list[list[tuple[float, float]]] = [[] for _ in all_tables]
    moved = True
    while moved:
        moved = False
        for rank, table in enumerate(all_tables):
            while at[rank] < len(table):
                step = table[at[rank]]
                stage = stage_of(schedule, num_ranks, rank, step.chunk)
                needs = _needs(step, stage, last)
                if any(need not in ends for need in needs):
                    break
                here = {stage_of(schedule, num_ranks, rank, chunk) for chunk in range(chunks)}
                ready = [ends[need] + (0.0 if need[1] in here else message) for need in needs]
                begin = max([clock[rank], *ready])
                clock[rank] = ends[step.kind, stage, step.micro] = begin + lengths[step.kind]
                times[rank].append((begin, clock[rank]))
                at[rank] += 1
                moved = True
    stuck = [rank for rank, table in enumerate(all_tables) if at[rank] < len(table)]
    if stuck:
        raise ValueError(f"rank {stuck[0]} waits for ever at {all_tables[stuck[0]][at[stuck[0]]]}")
    busy = sum(end - begin for of_rank in times for begin, end in of_rank)
    end = max(clock)
    peak = max(_most_held(table, "W" if apart else "B") for table in all_tables) / chunks
    return Course(end, 1.0 - busy / (end * num_ranks), peak, tuple(map(tuple, times)))


def _needs(step: Step, stage: int, last: int) -> list[tuple[str, int, int]]:
    """Return the steps, by kind, stage and micro-batch, that must have ended before."""
    if step.kind == "W":
        return [("B", stage, step.micro)]
    if step.kind == "F":
        return [("F", stage - 1, step.micro)] if stage else []
    return [("F", stage, step.micro), *([("B", stage + 1, step.micro)] if stage < last else [])]


def _most_held(table: Table, gives_back: str) -> int:
    held = most = 0
    for step in table:
        held += (step.kind == "F") - (step.kind == gives_back)
        most = max(most, held)
    return most


def split(costs: Sequence[float], num_stages: int, front: float = 0.0, back: float = 0.0) -> list[range]:
    """Cut a row of blocks into stages, one block each at least, so that the costliest stage costs least.

    `front` is what the first stage has beside its blocks, `back` the last: an embedding, a head. Of equal cuts the one
    with earlier stages fuller is taken, for the last one waits least.

    Raises: ValueError for more stages than blocks.
    """
    num = len(costs)
    if not 1 <= num_stages <= num:
        raise ValueError(f"{num_stages} stages of {num} blocks")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def cost_of(stage: int, low: int, high: int) -> float:
        return before[high] - before[low] + front * (stage == 0) + back * (stage == num_stages - 1)

    # best[low]: of the stages that have the blocks from low on, the costliest one's cost, and where the first ends
    best: list[tuple[float, int] | None] = [None] * num + [(0.0, num)]
    ends: list[list[int]] = []
    for stage in reversed(range(num_stages)):
        found: list[tuple[float, int] | None] = [None] * (num + 1)
        for low in range(num):
            for high in range(low + 1, num + 1):
                rest = best[high]
                if rest is None:
                    continue
                worst = max(cost_of(stage, low, high), rest[0])
                known = found[low]
                if known is None or worst <= known[0]:
                    found[low] = (worst, high)
        best = found
        ends.insert(0, [entry[1] if entry is not None else -1 for entry in found])
    stages, low = [], 0
    for of_stage in ends:
        stages.append(range(low, of_stage[low]))
        low = of_stage[low]
    return stages
