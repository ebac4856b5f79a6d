"""Step 4: how many ranks, on how many nodes, and where they meet."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Input

from distui.core.config.schema import keys
from distui.core.errors import Problem
from distui.tui.setup.consequences import consequence, fastest_nvme, needs_nvme
from distui.tui.setup.step import Step
from distui.tui.setup.widgets import SettingField

LABELS = {
    "offload.nvme_path": "Folder on NVMe",
    "cluster.nproc": "Ranks on each node",
    "cluster.nodes": "Nodes",
    "cluster.master_addr": "Address of node 0",
    "cluster.master_port": "Port on node 0",
}


class ClusterStep(Step):
    """Four fields, checked as they are typed; each says what its value leads to.

    A fifth one comes first where the strategy keeps states on NVMe.
    """

    TITLE = "Cluster"
    HELP = (
        "A rank is one process that trains, on one GPU where there are GPUs. The values are good for one machine as "
        "they are. With several nodes, give the address of the first one and a port that is free there, and copy the "
        "file to every node. A strategy that keeps states on NVMe also needs a folder on a local disk."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    def compose(self) -> ComposeResult:
        """Yield the fields under their sentences from the schema."""
        known = keys()
        with VerticalScroll(can_focus=False):
            for key, label in LABELS.items():
                yield SettingField(key, label, str(known[key].description))

    def enter(self) -> None:
        """Show the present values and what they lead to."""
        if needs_nvme(self.state) and not self.state.value("offload.nvme_path"):
            fastest = fastest_nvme(self.state)
            if fastest is not None:
                self.state.set_value("offload.nvme_path", fastest)
        for field in self.query(SettingField):
            self.fill(field.input, str(self.state.value(field.key)))
            if field.key == "offload.nvme_path":
                field.display = needs_nvme(self.state)
        self._explain()
        next(field for field in self.query(SettingField) if field.display).input.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Check the value, and show what it leads to."""
        self.heard(event)
        self.tell(None)
        self._take()

    def complete(self) -> bool:
        """Take all fields; tell the first thing that is wrong."""
        if trouble := self._take():
            self.tell(trouble)
            return False
        return True

    def _take(self) -> Problem | None:
        wrong: dict[str, Problem] = {}
        for field in self.query(SettingField):
            text = self.typed[field.key].strip()
            if not field.display:
                continue
            if text != str(self.state.value(field.key)) and (problem := self.state.set_value(field.key, text)):
                wrong[field.key] = problem
        self._explain(wrong)
        if needs_nvme(self.state):
            wrong |= {problem.path: problem for problem in self.state.problems() if problem.path == "offload.nvme_path"}
        return next(iter(wrong.values()), None)

    def _explain(self, wrong: dict[str, Problem] | None = None) -> None:
        problems = {problem.path: problem for problem in self.state.problems()} | (wrong or {})
        for field in self.query(SettingField):
            if problem := problems.get(field.key):
                field.tell(f"{problem.what}; {problem.fix}", wrong=True)
            else:
                field.tell(consequence(self.state, field.key))
