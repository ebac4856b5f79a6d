"""A run's telemetry as tables, each record as it was sent: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from distui.core.errors import UserError
from distui.core.paths import RunFolder
from distui.daemon.runs.state import RunState
from distui.daemon.runs.store import read_batches
from distui.proto import telemetry_pb2 as pb

TABLES = {
    "steps": "step",
    "memory": "memory",
    "collectives": "collective",
    "events": "event",
    "metrics": "metrics",
    "heartbeats": "heartbeat",
    "hardware": "hardware",
}
"""File -> the body of Record that its rows are."""
FORMATS = ("csv", "parquet")
_BATCH_ROWS = 50_000


def write_tables(run: RunFolder, folder: Path, form: str) -> dict[str, int]:
    """Write one file a table that has rows, and return how many rows each got.

    Raises: UserError where pyarrow is needed and missing, or the folder holds such files already.
    """
    if form == "parquet":
        _pyarrow()
    clashing = [name for name in TABLES if (folder / f"{name}.{form}").exists()]
    if clashing:
        raise UserError(
            f"{folder} holds tables already",
            f"{clashing[0]}.{form} would be overwritten",
            "name another folder with --output, or move them away",
        )
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(run)
    writers = {"csv": _write_csv, "parquet": _write_parquet}
    return {name: writers[form](folder / f"{name}.{form}", kept) for name, kept in rows.items() if kept}


def _rows(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    bodies = {body: name for name, body in TABLES.items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    state = RunState(run)
    for batch in read_batches(run):
        if not state.only_new(batch):  # sent twice, to two daemons one after the other
            continue
        state.apply(batch)
        for record in batch.records:
            name = bodies.get(record.WhichOneof("body") or "")
            if name is not None:
                where = {"time_s": record.time_s, "rank": batch.source.rank, "node": batch.source.node}
                found[name] += [{**where, **row} for row in _flat(getattr(record, TABLES[name]))]
    return found


def _flat(message: Message) -> Iterator[dict[str, Any]]:
    """Yield the message as one row; what was not sent is absent, a map is a column a key, and metrics a row each."""
    if isinstance(message, pb.Metrics):
        for name, value in sorted(message.values.items()):
            yield {"step": message.step, "name": name, "value": value}
        return
    row: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, Mapping):
            row |= {f"{field.name}.{key}": value[key] for key in sorted(value)}
        elif field.is_repeated:
            row[field.name] = json.dumps([_plain(item) for item in value])
        elif field.has_presence and not message.HasField(field.name):
            continue
        elif field.enum_type is not None:
            row[field.name] = field.enum_type.values_by_number[value].name.lower()
        elif field.type != FieldDescriptor.TYPE_MESSAGE:
            row[field.name] = value
    yield row


def _plain(item: Any) -> Any:
    if not isinstance(item, Message):
        return item
    return {field.name: value for field, value in item.ListFields()}


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> int:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow", str(error), "pip install pyarrow, or take --format csv") from error
    return pyarrow


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> int:
    pyarrow = _pyarrow()
    names = _columns(rows)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, path, row_group_size=_BATCH_ROWS)
    return len(rows)
