"""How fast the planner is, and how far it reaches: `python benchmarks/planner`.

Goal: 10,000 combinations of strategy and micro-batch in under 1 s on one core, torch not loaded.
"""

from __future__ import annotations

import sys
import time

from distui.core.hardware.detect import parse_hardware
from distui.core.plan.memory import footprint
from distui.core.plan.models import load_model
from distui.core.plan.rates import rates_of
from distui.core.plan.search import Request, micro_sizes, plan_all, strategies
from distui.core.plan.time import step_time

GOAL = 10_000


def main() -> None:
    """Print seconds for whole rankings and for single combinations."""
    machines = ["8xA100-40GB", "4x8xH100-80GB", "64x8xH100-80GB", "1250x8xB200-180GB"]
    models = ["gpt2-xl", "llama-7b", "llama-3-70b", "llama-3.1-405b"]
    print(f"{'model':>16} {'machine':>20} {'plans':>6} {'seconds':>8}")
    for model_name in models:
        for machine in machines:
            model, hardware = load_model(model_name), parse_hardware(machine)
            start = time.perf_counter()
            plans = plan_all(model, hardware)
            print(f"{model_name:>16} {machine:>20} {len(plans):6d} {time.perf_counter() - start:8.3f}")

    combinations = []
    for model_name in models:
        for machine in machines:
            hardware = parse_hardware(machine)
            for global_size in (None, 1024, 4096, 16384):
                for dtype in ("bf16", "fp16", "fp32"):
                    request = Request(
                        model=load_model(model_name),
                        hardware=hardware,
                        ranks_per_node=8,
                        dtype=dtype,
                        reduce_dtype="fp32",
                        optimizer="adamw",
                        margin=0.08,
                        global_size=global_size,
                    )
                    rates = rates_of(hardware, dtype, 8)
                    combinations += [
                        (request.model, strategy, rates)
                        for strategy in strategies(request)
                        for _ in micro_sizes(request, strategy)
                    ]
    chosen = combinations[:: max(1, len(combinations) // GOAL)][:GOAL]
    start = time.perf_counter()
    for model, strategy, rates in chosen:
        footprint(model, strategy, rates.device_kind)
        step_time(model, strategy, rates)
    seconds = time.perf_counter() - start
    print(f"\n{len(chosen)} combinations: {seconds:.2f} s, {seconds / len(chosen) * 1e6:.0f} us each (goal: under 1 s)")
    print(f"torch loaded: {'torch' in sys.modules}")


if __name__ == "__main__":
    main()
