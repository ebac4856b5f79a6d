"""What stands under each `--help`: commands that people write."""

from __future__ import annotations

import click

EXAMPLES: dict[str, tuple[str, ...]] = {
    "setup": (
        "distui setup",
        "distui setup --yes --model llama-3-8b",
        "distui setup --from ds_config.json",
    ),
    "plan": (
        "distui plan --model llama-7b --hardware 8xA100-40GB",
        "distui plan --script train.py:build_model --all",
        "distui plan --model 7B --hardware 4x8xH100-80GB --explain ZeRO-3",
    ),
    "launch": (
        "distui launch train.py --lr 3e-4",
        "distui launch --nproc 8 --zero 3 --set precision.dtype=bf16 train.py",
        "distui launch --hosts gpu1,gpu2:4 train.py",
        "distui launch --hostfile hosts --max-restarts 3 --set checkpoint.every_steps=500 train.py",
        "distui launch --as accelerate their_script.py",
        "distui launch --detach train.py",
        "distui launch --no-tui --nproc 2 has_a_breakpoint.py",
        "distui launch --debug-rank 1 has_a_breakpoint.py",
    ),
    "runs": ("distui runs", "distui runs --running", "distui runs --json"),
    "attach": ("distui attach", "distui attach train-2026", "distui attach --debug"),
    "logs": ("distui logs -f", "distui logs train-2026 --rank 3 -n 50"),
    "stop": ("distui stop train-2026", "distui stop train-2026 --now"),
    "monitor": ("distui monitor", "distui monitor --replay train-2026", "distui monitor --web"),
    "status": ("distui status", "distui status train-2026 --json"),
    "report": ("distui report", "distui report train-2026 -o run.html", "distui report --format csv -o tables"),
    "why": ("distui why", "distui why train-2026 --what-if strategy.zero_stage=1 --model llama-7b"),
    "tune": (
        "distui tune --nproc 2 train.py",
        "distui tune --model llama-7b --plans 5 --write train.py --lr 3e-4",
    ),
    "compare": ("distui compare train-2026 other-2026", "distui compare train-2026 other-2026 -o both.html"),
    "control": ("distui control train-2026 stacks", "distui control train-2026 profile --steps 5"),
    "cluster check": (
        "distui cluster check --hosts gpu1,gpu2:4 train.py",
        "distui cluster check --hostfile hosts --exclude gpu7",
    ),
    "checkpoint inspect": ("distui checkpoint inspect checkpoints/step-1000",),
    "checkpoint consolidate": ("distui checkpoint consolidate checkpoints/step-1000 weights",),
    "checkpoint reshard": ("distui checkpoint reshard checkpoints/step-1000 eight --ranks 8",),
    "config show": ("distui config show", "distui config show --set strategy.zero_stage=3"),
    "config check": ("distui config check",),
    "config schema": ("distui config schema",),
    "config import": ("distui config import ds_config.json", "distui config import accelerate.yaml -o distui.toml"),
    "config export": ("distui config export --to deepspeed -o ds_config.json",),
    "daemon": (
        "distui daemon --listen 0.0.0.0:7070 --accept-runs",
        "distui daemon --headless --metrics 127.0.0.1:9100",
    ),
    "doctor": ("distui doctor", "distui doctor --collectives --nproc 4", "distui doctor --disk /scratch"),
    "demo": ("distui demo", "distui demo --nproc 4 --zero 3 --steps 50"),
    "as accelerate config": ("distui as accelerate config",),
    "as accelerate config default": ("distui as accelerate config default --mixed_precision bf16",),
    "as accelerate config update": ("distui as accelerate config update --config_file default_config.yaml",),
    "as accelerate env": ("distui as accelerate env",),
    "as accelerate test": ("distui as accelerate test",),
    "as accelerate estimate-memory": ("distui as accelerate estimate-memory gpt2",),
    "as accelerate merge-weights": ("distui as accelerate merge-weights checkpoints/step-1000 weights",),
    "as deepspeed ds_report": ("distui as deepspeed ds_report",),
    "as deepspeed zero_to_fp32": ("distui as deepspeed zero_to_fp32 checkpoints weights",),
    "completion": (
        "distui completion bash >> ~/.bashrc",
        "distui completion fish > ~/.config/fish/completions/distui.fish",
    ),
}
"""Command -> lines; a command with commands has them under each."""


def add_examples(name: str, command: click.Command) -> None:
    """Put the examples of a command, and of those in it, under their help."""
    if lines := EXAMPLES.get(name):
        # \b keeps click from filling the lines.
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
    for part, inner in getattr(command, "commands", {}).items():
        add_examples(f"{name} {part}", inner)
