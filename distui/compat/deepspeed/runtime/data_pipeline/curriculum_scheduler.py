"""`CurriculumScheduler`: the difficulty of each step, by DeepSpeed's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from distui.core.errors import ConfigError, Problem

_NEEDS = {
    "fixed_discrete": ("difficulty", "max_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "custom": (),
}


def rooted(step: int, total: int, degree: float, least: int, most: int, multiple: int) -> int:
    """Return what grows from `least` to `most` by the root of `step / total`, cut to a multiple."""
    grown = math.floor((step / total) ** (1.0 / degree) * (most - least) + least)
    return min(grown - grown % multiple, most)


class CurriculumScheduler:
    """Says how difficult a step's samples may be, from the first to the last difficulty."""

    def __init__(self, config: Mapping[str, Any], section: str = "curriculum_learning") -> None:
        """`section` is where in the JSON the configuration stands. Raises: ConfigError for what is missing or wrong."""
        kind = config.get("schedule_type")
        missing = [key for key in ("min_difficulty", "max_difficulty", "schedule_type") if key not in config]
        details = config.get("schedule_config") or {}
        missing += [f"schedule_config.{key}" for key in _NEEDS.get(str(kind), ()) if key not in details]
        problems = [
            Problem(f"{section}.{key}", "is missing", "the schedule follows from it", f"set {key}") for key in missing
        ]
        if kind is not None and kind not in _NEEDS:
            known = ", ".join(_NEEDS)
            problems.append(Problem(f"{section}.schedule_type", f"{kind!r} is unknown", f"known: {known}", "write one"))
        if kind == "fixed_discrete" and not missing and len(details["difficulty"]) != len(details["max_step"]) + 1:
            counts = f"{len(details['difficulty'])} difficulties, {len(details['max_step'])} last steps"
            why = "the last difficulty has no end, so there is one more of them"
            problems.append(Problem(f"{section}.schedule_config", counts, why, "give one last step fewer"))
        if problems:
            raise ConfigError(problems)
        self.state: dict[str, Any] = {
            "min_difficulty": config["min_difficulty"],
            "max_difficulty": config["max_difficulty"],
            "current_difficulty": config["min_difficulty"],
            "schedule_type": kind,
            "schedule_config": details,
        }
        self.first_step = True
        self.custom_get_difficulty: Callable[[int], int] | None = None

    def get_current_difficulty(self) -> int:
        """Return the difficulty of the step that was asked for last."""
        return int(self.state["current_difficulty"])

    def set_current_difficulty(self, difficulty: int) -> None:
        """Go on from a difficulty."""
        self.state["current_difficulty"] = difficulty

    def set_custom_get_difficulty(self, schedule_function: Callable[[int], int]) -> None:
        """Give the function of the schedule type `custom`: the step's number to its difficulty."""
        self.custom_get_difficulty = schedule_function

    def get_state(self) -> dict[str, Any]:
        """Return the schedule and where it is."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with what `get_state` returned."""
        self.state = state

    def get_difficulty(self, global_steps: int) -> int:
        """Return the difficulty of a step; the first is step 1."""
        kind, details = self.state["schedule_type"], self.state["schedule_config"]
        if kind == "custom":
            if self.custom_get_difficulty is None:
                key = "curriculum_learning.schedule_type"
                fix = "call set_custom_get_difficulty of engine.curriculum_scheduler_legacy with a function of the step"
                raise ConfigError([Problem(key, "custom without a function", "it gives each step's difficulty", fix)])
            return self.custom_get_difficulty(global_steps)
        if kind == "fixed_discrete":
            passed = sum(global_steps > last for last in details["max_step"])
            return int(details["difficulty"][passed])
        degree = details["root_degree"] if kind == "fixed_root" else 1
        least, most = self.state["min_difficulty"], self.state["max_difficulty"]
        return rooted(global_steps, details["total_curriculum_step"], degree, least, most, details["difficulty_step"])

    def update_difficulty(self, global_steps: int) -> int:
        """Go to a step, and return its difficulty; the last one stays."""
        if self.state["current_difficulty"] < self.state["max_difficulty"]:
            self.state["current_difficulty"] = self.get_difficulty(global_steps)
        return self.get_current_difficulty()
