"""The part of `Accelerator` that keeps: saved states, weights, and what trackers are told."""

from __future__ import annotations

import os
import re
import shutil
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from distui.compat.accelerate.state import AcceleratorState
from distui.compat.accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, is_tracker
from distui.compat.accelerate.utils.dataclasses import ProjectConfiguration
from distui.core.checkpoint.folder import MANIFEST, find, read_manifest
from distui.core.engine.engine import Engine
from distui.core.errors import UserError
from distui.core.ranks import ops

Hook = Callable[..., None]


def _number(folder: Path) -> int:
    digits = re.findall(r"\d+", folder.name)
    return int(digits[-1]) if digits else -1


class _Kept:
    """What Accelerate keeps of an Accelerator itself."""

    def __init__(self, accelerator: Saving) -> None:
        self._accelerator = weakref.proxy(accelerator)

    def state_dict(self) -> dict[str, int]:
        """Return the count of micro-batches."""
        return {"step": int(self._accelerator.step)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting."""
        self._accelerator.step = int(state["step"])


class Saving:
    """Saves and loads states; starts and feeds trackers."""

    engine: Engine
    state: AcceleratorState
    project_configuration: ProjectConfiguration
    log_with: list[Any]
    step: int

    def __init__(self) -> None:
        self.trackers: list[GeneralTracker] = []
        self._models: list[nn.Module] = []
        self._custom_objects: list[Any] = []
        self._save_model_state_pre_hook: OrderedDict[int, Hook] = OrderedDict()
        self._load_model_state_pre_hook: OrderedDict[int, Hook] = OrderedDict()

    @property
    def project_dir(self) -> Any:
        """The project's folder."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> Any:
        """Where trackers write."""
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """The number of the next saved state."""
        return self.project_configuration.iteration

    # ---- states -----------------------------------------------------------------------------------------------

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load `objects` with the rest. Raises ValueError for what has no state_dict."""
        lacking = [
            value for value in objects if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict"))
        ]
        if lacking:
            raise ValueError(
                "All `objects` must include a `state_dict` and `load_state_dict` function to be stored. "
                "The following inputs are invalid:"
                + "".join(f"\n\t- Item at index {place}, `{value}`" for place, value in enumerate(lacking))
            )
        self.engine.register_for_checkpointing(*objects)
        self._custom_objects += objects

    def register_save_state_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Call `hook(models, weights, output_dir)` before each save; weights that it takes out are not saved."""
        handle = RemovableHandle(self._save_model_state_pre_hook)
        self._save_model_state_pre_hook[handle.id] = hook
        return handle

    def register_load_state_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Call `hook(models, input_dir)` before each load; models that it takes out get no weights from it."""
        handle = RemovableHandle(self._load_model_state_pre_hook)
        self._load_model_state_pre_hook[handle.id] = hook
        return handle

    def _automatic(self) -> Path:
        if self.project_dir is None:
            raise ValueError("automatic_checkpoint_naming needs a project_dir")
        return Path(self.project_dir) / "checkpoints"

    def _numbered(self) -> list[Path]:
        """Return the automatically named folders, the oldest first; others beside them are nobody's here."""
        folder = self._automatic()
        found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"checkpoint_\d+", path.name)]
        return sorted(found, key=_number)

    def save_state(
        self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True, **kwargs: Any
    ) -> str:
        """Save everything that was prepared and registered, as distui's checkpoint. Collective.

        Any stage and any number of ranks can load it; `distui checkpoint` looks into it. Other files there stay.
        In the middle of an accumulated step its gradients are not saved, as with Accelerate; an event says so.
        """
        settings = self.project_configuration
        if settings.automatic_checkpoint_naming:
            folder = self._automatic()
            output_dir = folder / f"checkpoint_{self.save_iteration}"
            exists = output_dir.exists()
            self.engine.wait_for_everyone()  # before rank 0 makes it
            if exists:
                raise ValueError(
                    f"Checkpoint directory {output_dir} ({self.save_iteration}) already exists. Please manually "
                    "override `self.save_iteration` with what iteration to start with."
                )
            if settings.total_limit is not None and self.engine.is_main_process and folder.is_dir():
                kept = self._numbered()
                for path in kept[: max(0, len(kept) + 1 - settings.total_limit)]:
                    shutil.rmtree(path)
        # Ranks may name folders of their own (a temporary one each): rank 0's counts.
        output_dir = ops.broadcast_object(output_dir)
        if output_dir is None:
            raise ValueError("save_state needs an output_dir, or automatic_checkpoint_naming")
        without: frozenset[int] = frozenset()
        if self._save_model_state_pre_hook:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            all_weights = [self.get_state_dict(model, unwrap=False) for model in self._models]
            weights = list(all_weights)
            for hook in self._save_model_state_pre_hook.values():
                hook(self._models, weights, str(output_dir))
            taken = [
                model
                for model, own in zip(self._models, all_weights, strict=True)
                if not any(own is left for left in weights)
            ]
            without = self._numbers_of(taken)
        self.engine._save_now(str(output_dir), False, loses=True, without=without)
        settings.iteration += 1
        return str(output_dir)

    def _numbers_of(self, models: list[nn.Module]) -> frozenset[int]:
        engine_models = self.engine._models
        return frozenset(index for index, known in enumerate(engine_models) if any(known is model for model in models))

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Load what `save_state` wrote; without a folder the newest of the automatically named. Collective.

        `strict=False` takes what fits; Accelerate's other arguments are of its files, and none matters here.
        """
        if input_dir is None:
            if not self.project_configuration.automatic_checkpoint_naming:
                raise ValueError("Either pass in an input_dir or use automatic_checkpoint_naming")
            input_dir = self._numbered()[-1]
        source = Path(ops.broadcast_object(input_dir)).expanduser()
        if not source.is_dir():
            raise ValueError(f"Tried to find {source} but folder does not exist")
        if not (source / MANIFEST).exists() and (source / "random_states_0.pkl").exists():
            raise UserError(
                f"{source} was saved by Accelerate",
                "its optimizer states are laid out for its own engines",
                "load the weights (model.safetensors) into the model before prepare(), and go on from there",
            )
        models = list(self._models)
        for hook in self._load_model_state_pre_hook.values():
            hook(models, str(source))
        self._compare_registered(source)
        self.engine.saver.load(
            self.engine, str(source), strict=bool(kwargs.get("strict", True)), models=self._numbers_of(models)
        )

    def _compare_registered(self, source: Path) -> None:
        saved = read_manifest(find(source.absolute())).get("registered", len(self._custom_objects))
        if saved != len(self._custom_objects):
            raise RuntimeError(
                f"Number of custom checkpoints in folder {source} does not match the number of registered objects:"
                f"\n\tFound checkpoints: {saved}\n\tRegistered objects: {len(self._custom_objects)}\n"
                "Please make sure to only load checkpoints from folders that were created with the same set of "
                "registered objects."
            )

    def _prepared(self, model: nn.Module) -> nn.Module | None:
        """Return what the engine holds of `model`, compiled or not; None where it was not prepared."""
        own = getattr(model, "_orig_mod", model)
        return next((known for known in self.engine._models if known is model or known is own), None)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Return the model's whole state, of a prepared one on the CPU. Collective where it is prepared."""
        prepared = self._prepared(model)
        return dict(model.state_dict()) if prepared is None else self.engine.get_state_dict(prepared)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights: safetensors, or with `safe_serialization=False` pytorch_model.bin. Collective."""
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        model = self._prepared(model) or model
        if any(param.device.type == "meta" for param in model.parameters()):
            raise RuntimeError("You can't save the model since some parameters are on the meta device.")
        if safe_serialization:
            self.engine.save_model(model, str(save_directory), max_shard_size)
            return
        weights = self.get_state_dict(model)
        if self.engine.is_main_process:
            import torch

            Path(save_directory).mkdir(parents=True, exist_ok=True)
            torch.save(weights, Path(save_directory) / "pytorch_model.bin")
        self.engine.wait_for_everyone()

    # ---- trackers ---------------------------------------------------------------------------------------------

    def init_trackers(
        self,
        project_name: str,
        config: dict[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Start the trackers of `log_with`; the dashboard is told in any case."""
        for entry in self.log_with:
            if is_tracker(entry):
                tracker = entry
            elif self.engine.is_main_process:
                kind: Any = LOGGER_TYPE_TO_CLASS[entry]
                options = dict((init_kwargs or {}).get(entry, {}))
                # Second, and by place: a script's own class may name it otherwise.
                place = (self.logging_dir,) if kind.requires_logging_directory else ()
                tracker = kind(project_name, *place, **options)
            else:
                continue
            if not tracker.main_process_only or self.engine.is_main_process:
                tracker.start()
                self.trackers.append(tracker)
        if config is not None:
            for tracker in self.trackers:
                tracker.store_init_configuration(config)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Return a tracker by name, or with `unwrap` what it writes with; on other ranks one that does nothing."""
        for tracker in self.trackers:
            if tracker.name == name:
                return tracker.tracker if unwrap else tracker  # type: ignore[attr-defined]
        if not self.engine.is_main_process:
            return GeneralTracker(_blank=True)
        raise ValueError(f"{name} is not an available tracker stored inside the `Accelerator`.")

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Tell the trackers `values`, and the dashboard those that are numbers."""
        numbers: dict[str, float] = {}
        for key, value in values.items():
            if getattr(value, "numel", lambda: 1)() == 1 and not isinstance(value, (str, Mapping, list, tuple)):
                numbers[key] = float(value)
        if numbers:
            at = self.engine.clock.step if step is None else step
            self.engine.telemetry.metrics(at, numbers)
        for tracker in self.trackers:
            tracker.log(dict(values), step=step, **(log_kwargs or {}).get(tracker.name, {}))

    def end_training(self) -> None:
        """Finish saves and trackers, and leave the process group. Collective, last."""
        trackers, self.trackers = self.trackers, []
        for tracker in trackers:
            tracker.finish()
        self.engine.end_training()
        self.state.destroy_process_group()
