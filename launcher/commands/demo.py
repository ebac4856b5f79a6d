"""`distui demo`: a real training on real text, through the very launch that a script gets."""

from __future__ import annotations

import click


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--nproc", default="2", metavar="N|auto", help="Ranks.", show_default=True)
@click.option("--zero", default="2", metavar="0-3", help="ZeRO stage.", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps; else as many as fit in a minute or two.")
@click.option("--no-tui", is_flag=True, help="Plain lines even in a terminal.")
def command(nproc: str, zero: str, steps: int | None, no_tui: bool) -> int:
    """Train a small byte-level GPT on the text of the installed Python standard library."""
    from distui.launcher.job.launch import launch
    from distui.launcher.job.request import LaunchRequest

    target = ["-m", "distui.demo.train"]
    if steps is not None:
        target += ["--steps", str(steps)]
    overrides = {"cluster.nproc": nproc, "strategy.zero_stage": zero, "run.name": "demo", "precision.dtype": "fp32"}
    return launch(LaunchRequest(target, overrides, None, no_tui))
