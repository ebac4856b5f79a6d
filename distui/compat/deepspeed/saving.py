"""Checkpoints of a DeepSpeed engine: distui's own, for any stage and number of ranks; DeepSpeed's are read."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distui.core.checkpoint.folder import MANIFEST
from distui.core.checkpoint.formats import deepspeed_files
from distui.core.engine.engine import Engine
from distui.core.errors import UserError
from distui.core.paths import write_atomic
from distui.core.ranks import ops
from distui.core.ranks.precision import DTYPES

if TYPE_CHECKING:
    from torch import nn

    from distui.compat.deepspeed.configuration import DeepSpeedConfig
    from distui.core.sharding.optim.prepared import PreparedOptimizer


LATEST = "latest"
TAG_VALIDATIONS = ["WARN", "IGNORE", "FAIL"]


def _plain(value: Any, what: str) -> Any:
    """Return a state, also out of the bytes in a tensor in which checkpoints kept it before format 2."""
    if not isinstance(value, torch.Tensor):
        return value
    try:
        return torch.load(io.BytesIO(value.numpy().tobytes()), weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the {what} in the checkpoint is a pickle of more than plain data, and reading it could run code",
            str(error).splitlines()[0],
            "if you trust who wrote it, load inside `with torch.serialization.safe_globals([TheClass]):`",
        ) from error


class Progress:
    """What a checkpoint keeps beside weights and optimizer: counters, the schedule and the script's own state."""

    def __init__(self, engine: Saving) -> None:
        self._engine = engine
        self.client_state: dict[str, Any] = {}
        self.loads_schedule = True
        self.loads_counters = True

    def state_dict(self) -> dict[str, Any]:
        """Return all of it."""
        engine = self._engine
        schedule = engine.lr_scheduler
        return {
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "micro_steps": engine.micro_steps,
            "skipped_steps": engine.skipped_steps,
            "lr_scheduler": schedule.state_dict() if schedule is not None else None,
            "client_state": self.client_state,
            "random_ltd": engine.random_ltd_scheduler.state_dict() if engine.random_ltd_scheduler else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        engine = self._engine
        self.client_state = _plain(state["client_state"], "client_state")
        if self.loads_counters:
            for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps"):
                setattr(engine, name, int(state[name]))
            if engine.random_ltd_scheduler is not None and state.get("random_ltd"):
                engine.random_ltd_scheduler.load_state_dict(state["random_ltd"])
        saved = _plain(state["lr_scheduler"], "schedule")
        if self.loads_schedule and saved is not None and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(saved)


class Saving:
    """The part of `DeepSpeedEngine` that saves and loads."""

    engine: Engine
    settings: DeepSpeedConfig
    module: nn.Module
    optimizer: PreparedOptimizer | None
    loaded_checkpoint_tag: str | None
    lr_scheduler: Any
    random_ltd_scheduler: Any
    global_steps: int
    global_samples: int
    micro_steps: int
    skipped_steps: int
    gradient_accumulation_steps: Callable[[], int]

    def progress(self) -> Progress:
        """Return what is registered with the checkpoints; made once."""
        if "_progress" not in self.__dict__:
            self.__dict__["_progress"] = Progress(self)
        found: Progress = self.__dict__["_progress"]
        return found

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything under `save_dir/tag` and name it in `save_dir/latest`. Collective: all ranks.

        It loads at any stage and any number of ranks. Frozen parameters are always in it.
        """
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        tag = self._validated(str(tag) if tag is not None else f"global_step{self.global_steps}")
        self.progress().client_state = dict(client_state or {})
        # As with DeepSpeed, gradients of a step that has begun are not in it; an event says so.
        self.engine._save_now(str(Path(save_dir) / tag), False, loses=True)
        if save_latest and self.engine.is_main_process:
            write_atomic(Path(save_dir) / LATEST, tag)
        self.engine.wait_for_everyone()
        return True

    def _validated(self, tag: str) -> str:
        """Return rank 0's tag. Collective.

        Raises: AssertionError where ranks have different ones and the JSON's checkpoint.tag_validation is "Fail";
        ValueError where that is none of DeepSpeed's words.
        """
        mode = str(self.settings.get("checkpoint.tag_validation", "Warn")).upper()
        if mode not in TAG_VALIDATIONS:
            raise ValueError(
                f"Checkpoint config contains invalid tag_validation value of {mode}, expecting one of {TAG_VALIDATIONS}"
            )
        first = str(ops.broadcast_object(tag))
        differ = bool(ops.reduce(torch.tensor(float(first != tag), device=self.engine.device)).item())
        if differ and mode != "IGNORE":
            told = (
                f"[rank={self.engine.process_index}] The checkpoint tag name '{tag}' is not consistent across all "
                "ranks. Including rank unique information in checkpoint tag could cause issues when restoring with "
                "different world sizes."
            )
            if mode == "FAIL":
                raise AssertionError(told)
            self.engine.print(f"distui: {told} Rank 0's is used: {first}")
        return first

    def load_checkpoint(
        self,
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, Any]:
        """Load `load_dir/tag`, or what `load_dir/latest` names; returns its path and the client's state. Collective.

        DeepSpeed's own checkpoints are read too, ZeRO stages 0 to 3 of any number of ranks. (None, None) where no tag
        is given and there is no `latest`.
        """
        if custom_load_fn is not None:
            custom_load_fn(src=load_dir, dst=self.module)
        if tag is None:
            latest = Path(load_dir) / LATEST
            if not latest.is_file():
                self.engine.print(f"distui: no checkpoint is loaded: {latest} does not exist, and no tag is given")
                return None, None
            tag = latest.read_text(encoding="utf-8").strip()
        folder = Path(load_dir) / str(tag)
        with_optimizer = load_optimizer_states and not load_module_only
        progress = self.progress()
        progress.loads_schedule = load_lr_scheduler_states and not load_module_only
        progress.loads_counters = not load_module_only
        if not (folder / MANIFEST).is_file() and deepspeed_files.is_deepspeed(folder):
            self._load_deepspeed(folder, with_optimizer, load_module_strict)
        else:
            self.engine.saver.load(self.engine, str(folder), optimizers=with_optimizer, strict=bool(load_module_strict))
        self.loaded_checkpoint_tag = str(tag)
        return str(folder), progress.client_state

    def _load_deepspeed(self, folder: Path, with_optimizer: bool, strict: bool) -> None:
        from distui.compat.whole import Whole

        saved = deepspeed_files.read(folder, optimizer_states=with_optimizer)
        whole = Whole(self.engine, self.module)
        missing = whole.missing(saved.weights)
        if missing and strict:
            raise UserError(
                f"the checkpoint {folder} is of another model",
                f"it has nothing for {len(missing)} tensors, such as {missing[0]}",
                "build the same model that was saved, or pass load_module_strict=False",
            )
        whole.write(saved.weights)
        if with_optimizer and self.optimizer is not None:
            whole.write_states(self.optimizer, saved.optimizer_states)
            for group, kept in zip(self.optimizer.param_groups, saved.groups, strict=False):
                group.update({key: value for key, value in kept.items() if key in group})
        progress, engine = self.progress(), self
        progress.client_state = saved.client_state
        if progress.loads_counters:
            engine.global_steps, engine.skipped_steps = saved.global_steps, saved.skipped_steps
            engine.global_samples = saved.global_samples
            engine.micro_steps = saved.global_steps * engine.gradient_accumulation_steps()
            self.engine.clock.step = saved.global_steps
        if progress.loads_schedule and saved.lr_scheduler and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(saved.lr_scheduler)

    # ---- weights for others --------------------------------------------------------------------------------------

    def _whole_16bit(self, exclude_frozen: bool) -> dict[str, Any]:
        state = self.engine.get_state_dict(self.module, only_rank_0=True)
        dtype = DTYPES[self.engine.config.precision.dtype]
        frozen = {name for name, param in torch.nn.Module.named_parameters(self.module) if not param.requires_grad}
        params = {name for name, _ in torch.nn.Module.named_parameters(self.module, remove_duplicate=False)}
        return {
            name: value.to(dtype) if name in params and dtype != torch.float32 else value
            for name, value in state.items()
            if not (exclude_frozen and name in frozen)
        }

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write the whole weights in the compute format as one file. Collective; True at every stage.

        A name that ends in `.safetensors` is written as safetensors.
        """
        state = self._whole_16bit(exclude_frozen_parameters)
        if self.engine.is_main_process:
            folder = Path(save_dir)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / save_filename
            if save_filename.endswith(".safetensors"):
                from safetensors.torch import save_file

                own = {name for name, _ in torch.nn.Module.named_parameters(self.module)}
                tied = {name for name, _ in torch.nn.Module.named_parameters(self.module, remove_duplicate=False)} - own
                save_file({name: value.contiguous() for name, value in state.items() if name not in tied}, path)
            else:
                torch.save(state, path)
        self.engine.wait_for_everyone()
        return True

    def save_fp16_model(self, save_dir: str, save_filename: str = "pytorch_model.bin") -> bool:
        """Do what `save_16bit_model` does, by its old name."""
        return self.save_16bit_model(save_dir, save_filename)

    def module_state_dict(self, *args: Any, exclude_frozen_parameters: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Return the module's whole state on the CPU, fp32 masters for what has them. Collective."""
        state = self.engine.get_state_dict(self.module)
        if not exclude_frozen_parameters:
            return state
        frozen = {name for name, param in torch.nn.Module.named_parameters(self.module) if not param.requires_grad}
        return {name: value for name, value in state.items() if name not in frozen}

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:
        """Give the module a whole state. Collective: all ranks, each with it."""
        return self.engine.load_state_dict(self.module, state_dict, strict)
