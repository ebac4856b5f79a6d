"""Model FLOPs: counted once, on the script's own first micro-batch, then scaled with the work of each step.

Torch's `FlopCounterMode` sees every operation of the real forward and backward, so what is counted is what runs: frozen
parameters, GQA, convolutions. It only looks on; results are the same bits. Compiled code runs eagerly for that one
micro-batch, because compiled kernels tell no shapes.

Model FLOPs leave recomputation out, hardware FLOPs have it (PaLM, arXiv 2204.02311, appendix B): what a checkpoint runs
again in backward, and the scores that fused attention computes again (one of its backward's five multiplications).
A causal mask does not halve attention, by the same source.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from distui.core.hardware.host import read_cpu
from distui.core.hardware.known import gpu_facts
from distui.core.model.flops_table import FlopTally, ModuleProfile
from distui.core.paths import current_run, write_atomic
from distui.core.sharding.hooks import Hook
from distui.core.sharding.residence import in_backward
from distui.core.telemetry.source import NullSource, TelemetrySource

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_FUSED_ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")
"""Have the arguments of `_scaled_dot_product_flash_attention` but no formula in torch 2.13."""

_NO_FORMULA = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
"""Much work in one operation for which torch has no formula: a count without it would be wrong."""

RECOMPUTED_IN_ATTENTION = 1 / 5
"""Share of a fused attention's backward that computes the scores again; exact where q, k, v heads are equally wide."""


class _NoModules:
    """Stands for the counter's module tracker, whose hooks on all modules of the process torch.compile warns of."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *args: object) -> None:
        """Do nothing."""


class FlopMeter:
    """Counts the first micro-batch of whatever models it watches; does nothing from then on.

    It counts where telemetry is on or a profile is wanted. Where that fails, `problem` says why, and FLOPs are None.
    """

    def __init__(
        self,
        telemetry: TelemetrySource | NullSource,
        *,
        dtype: str,
        on_dtype: Callable[[str], None],
        profile: bool = False,
        writes: bool = True,
    ) -> None:
        """`on_dtype` hears in what most was computed if that is not `dtype`; `writes`: the profile goes to the run."""
        self._telemetry, self._dtype, self._on_dtype, self._writes = telemetry, dtype, on_dtype, writes
        self.counting = telemetry.active or profile
        self.profile = ModuleProfile() if profile else None
        self.problem = ""
        self.tally = FlopTally()
        self._dtypes: Counter[torch.dtype] = Counter()
        self._create_graph = False
        self._depth = 0
        self._forward = ExitStack()
        self._handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Count the first forward of `model` that is for training."""
        if not self.counting:
            return
        if self.profile is not None:
            self.profile.watch(model)
        self._handles += [
            model.register_forward_pre_hook(Hook(self._before_forward), prepend=True),
            model.register_forward_hook(Hook(self._after_forward), always_call=True),
        ]

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self.counting or in_backward() or not (module.training and torch.is_grad_enabled()):
            return
        self._depth += 1
        if self._depth == 1:
            self._forward.enter_context(self._count())

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward() or not self._depth:
            return
        self._depth -= 1
        if output is None:  # it raised: what the next forward does is counted
            self._restart()
        elif not self._depth:
            self._forward.close()

    @contextmanager
    def backward(self, create_graph: bool = False) -> Iterator[None]:
        """Count the backward inside, the first time."""
        if not self.counting:
            yield
            return
        self._create_graph = create_graph
        try:
            with self._count():
                yield
        except BaseException:
            self._restart()  # half a backward: the next one is counted
            raise

    @contextmanager
    def _count(self) -> Iterator[None]:
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False, custom_mapping=self._formulas())
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        # Under a dispatch mode dynamo would mark the code as not to be compiled, for good.
        with torch.compiler.set_stance("force_eager"), counter:
            yield

    def _formulas(self) -> dict[Any, Any]:
        from torch.utils.flop_counter import flop_registry

        aten = torch.ops.aten
        formulas = dict(flop_registry)
        for suffix in ("", "_backward"):
            like = formulas[getattr(aten, f"_scaled_dot_product_flash_attention{suffix}")]
            for name in _FUSED_ATTENTION:
                if hasattr(aten, name + suffix):
                    formulas.setdefault(getattr(aten, name + suffix), like)
        for name in _NO_FORMULA:
            if hasattr(aten, name):
                formulas.setdefault(getattr(aten, name), None)
        return {operation: self._counted(operation, formula) for operation, formula in formulas.items()}

    def _counted(self, operation: Any, formula: Callable[..., int] | None) -> Callable[..., int]:
        name = str(operation)
        recomputed = RECOMPUTED_IN_ATTENTION if "att" in name and name.endswith("_backward") else 0.0

        def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            if formula is None:
                self.problem = f"torch has no FLOP formula for {name}"
                return 0
            try:
                flops = int(formula(*args, out_val=out_val, **kwargs))
            except Exception as error:  # noqa: BLE001  a formula that does not fit must not end the training
                self.problem = f"the FLOP formula of {name} failed: {type(error).__name__}: {error}"
                return 0
            self._add(flops, recomputed, args)
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # it takes the tensors, not their shapes
        return count

    def _add(self, flops: int, recomputed: float, args: tuple[Any, ...]) -> None:
        tally = self.tally
        if not in_backward():
            tally.forward += flops
            if self.profile is not None:
                self.profile.add_flops(flops)
        elif torch.is_grad_enabled() and not self._create_graph:
            tally.recomputed += flops  # a checkpoint's second forward
        else:
            tally.backward += flops * (1 - recomputed)
            tally.recomputed += flops * recomputed
        dtype = next((arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()), None)
        if dtype is not None:
            self._dtypes[dtype] += flops

    def end_backward(self, tokens: int, samples: int) -> None:
        """Take what was counted as the FLOPs of so many tokens and samples; later calls do nothing."""
        if not self.counting:
            return
        self.counting = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.tally.tokens, self.tally.samples = tokens, samples
        if not self.problem and not self.tally.model:
            self.problem = "no operation of the model has a FLOP formula"
        if self.problem:
            self._telemetry.event("warning", "flops", f"FLOPs are not available: {self.problem}")
            return
        name = DTYPE_NAMES.get(self._dtypes.most_common(1)[0][0], "") if self._dtypes else ""
        if name != self._dtype:
            self._on_dtype(name)

    def _restart(self) -> None:
        self._forward.close()
        self._depth = 0
        self.tally = FlopTally()
        self._dtypes.clear()
        if self.profile is not None:
            self.profile.forget_flops()

    def of(self, tokens: int, samples: int, micro_batches: int) -> float | None:
        """Return the model FLOPs of so much work on this rank; None where they are not known.

        They go with the tokens, else with the samples, else (batches that no prepared loader gave) with micro-batches.
        """
        tally = self.tally
        if self.counting or self.problem or not tally.model:
            return None
        if tally.tokens and tokens:
            return tally.model * tokens / tally.tokens
        if tally.samples and samples:
            return tally.model * samples / tally.samples
        return tally.model * micro_batches if micro_batches else None

    def end_step(self, step: int, tokens: int, samples: int, micro_batches: int) -> float | None:
        """Return the model FLOPs of the step; the profile times the second one and is written after it."""
        if self.profile is not None and not self.counting:
            if self.profile.timing:
                self.profile.end(micro_batches)
                self._write(self.profile.table(self.tally, self.problem))
                self.profile = None
            else:
                self.profile.begin()
        # The first step had the counting in it: a rate from its time would be wrong.
        return self.of(tokens, samples, micro_batches) if step > 1 else None

    def _write(self, table: str) -> None:
        run = current_run()
        if not self._writes:
            return
        if run is None:
            print(table)
        else:
            write_atomic(run.flops, table)
            self._telemetry.event("info", "flops", f"the FLOPs of each module are in {run.flops}")


def device_peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return what one rank's device can do in `dtype` (fp32, bf16, fp16), FLOP/s, dense; None where it is not known.

    Source: the GPU's datasheet; for a CPU this rank's share of what was measured on it, where somebody measured it.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        facts = gpu_facts(name) if " MIG " not in name else None  # a slice has a part of the datasheet's units
        if facts is None or (dtype == "fp32" and _tf32()):
            return None
        return facts.peak_flops.get(dtype)
    if device.type != "cpu":
        return None
    rate = (read_cpu().peak_flops or {}).get(dtype)
    return rate / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if rate is not None else None


def _tf32() -> bool:
    """Tell whether fp32 matrices are multiplied in TF32, whose rate the table does not have."""
    own = torch.backends.cuda.matmul.fp32_precision
    return own == "tf32" or (own == "none" and getattr(torch.backends, "fp32_precision", "none") == "tf32")
