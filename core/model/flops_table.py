"""Where the FLOPs and the time of a forward go, module by module, like DeepSpeed's flops profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distui.core.sharding.hooks import Hook
from distui.core.sharding.residence import in_backward


@dataclass(slots=True)
class FlopTally:
    """FLOPs of one micro-batch on one rank, and how much work that was."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0
    tokens: int = 0
    samples: int = 0

    @property
    def model(self) -> float:
        """Forward and backward, nothing twice."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """All that was computed."""
        return self.model + self.recomputed


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One module with all that is in it."""

    name: str
    type: str
    depth: int
    num_parameters: int
    flops: int
    own_flops: int
    """Outside of its named children."""
    forward_s: float | None
    """Of one micro-batch; None where the module was not called on its own, or runs inside compiled code."""


class ModuleProfile:
    """Attributes the FLOPs of the counted forward to modules, and times each module's forward in a later step.

    On CUDA every timed module waits for the device, so its time is the device's, and that step is slower.
    """

    def __init__(self) -> None:
        self._models: list[tuple[str, nn.Module]] = []
        self._handles: list[Any] = []
        self._running: list[tuple[str, float]] = []
        self._own_flops: dict[str, int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)
        self._micro_batches = 1
        self.timing = False

    def watch(self, model: nn.Module) -> None:
        """Take `model` in; its modules are named from its class on."""
        name, taken = type(model).__name__, [name for name, _ in self._models]
        name = name if name not in taken else f"{name}{len(taken)}"
        self._models.append((name, model))
        self._hook(name, model, timed=False)

    def _hook(self, root: str, model: nn.Module, timed: bool) -> None:
        inside_compiled = _inside_compiled(model) if timed else set()
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule) or id(module) in inside_compiled:
                continue
            name = f"{root}.{path}" if path else root
            self._handles += [
                module.register_forward_pre_hook(Hook(self._before(name, module is model))),
                module.register_forward_hook(Hook(self._after(name)), always_call=True),
            ]

    def _before(self, name: str, is_root: bool) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if in_backward() or not (self._running or (is_root and module.training and torch.is_grad_enabled())):
                return
            self._running.append((name, self._now() if self.timing else 0.0))

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if in_backward() or not any(running == name for running, _ in self._running):
                return
            ended, begin = self._running.pop()
            while ended != name:  # an exception left modules without their hooks
                ended, begin = self._running.pop()
            if self.timing:
                self._seconds[name] += self._now() - begin

        return hook

    def _now(self) -> float:
        if any(param.is_cuda for _, model in self._models[:1] for param in model.parameters()):
            torch.cuda.synchronize()
        return time.perf_counter()

    def add_flops(self, flops: int) -> None:
        """Account `flops` to the module whose forward is running."""
        self._own_flops[self._running[-1][0] if self._running else self._models[0][0]] += flops

    def forget_flops(self) -> None:
        """Forget what was counted: it is counted again."""
        self._running.clear()
        self._own_flops.clear()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    def begin(self) -> None:
        """Time forwards from now on."""
        self._unhook()
        self.timing = True
        for name, model in self._models:
            self._hook(name, model, timed=True)

    def end(self, micro_batches: int) -> None:
        """Stop; so many micro-batches were timed."""
        self._unhook()
        self.timing = False
        self._micro_batches = max(1, micro_batches)

    def rows(self) -> list[ModuleRow]:
        """Return a row for every module, parents before children; a module's own FLOPs add up to the whole."""
        return [row for name, model in self._models for row in self._rows(name, model, 0)]

    def _rows(self, name: str, module: nn.Module, depth: int) -> Iterator[ModuleRow]:
        for path, part in module.named_modules():
            full = f"{name}.{path}" if path else name
            flops = sum(own for inner, own in self._own_flops.items() if inner == full or inner.startswith(f"{full}."))
            seconds = self._seconds.get(full)
            yield ModuleRow(
                name=full,
                type=type(part).__name__,
                depth=depth + (path.count(".") + 1 if path else 0),
                num_parameters=sum(param.numel() for param in part.parameters()),
                flops=flops,
                own_flops=self._own_flops.get(full, 0),
                forward_s=seconds / self._micro_batches if seconds is not None else None,
            )

    def table(self, tally: FlopTally, problem: str) -> str:
        """Return the whole report as text."""
        lines = ["FLOPs and time of one micro-batch on rank 0"]
        work = [f"{count:,} {what}" for count, what in ((tally.tokens, "tokens"), (tally.samples, "samples")) if count]
        if work:
            lines.append(f"counted on      {', '.join(work)}")
        if problem:
            lines.append(f"FLOPs           n/a: {problem}")
        else:
            parts = f"forward {_si(tally.forward)}, backward {_si(tally.backward)}"
            lines.append(f"model FLOPs     {_si(tally.model)} ({parts})")
            lines.append(f"hardware FLOPs  {_si(tally.hardware)} (with {_si(tally.recomputed)} computed again)")
            if tally.tokens:
                lines.append(f"a token         {_si(tally.model / tally.tokens)}")
        return "\n".join([*lines, "", *_columns(self.rows(), bool(problem)), ""])


def _inside_compiled(model: nn.Module) -> set[int]:
    """Return the modules that run inside compiled code, where a hook would change the graph."""
    found: set[int] = set()
    for module in model.modules():
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            found.update(id(part) for part in inner.modules())
        elif getattr(module, "_compiled_call_impl", None) is not None:
            found.update(id(part) for part in module.modules())
    return found


def _columns(rows: list[ModuleRow], no_flops: bool) -> Iterable[str]:
    total = sum(row.own_flops for row in rows)
    cells = [("module", "type", "parameters", "forward FLOPs", "share", "forward time", "FLOP/s")]
    for row in rows:
        known = not no_flops
        cells.append(
            (
                "  " * row.depth + row.name.rpartition(".")[2],
                row.type,
                f"{row.num_parameters:,}",
                _si(row.flops) if known else "n/a",
                f"{row.flops / total:.1%}" if known and total else "n/a",
                f"{row.forward_s * 1e3:.3f} ms" if row.forward_s is not None else "n/a",
                _si(row.flops / row.forward_s) if known and row.forward_s else "n/a",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for cell in cells:
        texts = [
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(cell, widths, strict=True))
        ]
        yield "  ".join(texts).rstrip()


def _si(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"
