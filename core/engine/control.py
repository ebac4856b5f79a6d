"""What a running job is asked from outside: checkpoint and profile, each at one step on all ranks.

A command reaches each rank's side thread at a time of its own. If a rank acted at once it would enter a collective
alone and cause the very hang it is meant to look into. So ranks agree: every few steps they take the maximum of what
each was asked, and act in the same step. How few is chosen so that it happens about twice a second.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from distui.core.errors import EXIT_PREEMPTED
from distui.core.paths import RunFolder
from distui.core.ranks import ops
from distui.core.telemetry.control import LATER, ControlCommand

if TYPE_CHECKING:
    from distui.core.engine.states import States

VERBS = ("checkpoint", "profile")
AGREE_EVERY_S = 0.5
MAX_STEPS_BETWEEN = 64
MAX_PROFILED_STEPS = 50


class StepControl:
    """Takes commands on side threads, and carries them out between two steps of the training thread."""

    def __init__(self, engine: States, run: RunFolder) -> None:
        self._engine, self._run = engine, run
        self._lock = threading.Lock()
        self._asked: dict[str, ControlCommand] = {}
        self._next_agreement = 1
        self._last_agreement = (0, time.perf_counter())
        self._profile: Any = None
        self._profile_command: ControlCommand | None = None
        self._profile_until = 0
        for verb in VERBS:
            engine.telemetry.on_control(verb, self._ask)

    def _ask(self, command: ControlCommand) -> Any:
        with self._lock:
            earlier = self._asked.get(command.verb)
            if earlier is not None:
                return f"{command.verb} is asked for already"
            self._asked[command.verb] = command
        return LATER

    def after_step(self) -> None:
        """Carry out what all ranks agree on. Collective: all ranks, after every optimizer step."""
        step = self._engine.clock.step
        if self._profile is not None:
            self._continue_profile(step)
        if step < self._next_agreement:
            return
        *wanted, gives_way, save_failed = self._agree(step)
        if gives_way:
            self._engine.step_end.after_save = self._give_way
            self._engine.step_end.ask()
            return
        if save_failed:
            # One rank's thread knows already; the others' are about to.
            self._engine.saver.join()
        for verb, value in zip(VERBS, wanted, strict=True):
            if value:
                with self._lock:
                    command = self._asked.pop(verb, None)
                self._carry_out(verb, value, command)

    def _agree(self, step: int) -> list[int]:
        last_step, last_time = self._last_agreement
        now = time.perf_counter()
        step_s = (now - last_time) / max(step - last_step, 1)
        with self._lock:
            asked = [self._argument(verb) for verb in VERBS]
        values = torch.tensor(
            [*asked, self._run.preempt.exists(), self._engine.save_failed, round(step_s * 1e6)],
            dtype=torch.int64,
            device=ops.object_device(),
        )
        if self._engine.num_processes > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        *wanted, slowest_us = values.tolist()
        # The maximum is the same on every rank, so all come to the same next step.
        self._next_agreement = step + max(1, min(MAX_STEPS_BETWEEN, round(AGREE_EVERY_S * 1e6 / max(slowest_us, 1))))
        self._last_agreement = (step, now)
        return wanted

    def _give_way(self) -> None:
        """End the script once its state is on the disk. Collective."""
        self._engine.saver.join()
        self._engine.wait_for_everyone()
        raise SystemExit(EXIT_PREEMPTED)

    def _argument(self, verb: str) -> int:
        command = self._asked.get(verb)
        if command is None:
            return 0
        steps = str(command.arguments.get("steps", "")) if verb == "profile" else ""
        return min(int(steps), MAX_PROFILED_STEPS) if steps.isdecimal() and int(steps) else 1

    def _carry_out(self, verb: str, value: int, command: ControlCommand | None) -> None:
        if verb == "checkpoint":
            self._save(command)
            return
        if self._profile is None:
            self._profile_command = command
            self._start_profile(value)
        elif self._profile_command is None:
            self._profile_command = command  # the other ranks' profile, which began before this rank was asked
        elif command is not None:
            command.error(f"a profile is being taken already, until step {self._profile_until}")

    def _save(self, command: ControlCommand | None) -> None:
        def answer(path: Path, error: BaseException | None) -> None:
            if command is not None and error is None:
                command.done(f"saved {path}")
            elif command is not None:
                command.error(str(error))

        self._engine.step_end.ask(answer)

    def _start_profile(self, num_steps: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._engine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()
        self._profile_until = self._engine.clock.step + num_steps

    def _continue_profile(self, step: int) -> None:
        if step < self._profile_until:
            return
        profile, self._profile = self._profile, None
        command, self._profile_command = self._profile_command, None
        try:
            profile.stop()
            folder = self._run.path / "profile"
            folder.mkdir(exist_ok=True)
            path = folder / f"rank{self._engine.process_index}.json"
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a full disk must not end the training
            if command is not None:
                command.error(f"the profile cannot be written: {error}")
            return
        if command is not None:
            command.done(f"wrote {path}; open it in ui.perfetto.dev")
        self._engine.telemetry.event("info", "profile", f"wrote {path}; open it in ui.perfetto.dev", step=step)
