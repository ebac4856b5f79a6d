"""Checkpoints of a DeepSpeed engine: distui's own, for any stage and number of ranks; DeepSpeed's are read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from distui.core.checkpoint import deepspeed_files
from distui.core.checkpoint import state as checkpoints
from distui.core.checkpoint.folder import MANIFEST
from distui.core.engine import Engine
from distui.core.errors import UserError
from distui.core.paths import write_atomic
from distui.core.precision import DTYPES

if TYPE_CHECKING:
    from torch import nn

    from distui.compat.deepspeed.engine import DeepSpeedEngine

LATEST = "latest"


def _packed(value: Any) -> torch.Tensor:
    """Return any object as bytes in a tensor, which a checkpoint that is read without pickle can hold."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> Any:
    # The script's own objects, as DeepSpeed keeps them: pickled.
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=False)


class Progress:
    """What a checkpoint keeps beside weights and optimizer: counters, the schedule and the script's own state."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
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
            "lr_scheduler": _packed(schedule.state_dict() if schedule is not None else None),
            "client_state": _packed(self.client_state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        engine = self._engine
        self.client_state = _unpacked(state["client_state"])
        if self.loads_counters:
            for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps"):
                setattr(engine, name, int(state[name]))
        saved = _unpacked(state["lr_scheduler"])
        if self.loads_schedule and saved is not None and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(saved)


class Saving:
    """The part of `DeepSpeedEngine` that saves and loads."""

    engine: Engine
    module: nn.Module

    @property
    def _self(self) -> DeepSpeedEngine:
        return cast("DeepSpeedEngine", self)

    def progress(self) -> Progress:
        """Return what is registered with the checkpoints; made once."""
        if "_progress" not in self.__dict__:
            self.__dict__["_progress"] = Progress(self._self)
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
        tag = str(tag) if tag is not None else f"global_step{self._self.global_steps}"
        self.progress().client_state = dict(client_state or {})
        self.engine.save_state(str(Path(save_dir) / tag))
        if save_latest and self.engine.is_main_process:
            write_atomic(Path(save_dir) / LATEST, tag)
        self.engine.wait_for_everyone()
        return True

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
            self.engine.saver.wait()
            checkpoints.load(self.engine, str(folder), optimizers=with_optimizer)
        self._self.loaded_checkpoint_tag = str(tag)
        return str(folder), progress.client_state

    def _load_deepspeed(self, folder: Path, with_optimizer: bool, strict: bool) -> None:
        from distui.compat.deepspeed.whole import Whole

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
        if with_optimizer and self._self.optimizer is not None:
            whole.write_states(self._self.optimizer, saved.optimizer_states)
            for group, kept in zip(self._self.optimizer.param_groups, saved.groups, strict=False):
                group.update({key: value for key, value in kept.items() if key in group})
        progress, engine = self.progress(), self._self
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
