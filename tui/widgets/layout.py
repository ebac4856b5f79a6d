"""How ranks are laid out over the axes: a rank's coordinates in words, and all ranks as a picture in plain text."""

from __future__ import annotations

from collections.abc import Sequence

from distui.core.axes.sizes import AXES, AxisSizes


def axes_in_use(sizes: AxisSizes) -> list[str]:
    """Return the axes with more than one rank, outermost first."""
    return [axis for axis in AXES if getattr(sizes, axis) > 1]


def place_words(place: Sequence[tuple[str, int]]) -> str:
    """Return `pp0 dp1 tp0`."""
    return " ".join(f"{axis}{number}" for axis, number in place)


def _some(number: int, room: int) -> list[int | None]:
    """Return the indices of `number` things, or of so many as have `room`: the first ones, None, and the last."""
    if number <= room:
        return list(range(number))
    return [*range(max(1, room - 2)), None, number - 1]


def picture(sizes: AxisSizes, width: int, num_lines: int = 16, ranks_per_node: int = 0) -> list[str]:
    """Return the ranks as a grid, the innermost axis in use across, the others down; nothing for one rank.

    What has no room is told by `…`, never left out in silence. `ranks_per_node` adds the nodes that a line is on; 0
    does not.
    """
    used = axes_in_use(sizes)
    if not used:
        return []
    across, down = used[-1], used[:-1]
    columns = getattr(sizes, across)
    num_rows = sizes.world // columns
    with_nodes = bool(ranks_per_node) and sizes.world > ranks_per_node
    digits = max(len(str(sizes.world - 1)), len(f"{across}{columns - 1}"))
    head = sum(len(f"{axis}{getattr(sizes, axis) - 1}") + 1 for axis in down)
    tail = len(_nodes(0, sizes.world - 1, ranks_per_node)) if with_nodes else 0
    shown = _some(columns, max(3, (width - head - tail) // (digits + 1)))
    lines = [" " * head + " ".join(("…" if n is None else f"{across}{n}").rjust(digits) for n in shown)]
    before: list[tuple[str, int]] = []
    for row in _some(num_rows, max(3, num_lines)):
        if row is None:
            lines.append(f"… {num_rows - len(lines)} more lines")
            before = []
            continue
        first = row * columns
        coordinates = sizes.place(first)
        names, same = "", True
        here = [(axis, coordinates[axis]) for axis in down]
        for index, (axis, number) in enumerate(here):
            # A coordinate is written where it begins: stages stand out as blocks.
            same = same and index < len(before) and before[index] == (axis, number) and index + 1 < len(here)
            cell = len(f"{axis}{getattr(sizes, axis) - 1}") + 1
            names += ("" if same else f"{axis}{number}").ljust(cell)
        before = here
        cells = " ".join(("…" if n is None else str(first + n)).rjust(digits) for n in shown)
        lines.append(names + cells + (_nodes(first, first + columns - 1, ranks_per_node) if with_nodes else ""))
    return lines


def _nodes(first: int, last: int, ranks_per_node: int) -> str:
    low, high = first // ranks_per_node, last // ranks_per_node
    return f"  node {low}" if low == high else f"  nodes {low}-{high}"
