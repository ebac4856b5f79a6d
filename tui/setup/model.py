"""What the wizard knows and has been told, outside the screen: hardware, model, plan, cluster, and the file they give.

Torch-free and textual-free, so that it is tested without a screen. Nothing here writes before `write`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distui.core.config import file as config_file
from distui.core.config.check import check
from distui.core.config.imports.carried import Carried
from distui.core.config.schema import Config, keys
from distui.core.config.settings import accepts, load, parse_text
from distui.core.errors import Problem, UserError
from distui.core.hardware.detect import Hardware, parse_hardware
from distui.core.plan.models import load_model
from distui.core.plan.planned import plan_of
from distui.core.plan.types import ModelSpec, Plan
from distui.tui.setup.failures import UnexpectedError, told_as
from distui.tui.setup.planning import PLANNER_KEYS, Choice, choices_for_model, choices_without_model, kept_choice
from distui.tui.setup.script_models import Models, is_script

ALWAYS_WRITTEN = {
    "cluster.nproc",
    "strategy.zero_stage",
    "precision.dtype",
    "activation_checkpointing.mode",
    "offload.optimizer",
}
"""Keys that a new file shows even where they equal the default, because they are the answers to the questions."""


@dataclass
class WizardState:
    """The answers so far, and what follows from them."""

    path: Path
    existing: str | None = None
    """The file's text when the wizard began; None where there was none."""
    base: Config = field(default_factory=Config)
    """The existing file's values, or the defaults."""
    stated: set[str] = field(default_factory=set)
    """The keys that the existing file sets."""
    hardware: Hardware | None = None
    hardware_text: str = ""
    """Empty is this machine."""
    model: ModelSpec | None = None
    """None is a model whose size is not known."""
    model_text: str = ""
    sequence_length: int | None = None
    """None is the model's own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """`section.key` -> value that was typed in: cluster and batch."""
    choice: Choice | None = None
    script: str = ""
    touched: bool = False
    """Whether something was chosen that quitting would lose."""
    imported: Carried | None = None
    """What another tool's file brought."""
    import_name: str = ""
    models: Models = field(default_factory=Models)
    calibrate: Callable[[Hardware, int, Callable[[str], bool]], Hardware] | None = None
    """Measures this machine with so many ranks, in processes of its own; None where nothing can."""
    measured: Hardware | None = None
    """This machine with what a calibration of this session has found."""
    failure: UserError | None = None
    """What nobody expected when the planner was last asked; its answer is then n/a, and the other choices stay."""
    brought: dict[str, Any] = field(default_factory=dict)
    """`section.key` -> value that the other tool's file sets, None where it clears ours."""

    @classmethod
    def open(cls, path: Path) -> WizardState:
        """Return the state that resumes the file at `path`, or a new one where there is none.

        Raises:
            ConfigError: the file holds what distui does not take; all problems at once.
            UserError: the path cannot be written, or the file not read.
        """
        config_file.check_writable(path)
        existing = config_file.read_text(path)
        if existing is None:
            return cls(path)
        resolved = load(path, {}, environ={})
        stated = {key for key, origin in resolved.origins.items() if origin != "default"}
        state = cls(path, existing, resolved.config, stated)
        state._resume()
        return state

    def _resume(self) -> None:
        """Take model and machine from the file; what is not there any more stays written, and nothing is planned."""
        run = self.base.run
        self.model_text = run.model
        if run.model and not is_script(run.model):
            try:
                self.model = load_model(run.model)
            except UserError:
                self.model = None
        if run.hardware:
            try:
                self.set_hardware(parse_hardware(run.hardware), run.hardware)
            except UserError:
                self.hardware_text = ""
        self.touched = False

    @property
    def is_this_machine(self) -> bool:
        """Whether the plan is for the machine that the wizard runs on."""
        return self.hardware is None or self.hardware.source == "detected"

    @property
    def world_size(self) -> int | None:
        """Ranks over all nodes; None while the hardware is not known and `nproc` is auto."""
        nproc = self.value("cluster.nproc")
        if nproc == "auto":
            if self.hardware is None:
                return None
            nproc = self.hardware.ranks_per_node
        return int(nproc) * int(self.value("cluster.nodes"))

    def set_hardware(self, hardware: Hardware, text: str = "") -> None:
        """Plan for `hardware` from now on; `text` is what was typed, empty for this machine."""
        if hardware == self.hardware and text == self.hardware_text:
            return
        if hardware.source == "named" or (self.hardware is not None and self.hardware.source == "named"):
            # The nodes of a name are part of it; back on this machine the file's number counts again.
            self.settings["cluster.nodes"] = hardware.nodes if hardware.source == "named" else self.base.cluster.nodes
        self.hardware, self.hardware_text, self.choice = hardware, text, None
        self.touched = self.touched or bool(text)

    def set_model(self, text: str) -> None:
        """Plan for the model that `text` names; empty is a model of unknown size.

        Raises:
            UserError: no such preset, file, count or function; the answer so far stays.
        """
        model = self.models.load(text) if text else None
        if text != self.model_text:
            self.choice, self.touched = None, True
        self.model, self.model_text = model, text

    def set_sequence_length(self, text: str) -> Problem | None:
        """Take the tokens of one sample, empty for the model's own; return what is wrong instead."""
        if not text.strip():
            self.sequence_length, self.choice = None, None
            return None
        try:
            length = int(text.replace("_", "").replace(",", ""))
        except ValueError:
            length = 0
        if length < 1:
            return Problem(
                "sequence length", f"{text!r} is no length", "it counts tokens", "write a whole number above 0"
            )
        self.sequence_length, self.choice, self.touched = length, None, True
        return None

    @property
    def shaped_model(self) -> ModelSpec | None:
        """The model with the sequence length that was asked for."""
        if self.model is None or self.sequence_length is None:
            return self.model
        return replace(self.model, sequence_length=self.sequence_length)

    def value(self, key: str) -> Any:
        """Return the present value of `section.key`: typed, or of the chosen plan, or of the file, or the default."""
        if self.settings.get(key) is not None:
            return self.settings[key]
        if self.choice is not None and key in self.choice.values:
            return self.choice.values[key]
        section, _, name = key.partition(".")
        return getattr(getattr(self.base, section), name)

    def asked(self, key: str) -> Any:
        """Return the value of `section.key` that was typed or that the file has; None leaves it to the planner."""
        if key in self.settings:
            return self.settings[key]
        section, _, name = key.partition(".")
        return getattr(getattr(self.base, section), name)

    def set_value(self, key: str, text: str) -> Problem | None:
        """Take `text` as the value of `section.key`; return what is wrong with it instead, leaving the former value."""
        fields = keys()
        value = parse_text(fields[key], text.strip())
        section, _, name = key.partition(".")
        try:
            Config.model_validate({section: {name: value}})
        except ValidationError:
            takes = accepts(fields[key])
            return Problem(
                key, f"{text.strip()!r} is not {takes}", f"{key} is: {fields[key].description}", f"type {takes}"
            )
        if value != self.asked(key):
            self.touched = True
            self.settings[key] = value
        return None

    def choices(self) -> list[Choice]:
        """Return the strategies to choose from, best first; one that keeps what the file says is marked as such.

        Raises:
            UserError: the hardware and the number of ranks do not go together.
        """
        assert self.hardware is not None, "hardware comes first"
        micro, size = self.asked("batch.micro_size"), self.asked("batch.global_size")
        world_size = self.world_size
        assert world_size is not None
        if size is None and micro is not None and (accumulation := self.asked("batch.accumulation")):
            size = micro * accumulation * world_size
        shaped, self.failure = self.shaped_model, None
        found = choices_without_model(world_size, self.base)
        if shaped is not None:
            nproc, nodes = self.value("cluster.nproc"), self.value("cluster.nodes")
            with self._planner():
                found = choices_for_model(
                    shaped,
                    replace(self.hardware, nodes=nodes),
                    None if nproc == "auto" else nproc,
                    micro,
                    size,
                    {key: self.asked(key) for key in PLANNER_KEYS if key in self.stated or key in self.settings},
                )
        kept = self.kept()
        if kept is not None and not any(choice.is_like(kept) for choice in found):
            found = [kept, *found]
        return found

    def kept(self) -> Choice | None:
        """Return the strategy that the imported or the existing file has; None where there is neither."""
        if self.existing is None and self.imported is None:
            return None
        kept = kept_choice(self.base, self.import_name or self.path.name)
        plan = self.predict(self.base)
        if plan is None:
            return kept
        return replace(kept, plan=plan, why=f"as {self.import_name or self.path.name} has it; {plan.why}")

    def predict(self, config: Config | None = None) -> Plan | None:
        """Return what is predicted of a configuration on the chosen machine; None where nothing can be.

        Without one it is that of the answers so far, and a batch that they leave open is assumed as the plan has it.
        """
        config = config or self._assumed()
        shaped, world_size = self.shaped_model, self.world_size
        if shaped is None or self.hardware is None or world_size is None:
            return None
        nodes = int(self.value("cluster.nodes"))
        # What does not go together, the check at Review and the fields say.
        with self._planner(), suppress(UserError):
            return plan_of(config, shaped, replace(self.hardware, nodes=nodes), world_size // nodes)
        return None

    def _assumed(self) -> Config:
        config, plan = self.config(), self.choice.plan if self.choice is not None else None
        batch = config.batch
        if plan is None or batch.micro_size is not None or batch.global_size is not None:
            return config
        sizes = {"micro_size": plan.micro_size, "accumulation": batch.accumulation or plan.accumulation}
        return config.model_copy(update={"batch": batch.model_copy(update=sizes)})

    @contextmanager
    def _planner(self) -> Iterator[None]:
        """Keep what goes wrong in the planner as the `failure`; what it says of the answers themselves is raised."""
        try:
            with told_as("the planner", "choose a ZeRO stage without a prediction, or go back and change the model"):
                yield
        except UnexpectedError as error:
            self.failure = error

    def choose(self, choice: Choice) -> None:
        """Take a strategy."""
        self.touched = self.touched or choice != self.choice
        self.choice = choice

    def _values(self) -> dict[str, Any]:
        """Return every `section.key` that the answers set; None takes a key out of the file."""
        found = self.brought | (dict(self.choice.values) if self.choice else {})
        # A cleared field leaves it to the plan; without a plan it takes the key out of the file.
        found |= {key: value for key, value in self.settings.items() if value is not None or key not in found}
        if found.get("batch.micro_size") and found.get("batch.global_size"):
            # Any two give the third; without accumulation the global batch stays when the number of ranks changes.
            found["batch.accumulation"] = None
        found["run.model"] = self.model_text
        found["run.hardware"] = self.hardware_text
        return found

    def config(self) -> Config:
        """Return the whole configuration that the file will give."""
        tables = self.base.model_dump()
        for key, value in self._values().items():
            section, _, name = key.partition(".")
            tables[section][name] = value
        return Config.model_validate(tables)

    def toml(self) -> str:
        """Return the file's text to be."""
        values = self._values()
        if self.existing is None:
            defaults = {key: field.get_default() for key, field in keys().items()}
            shown = {key: self.value(key) for key in ALWAYS_WRITTEN}
            values = {k: v for k, v in {**shown, **values}.items() if k in ALWAYS_WRITTEN or v != defaults[k]}
        return config_file.merge(self.existing, values)

    def diff(self) -> list[str]:
        """Return the unified diff from the existing file; empty where it stays as it is."""
        return config_file.diff(self.existing, self.toml(), self.path.name)

    def problems(self) -> list[Problem]:
        """Return everything that stands against running this configuration, each with a fix."""
        return check(self.config(), self.hardware, self.world_size)

    def launch_problem(self) -> Problem | None:
        """Return why `write and launch` cannot be done from here; None where it can."""
        if self.hardware is not None and not self.is_this_machine:
            return Problem("hardware", "planned for other hardware", self.hardware.name, "launch it on that machine")
        if not self.script.strip():
            return Problem("script", "no script is named", "there is nothing to launch yet", "type its path")
        if not Path(self.script).expanduser().is_file():
            place = "is a folder" if Path(self.script).is_dir() else "does not exist"
            return Problem("script", f"{self.script} {place}", f"looked in {os.getcwd()}", "type the path of a file")
        if problems := self.problems():
            return problems[0]
        return None

    def write(self) -> Path | None:
        """Write the file atomically and return where the former one is kept, if there was one.

        Raises:
            UserError: the file has changed meanwhile, or cannot be written.
        """
        if self.choice is None:
            raise UserError("nothing to write", "no strategy has been chosen", "choose one in step 3")
        return config_file.write(self.path, self.toml(), expected=self.existing)
