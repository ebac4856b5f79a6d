"""The callback that tells the dashboard what `Trainer` logs, saves and evaluates."""

from __future__ import annotations

import os
from numbers import Real
from types import ModuleType
from typing import Any

from distui.core.engine.job import job_telemetry
from distui.core.telemetry.source import current


def _source() -> Any:
    source = current()
    if source is not None and source.active:
        return source
    return job_telemetry(*(int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))


def make_callback(module: ModuleType) -> type:
    """Return the callback's class; `module` is `transformers.trainer`."""
    from transformers.trainer_callback import TrainerCallback

    class DistuiCallback(TrainerCallback):
        """Sends what Trainer logs as metrics, and its saves and evaluations as events."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Say how long the training will be."""
            _source().total_steps = max(0, state.max_steps)
            if state.is_world_process_zero:
                _source().event(
                    "info",
                    "trainer",
                    f"Trainer: {state.max_steps} steps, {state.num_train_epochs} epochs, micro-batch "
                    f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size} "
                    "ranks",
                )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            """Send the numbers of a log line."""
            numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, Real)}
            if numbers and state.is_world_process_zero:
                _source().metrics(state.global_step, numbers)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Say that a checkpoint was written."""
            if state.is_world_process_zero:
                folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
                _source().event("info", "checkpoint", f"Trainer saved {folder}", step=state.global_step)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            """Say what an evaluation came to."""
            loss = (metrics or {}).get("eval_loss")
            if state.is_world_process_zero and loss is not None:
                _source().event("info", "evaluation", f"eval_loss {loss:.4g}", step=state.global_step)

    return DistuiCallback
