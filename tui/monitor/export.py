"""What is shown as a file: a table as CSV, or, of a view of charts, the steps in sight."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from textual.widget import Widget

from distui.tui.monitor.history import COLUMNS
from distui.tui.monitor.views.base import Frame
from distui.tui.widgets.table import LineTable


def shown_table(view: Widget, focused: Widget | None) -> LineTable[Any] | None:
    """Return the table with the focus, else the first in sight; None where the view has none."""
    if isinstance(focused, LineTable):
        return focused
    return next((table for table in view.query(LineTable) if table.is_on_screen and table.size.height), None)


def table_csv(table: LineTable[Any]) -> str:
    """Return the rows as filtered and sorted, with every column, also those that did not fit; values are raw."""
    columns = [column for column in table.columns if column.draw is None]
    rows = ([column.value(row) for column in columns] for row in table.rows)
    return _csv([column.title for column in columns], rows)


def steps_csv(frame: Frame) -> str:
    """Return the steps in sight, one a line."""
    window = frame.window
    columns = [frame.model.history.column(name, window) for name in COLUMNS]
    return _csv(COLUMNS, zip(*columns, strict=True))


def _csv(titles: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(titles)
    for row in rows:
        writer.writerow(
            "" if value is None or (isinstance(value, float) and math.isnan(value)) else value for value in row
        )
    return file.getvalue()
