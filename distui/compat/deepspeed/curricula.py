"""What of a DeepSpeed engine goes by difficulty: curricula by sequence length, and layers that see fewer tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from distui.compat.deepspeed.configuration import DeepSpeedConfig
from distui.compat.deepspeed.runtime.data_pipeline import data_routing
from distui.compat.deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
from distui.compat.not_offered import NotOffered


class Curricula:
    """The part of `DeepSpeedEngine` with the JSON's `curriculum_learning` and `data_efficiency` sections."""

    settings: DeepSpeedConfig
    module: nn.Module
    global_steps: int
    curriculum_scheduler_legacy: CurriculumScheduler | None
    random_ltd_scheduler: data_routing.RandomLTDScheduler | None

    def curriculum_enabled_legacy(self) -> bool:
        """Return whether a curriculum tells how long sequences may be."""
        return self.settings.enabled("curriculum_learning")

    def curriculum_params_legacy(self) -> dict[str, Any]:
        """Return the section `curriculum_learning`."""
        return {key: value for key, value in self.settings.section("curriculum_learning").items() if key != "enabled"}

    def data_efficiency_enabled(self) -> bool:
        """Return whether the section `data_efficiency` is enabled."""
        return self.settings.enabled("data_efficiency")

    def data_sampling_enabled(self) -> bool:
        """Return False: sampling by analysed metrics is refused."""
        return False

    curriculum_learning_enabled = data_sampling_enabled

    def random_ltd_enabled(self) -> bool:
        """Return whether layers are to drop tokens."""
        return self.settings.enabled(data_routing.SECTION)

    def random_ltd_config(self) -> dict[str, Any]:
        """Return the section `random_ltd`, with the batch sizes."""
        return self.settings.random_ltd()

    def random_ltd_initialize(self) -> None:
        """Make the layers that `convert_to_random_ltd` marked drop tokens. Raises: ConfigError, AssertionError."""
        if self.random_ltd_scheduler is None:
            raise AssertionError(f"{data_routing.SECTION}.enabled is not true")
        data_routing.attach(self.module, self.random_ltd_scheduler, self.random_ltd_config())

    def _begin_curricula(self) -> None:
        self.curriculum_scheduler_legacy, self.random_ltd_scheduler = schedulers(self.settings)

    def _advance_curricula(self) -> dict[str, Any]:
        """Go to the coming step; returns what the model is given beside its batch."""
        if self.random_ltd_scheduler is not None:
            self.random_ltd_scheduler.update_seq(self.global_steps)
        if self.curriculum_scheduler_legacy is None:
            return {}
        difficulty = self.curriculum_scheduler_legacy.update_difficulty(self.global_steps + 1)
        by_length = self.settings.get("curriculum_learning.curriculum_type") == "seqlen"
        return {"curriculum_seqlen": difficulty} if by_length else {}


def schedulers(
    settings: DeepSpeedConfig, is_row: bool = False
) -> tuple[CurriculumScheduler | None, data_routing.RandomLTDScheduler | None]:
    """Return what tells the difficulty of each step, and how many tokens layers see; None for what is not enabled.

    Raises: ConfigError with what is missing or wrong; NotOffered for layers of a `PipelineModule` (`is_row`).
    """
    curriculum = tokens = None
    if settings.enabled("curriculum_learning"):
        if settings.get("curriculum_learning.curriculum_type") is None:
            raise data_routing.missing("curriculum_learning.curriculum_type", "DeepSpeed has seqlen")
        curriculum = CurriculumScheduler(settings.section("curriculum_learning"))
    if settings.enabled(data_routing.SECTION):
        if is_row:
            raise NotOffered(
                "random-LTD in a PipelineModule is not offered by distui",
                "a stage does not know what the first one drew",
                f"take {data_routing.SECTION} out of the JSON",
            )
        tokens = data_routing.RandomLTDScheduler(settings.random_ltd())
    return curriculum, tokens
