"""What this rank's ledger tells of its collectives."""

from __future__ import annotations

import os
from typing import Any

from distui.core.paths import current_run
from distui.core.telemetry.ledger import LedgerReader


def summary() -> dict[str, Any]:
    """Return calls and bytes by operation, of the ledger's newest entries; empty outside of `distui launch`."""
    run = current_run()
    if run is None:
        return {}
    path = run.rank_ledger(int(os.environ.get("RANK", "0")))
    if not path.is_file():
        return {}
    table: dict[str, Any] = {}
    with LedgerReader.open(path) as reader:
        for entry in reader.entries():
            row = table.setdefault(entry.op, {"count": 0, "bytes": 0})
            row["count"] += 1
            row["bytes"] += entry.num_bytes
    return table
