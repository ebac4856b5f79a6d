"""What a notebook's cell shows while its job runs: rank 0's output as it comes, and one live table above it."""

from __future__ import annotations

import html
import io
import sys
from typing import TYPE_CHECKING, Any

from distui.core.paths import RunFolder

if TYPE_CHECKING:
    from distui.proto import telemetry_pb2 as pb

WIDTH = 100


class CellStream(io.RawIOBase):
    """Takes a log's bytes and prints them in the cell: a kernel's stdout has no file underneath."""

    def __init__(self) -> None:
        import codecs

        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def writable(self) -> bool:
        """Tell that it can be written to."""
        return True

    def write(self, data: Any) -> int:
        """Print `data`."""
        sys.stdout.write(self._decode(bytes(data)))
        return len(data)

    def flush(self) -> None:
        """Have the cell show it."""
        sys.stdout.flush()


def table_text(snapshot: pb.Snapshot) -> str:
    """Return the state of a run as a text table: what `distui status` prints."""
    from rich.console import Console

    from distui.launcher.commands.status import rank_table, summary_lines

    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, markup=False, color_system=None)
    for line in summary_lines(snapshot):
        console.print(line, markup=False, soft_wrap=True)
    if snapshot.ranks:
        console.print(rank_table(snapshot))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


class LiveTable:
    """A display of the cell that changes in place; without IPython it is silent."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._handle: Any = None
        self._shown = ""

    def show(self, snapshot: pb.Snapshot) -> None:
        """Show `snapshot` where the last one was."""
        text = table_text(snapshot)
        if text == self._shown or not in_notebook():
            return
        from IPython.display import display

        self._shown = text
        page = f'<pre style="line-height:1.2;margin:0">{html.escape(text)}</pre>'
        bundle = {"text/plain": text, "text/html": page}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this process."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None
