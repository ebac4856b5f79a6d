"""Step 3: the ranked strategies with memory against the limit and predicted speed, and why each one fits or not."""

from __future__ import annotations

import itertools
import re
from typing import ClassVar

from rich.console import Group, RenderableType
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Checkbox, DataTable, Input, Static
from textual.widgets.data_table import ColumnKey, RowKey

from distui.core.axes.sizes import AxisSizes
from distui.core.errors import Problem, UserError
from distui.core.hardware.detect import Hardware
from distui.tui.format import NA, num_bytes, si
from distui.tui.setup.dialogs import CalibrationScreen, rates_words
from distui.tui.setup.facts import grid, plan_rows
from distui.tui.setup.model import WizardState
from distui.tui.setup.planning import Choice, terms_of
from distui.tui.setup.step import Field, Step, pass_scroll
from distui.tui.setup.tune import TuneScreen
from distui.tui.setup.widgets import Filter, memory_bar
from distui.tui.widgets.layout import axes_in_use, picture

MAX_ROWS = 300
ROW_NUMBERS = itertools.count()
"""No row's key is used twice, so that a message about a former table is known as one."""
BAR_WIDTH = 8
NAME_WIDTH, WIDE_NAME_WIDTH = 34, 46
SHORTER = (
    (re.compile(r"optimizer on (\w+), parameters on \1"), r"all on \1"),
    (re.compile("checkpointing"), "ckpt"),
    (re.compile("optimizer on"), "optim."),
    (re.compile("parameters on"), "params"),
)
"""What may be shortened, one after the other, until a name fits into its column; the pane has the whole of it."""
BATCH_KEYS = {"micro": "batch.micro_size", "global": "batch.global_size"}


class StrategyStep(Step):
    """The table follows the batch fields and the filters; Enter takes the highlighted row."""

    TITLE = "Strategy"
    HELP = (
        "Every strategy with its predicted memory on one rank against what a rank has, and the predicted tokens/s of "
        "the whole job; n/a is what cannot be predicted. ✓ fits, ✗ does not, ? is not known, ○ is not in this version "
        "yet. Micro is the samples of one forward on one rank: more means faster and more activations. Global is the "
        "samples of one optimizer step: it changes the training itself. Empty leaves them to the script: nothing "
        "is written, and the prediction assumes what fits best. "
        "c changes the highlighted strategy field by field, with bytes and tokens/s of every value. "
        "k measures this machine's rates by a short run, for speeds that are n/a or assumed otherwise. "
        "m and g go to these fields, f and r switch the filters, [ and ] scroll the explanation."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "change", "Change"),
        Binding("k", "calibrate", "Calibrate"),
        Binding("m", "field('micro')", "Micro"),
        Binding("g", "field('global')", "Global"),
        Binding("f", "switch('fits-only')", "Fits"),
        Binding("r", "switch('runs-only')", "Runs"),
        Binding("left_square_bracket", "scroll(-3)", show=False),
        Binding("right_square_bracket", "scroll(3)", show=False),
    ]

    def __init__(self, state: WizardState) -> None:
        super().__init__(state)
        self._choices: list[Choice] = []
        """All, ranked."""
        self._shown: list[Choice] = []
        self._rows: dict[str, Choice] = {}
        """Those shown, by the keys of their rows."""
        self._own: Choice | None = None
        """What was changed by hand."""
        self._current: Choice | None = None
        """The highlighted row's."""
        self._only = {"fits-only": False, "runs-only": True}
        """The filters."""

    def compose(self) -> ComposeResult:
        """Yield the fields and filters, the table and the pane that says why."""
        with Horizontal(classes="line"):
            yield Static("Micro", classes="label tight")
            yield Field(placeholder="auto", id="micro", classes="short")
            yield Static("Global", classes="label tight second")
            yield Field(placeholder="auto", id="global", classes="short")
            yield Filter("fits", False, compact=True, id="fits-only")
            yield Filter("can run now", True, compact=True, id="runs-only")
        yield Static("", id="batch-line", classes="sentence", markup=False)
        with Horizontal(id="strategy-panes"):
            yield DataTable(id="plans", cursor_type="row", zebra_stripes=False)
            with VerticalScroll(id="why-pane", can_focus=False):
                yield Static("", id="why", markup=False)

    def on_mount(self) -> None:
        """Make the columns."""
        table: DataTable[RenderableType] = self.query_one("#plans", DataTable)
        table.add_column(" ", width=1)
        table.add_column("Strategy", width=NAME_WIDTH, key="name")
        table.add_column("Memory a rank", width=BAR_WIDTH + 18, key="memory")
        table.add_column("tokens/s", width=9)

    def enter(self) -> None:
        """Plan with the present answers, and highlight the chosen strategy or the best one."""
        for name, key in BATCH_KEYS.items():
            value = self.state.asked(key)
            self.fill(self.query_one(f"#{name}", Input), "" if value is None else str(value))
        self._plan()
        self.query_one("#plans", DataTable).focus()

    def _plan(self, wanted: Choice | None = None) -> None:
        """Rank anew, keeping the wanted or the highlighted strategy where it is still there."""
        former = wanted or self._current or self.state.choice
        try:
            self._choices = self.state.choices()
            if self.state.failure is not None:
                self.tell(self.state.failure)
        except UserError as error:
            self._choices = []
            self.tell(error)
        own = self._own
        if own is not None and not any(choice.is_like(own) for choice in self._choices):
            self._choices.insert(0, own)
        self._filter(former)

    def _filter(self, former: Choice | None) -> None:
        fits, runs = self._only["fits-only"], self._only["runs-only"]
        found = [
            choice
            for choice in self._choices
            if (choice.fits is not False or not fits) and (choice.available or choice.is_kept or not runs)
        ]
        self._shown = found[:MAX_ROWS]
        table: DataTable[RenderableType] = self.query_one("#plans", DataTable)
        table.clear()
        width = WIDE_NAME_WIDTH if self.screen.has_class("-wide") else NAME_WIDTH
        table.columns[ColumnKey("name")].width = width
        self._rows = {str(next(ROW_NUMBERS)): choice for choice in self._shown}
        for key, choice in self._rows.items():
            table.add_row(*_cells(choice, width), key=key)
        best = self._best(former)
        self._current = self._shown[best] if self._shown else None
        table.move_cursor(row=best)
        self._explain()

    def _best(self, former: Choice | None) -> int:
        """Return the row of `former`, else of what the file says, else of the first that runs and fits."""
        for wanted in (former, self.state.kept()):
            for row, choice in enumerate(self._shown):
                if wanted is not None and choice.is_like(wanted):
                    return row
        for row, choice in enumerate(self._shown):
            if choice.available and choice.fits is not False:
                return row
        return 0

    def _row_of(self, key: RowKey | None) -> Choice | None:
        # An emptied table highlights no row.
        return self._rows.get(key.value or "") if key is not None else None

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Say why; a row of an earlier table is none any more."""
        event.stop()
        if (choice := self._row_of(event.row_key)) is not None:
            self._current = choice
            self._explain()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Take Enter in the table as `next`."""
        event.stop()
        if (choice := self._row_of(event.row_key)) is not None:
            self._current = choice
            self.finish()

    def on_checkbox_changed(self, event: Checkbox.Changed) -> None:
        """Apply the filters."""
        event.stop()
        self._only[event.checkbox.id or ""] = event.value
        self._filter(self._current)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Plan again with the typed batch sizes; say at once what is wrong with them."""
        problem = self.state.set_value(BATCH_KEYS[self.heard(event)], event.value)
        self.tell(problem)
        if problem is None:
            self._plan()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter in a batch field goes back to the table."""
        event.stop()
        event.prevent_default()  # Textual also calls the base class's handler, which would turn the page
        self.query_one("#plans", DataTable).focus()

    def on_resize(self, event: events.Resize) -> None:
        """Fold the explanation to the new width, and give the names what room there is."""
        self._filter(self._current)

    def _explain(self) -> None:
        choice = self._current
        pane, line = self.query_one("#why", Static), self.query_one("#batch-line", Static)
        if choice is None:
            pane.update(
                f"None of the {len(self._choices)} strategies passes the filters; "
                "f shows those that do not fit, r those of later versions."
            )
            line.update("")
            return
        line.update(_batch_words(choice, self.state))
        title = Text(choice.name, style="bold")
        why = Text(choice.why)
        if words := self._rates():
            why.append(f"\n{words}")
        if choice.plan is None:
            pane.update(Group(title, why, *self._picture(choice)))
            return
        terms = terms_of(choice, self.state.shaped_model, self.state.hardware)
        pane.update(Group(title, why, *self._picture(choice), grid(plan_rows(choice.plan, terms), 19)))

    def _picture(self, choice: Choice) -> list[Text]:
        """Return the ranks by axis, as a picture."""
        world_size = self.state.world_size
        names = ("pipeline_parallel", "context_parallel", "tensor_parallel")
        pp, cp, tp = (int(choice.values.get(f"strategy.{name}", 1)) for name in names)
        if world_size is None or world_size % (pp * cp * tp):
            return []
        sizes = AxisSizes(pp, world_size // (pp * cp * tp), cp, tp)
        width = max(20, self.query_one("#why-pane").size.width - 2)
        lines = picture(sizes, width, 10, self._ranks_here() or 0)
        words = " x ".join(f"{axis} {getattr(sizes, axis)}" for axis in axes_in_use(sizes))
        return (
            [Text(f"\n{world_size} ranks: {words}", style="bold"), Text("\n".join([*lines, ""]), no_wrap=True)]
            if lines
            else []
        )

    def _ranks_here(self) -> int | None:
        world_size = self.state.world_size
        return None if world_size is None else world_size // int(self.state.value("cluster.nodes"))

    def _rates(self) -> str:
        hardware, num_ranks = self.state.hardware, self._ranks_here()
        if hardware is None or num_ranks is None:
            return ""
        return rates_words(hardware, num_ranks, self.state.calibrate is not None)

    def action_calibrate(self) -> None:
        """Measure this machine's rates."""
        run, hardware, num_ranks = self.state.calibrate, self.state.hardware, self._ranks_here()
        if self.app.screen is not self.screen or hardware is None or num_ranks is None:
            return
        if run is None:
            words = "nothing was given that runs ranks", "start the wizard by distui setup"
        elif not self.state.is_this_machine:
            words = f"{hardware.name} is planned for by its name", "distui plan --calibrate on that machine"
        else:
            self.app.push_screen(CalibrationScreen(run, hardware, num_ranks), self._take_rates)
            return
        self.tell(Problem("hardware", "only this machine can be measured", *words))

    def _take_rates(self, result: Hardware | UserError | None) -> None:
        """Plan anew with what was measured; say why nothing was."""
        if isinstance(result, UserError):
            self.tell(result)
        elif result is not None:
            kept = self._current
            self.state.measured = result
            self.state.set_hardware(result)
            self.tell(None)
            self._plan(kept)

    def complete(self) -> bool:
        """Take the highlighted strategy, if this version can run it and the batch fields are right."""
        for name, key in BATCH_KEYS.items():
            if problem := self.state.set_value(key, self.typed[name]):
                self.tell(problem)
                return False
        choice = self._current
        if choice is None:
            self.tell(
                Problem("strategy", "no strategy is shown", "the filters leave none", "press f or r to show more")
            )
            return False
        if not choice.available:
            self.tell(
                Problem(
                    "strategy", f"{choice.name} cannot run yet", choice.why, "take one without ○; r hides the others"
                )
            )
            return False
        self.state.choose(choice)
        return True

    def action_field(self, name: str) -> None:
        """Go to a batch field."""
        self.query_one(f"#{name}", Input).focus()

    def action_change(self) -> None:
        """Change the highlighted strategy field by field."""
        if (choice := self._current) is not None and self.app.screen is self.screen:
            self.app.push_screen(TuneScreen(self.state, choice), self._take_own)

    def _take_own(self, choice: Choice | None) -> None:
        """Take what was changed by hand, and plan the others with the same batch and precision."""
        if choice is None:
            return
        self._own = choice
        for name, key in BATCH_KEYS.items():
            if key not in choice.values:
                continue
            value = choice.values[key]
            self.state.set_value(key, "" if value is None else str(value))
            self.fill(self.query_one(f"#{name}", Input), "" if value is None else str(value))
        self.state.set_value("precision.dtype", choice.values["precision.dtype"])
        self._plan(choice)

    def action_switch(self, name: str) -> None:
        """Switch a filter."""
        self.query_one(f"#{name}", Checkbox).toggle()

    def action_scroll(self, lines: int) -> None:
        """Scroll the explanation while the table has the focus."""
        pass_scroll(self.query_one("#why-pane"), lines)


def fitted(name: str, width: int) -> str:
    """Return the strategy's name, no more shortened than the width demands."""
    for pattern, shorter in SHORTER:
        if len(name) <= width:
            break
        name = pattern.sub(shorter, name)
    return name


def _cells(choice: Choice, width: int) -> tuple[Text, Text, Text, Text]:
    mark = "○" if not choice.available else {True: "✓", False: "✗", None: "?"}[choice.fits]
    name = Text(
        fitted(choice.name, width), no_wrap=True, overflow="ellipsis", style="dim" if not choice.available else ""
    )
    plan = choice.plan
    used, limit = (plan.memory_per_rank_bytes, plan.memory_limit_bytes) if plan else (None, None)
    speed = Text(si(plan.tokens_per_s) if plan else NA, justify="right")
    return Text(mark, style="bold"), name, memory_bar(used, limit, BAR_WIDTH), speed


def _batch_words(choice: Choice, state: WizardState) -> str:
    """Return what the batch sizes lead to, with bytes and tokens/s."""
    plan = choice.plan
    if plan is None:
        micro, size = state.asked("batch.micro_size"), state.asked("batch.global_size")
        return f"Micro-batch {micro or 'as the script has it'}, global batch {size or 'as it follows from that'}."
    batch = f"{plan.global_size} = {plan.micro_size} x {plan.accumulation} x {plan.data_parallel} ranks"
    if state.asked("batch.micro_size") is None and state.asked("batch.global_size") is None:
        batch = f"as the script has it; with {batch}"
    activations = num_bytes(plan.memory.get("activations"))
    return f"Batch {batch}: activations {activations} a rank, {si(plan.tokens_per_s, 'tokens/s')}."
