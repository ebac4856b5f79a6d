"""Models by preset, config.json or count, and a script's own, which is built once by whoever may run scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from distui.core.errors import UserError
from distui.core.plan.models import load_model
from distui.core.plan.types import ModelSpec
from distui.tui.setup.failures import told_as


def is_script(text: str) -> bool:
    """Return whether `text` names a function of a script, as `train.py:build_model`."""
    file, separator, function = text.rpartition(":")
    return bool(separator) and file.endswith(".py") and function.isidentifier()


@dataclass
class Models:
    """Loads what a name means; remembers what was built."""

    build_script: Callable[[str], ModelSpec] | None = None
    """Builds the model of `FILE.py:FUNCTION` in a process of its own; None where nothing can."""
    _built: dict[str, ModelSpec] = field(default_factory=dict)

    def load(self, text: str) -> ModelSpec:
        """Return the model that `text` names; a script's is built once, which takes seconds.

        Raises:
            UserError: no such preset, file, count or function.
        """
        with told_as(f"reading the model {text!r}", "name the model by a preset or a size, such as 7B"):
            return self._load(text)

    def _load(self, text: str) -> ModelSpec:
        if not is_script(text):
            return load_model(text)
        if text not in self._built:
            if self.build_script is None:
                raise UserError(
                    f"{text} cannot be built here", "nothing was given that runs scripts", "start it by distui setup"
                )
            self._built[text] = self.build_script(text)
        return self._built[text]

    def is_loaded(self, text: str) -> bool:
        """Return whether `load` answers at once."""
        return not is_script(text) or text in self._built
