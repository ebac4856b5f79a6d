"""Acting on the job: a menu of the verbs, and what each rank answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from distui.core.errors import DaemonUnavailable
from distui.proto import telemetry_pb2 as pb
from distui.tui.format import ranks
from distui.tui.widgets.log import LogView

PROFILE_STEPS = 5


@dataclass(frozen=True)
class Verb:
    """Something a job can be asked to do."""

    key: str
    title: str
    what: str
    verb: str
    arguments: tuple[tuple[str, str], ...] = ()


VERBS = (
    Verb("c", "Checkpoint", "save, at a step agreed on", "checkpoint"),
    Verb("s", "Stacks", "where each rank is; hung ones too", "stacks"),
    Verb(
        "p",
        f"Profile {PROFILE_STEPS} steps",
        "a trace a rank, for Perfetto",
        "profile",
        (("steps", str(PROFILE_STEPS)),),
    ),
    Verb("d", "Log level debug", "of every rank, from now on", "log-level", (("level", "debug"),)),
    Verb("i", "Log level info", "of every rank, from now on", "log-level", (("level", "info"),)),
    Verb("w", "Log level warning", "of every rank, from now on", "log-level", (("level", "warning"),)),
    Verb("x", "Stop the job", "at a step agreed on; asks first", "stop"),
)

Execute = Callable[[Verb], AsyncIterator[pb.ControlReply]]


class ControlScreen(ModalScreen[Verb]):
    """The menu; gives the verb that was chosen. Where nothing can be asked, it says why."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "leave", "Back", key_display="esc"),
        *(Binding(verb.key, f"choose({number})", verb.title, show=False) for number, verb in enumerate(VERBS)),
    ]

    def __init__(self, refusal: str = "") -> None:
        """Offer the verbs, or tell the `refusal`."""
        super().__init__()
        self._refusal = refusal

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Vertical(classes="question") as box:
            box.border_title = "act on the job"
            box.border_subtitle = "esc goes back"
            if self._refusal:
                yield Static(f"Nothing can be asked: {self._refusal}.", markup=False)
                return
            size = max(len(verb.title) for verb in VERBS)
            yield OptionList(
                *(Option(f"{verb.key}  {verb.title.ljust(size)}  [dim]{verb.what}[/dim]") for verb in VERBS)
            )

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Give the verb of the line."""
        self.dismiss(VERBS[event.option_index])

    def action_choose(self, number: int) -> None:
        """Give the verb of the key."""
        if not self._refusal:
            self.dismiss(VERBS[number])

    def action_leave(self) -> None:
        """Ask nothing."""
        self.dismiss(None)


class RepliesScreen(ModalScreen[None]):
    """What the ranks answer, as it comes. Leaving it takes nothing back."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "leave", "Back", key_display="esc")]

    def __init__(self, verb: Verb, execute: Execute) -> None:
        super().__init__()
        self._verb, self._execute = verb, execute
        self._done: list[int] = []
        self._failed: list[int] = []

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Vertical(id="replies") as box:
            box.border_title = f"{self._verb.title.lower()}: asked"
            box.border_subtitle = "esc closes; the command goes on"
            yield LogView(empty="waiting for the ranks", id="replies-log")

    def on_mount(self) -> None:
        """Ask."""
        log = self.query_one(LogView)
        log.focus()
        log.following = False
        self.run_worker(self._ask(log), group="control")

    async def _ask(self, log: LogView) -> None:
        try:
            async for reply in self._execute(self._verb):
                self._hear(log, reply)
            self._tell("all answered" if not self._failed else "")
        except DaemonUnavailable as error:
            log.append(f"error: {error}\n".encode())
            self._tell("refused")

    def _hear(self, log: LogView, reply: pb.ControlReply) -> None:
        who = f"rank {reply.rank}" if reply.rank >= 0 else "daemon"
        log.append(f"{who}: {reply.state}{f': {reply.message}' if reply.message else ''}\n".encode())
        for text in reply.payload.decode(errors="replace").splitlines():
            log.append(f"    {text}\n".encode())
        if reply.state in ("done", "error"):
            (self._done if reply.state == "done" else self._failed).append(reply.rank)
        self._tell("")

    def _tell(self, ending: str) -> None:
        words = [f"{len(self._done)} done"] * bool(self._done)
        words += [f"{ranks(sorted(self._failed))} could not"] * bool(self._failed) + [ending] * bool(ending)
        self.query_one("#replies").border_title = f"{self._verb.title.lower()}: {', '.join(words) or 'asked'}"

    def action_leave(self) -> None:
        """Close."""
        self.dismiss(None)
