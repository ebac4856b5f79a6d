"""`distui as accelerate ...`, `distui as deepspeed ...`: commands of theirs, done by distui."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from distui.core.errors import UserError

_HELP = {"help_option_names": ["-h", "--help"]}
_DTYPES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


@click.group("as", context_settings=_HELP)
def command() -> None:
    """Do what a command of Accelerate or DeepSpeed does."""


@command.group(context_settings=_HELP)
def accelerate() -> None:
    """Commands of `accelerate`; for launch and config: distui launch --as accelerate, distui setup."""


@command.group(context_settings=_HELP)
def deepspeed() -> None:
    """Commands of DeepSpeed; for its launcher: distui launch --as deepspeed."""


@accelerate.command("env")
@click.pass_context
def env(context: click.Context) -> None:
    """Say what this machine has, as `distui doctor` does, and which libraries."""
    _report(context)


@deepspeed.command("ds_report")
@click.pass_context
def ds_report(context: click.Context) -> None:
    """Say what this machine has, as `distui doctor` does, and which libraries: no operation needs to be compiled."""
    _report(context)


def _report(context: click.Context) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from distui.launcher.commands.doctor import command as doctor

    for name in ("distui", "torch", "transformers", "accelerate", "deepspeed", "triton"):
        try:
            click.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} is not installed")
    context.invoke(doctor)


@accelerate.command("merge-weights")
@click.argument("checkpoint_directory", type=click.Path(path_type=Path))
@click.argument("output_path", type=click.Path(path_type=Path))
@click.option("--unsafe_serialization", is_flag=True, help="pytorch_model.bin in place of safetensors.")
@click.option("--remove_checkpoint_dir", is_flag=True, help="Remove the checkpoint afterwards.")
def merge_weights(
    checkpoint_directory: Path, output_path: Path, unsafe_serialization: bool, remove_checkpoint_dir: bool
) -> None:
    """Write the weights of a checkpoint that ranks wrote to one file."""
    from distui.compat.accelerate.utils.fsdp_utils import merge_fsdp_weights

    try:
        merge_fsdp_weights(checkpoint_directory, output_path, not unsafe_serialization, remove_checkpoint_dir)
    except ValueError as error:
        raise UserError(str(error), "nothing was merged", "name the folder that save_state wrote") from None
    click.echo(f"{output_path}: merged")


@accelerate.command("estimate-memory")
@click.argument("model_name")
@click.option("--dtypes", multiple=True, type=click.Choice(list(_DTYPES)), help="May be repeated.  [default: all]")
@click.option("--trust_remote_code", is_flag=True, help="Run the code that comes with the model.")
@click.option("--library_name", default="transformers", type=click.Choice(["transformers"]), show_default=True)
def estimate_memory(model_name: str, dtypes: tuple[str, ...], trust_remote_code: bool, library_name: str) -> None:
    """Print what a transformers model takes, and what training it with Adam takes, before activations."""
    try:
        transformers: Any = __import__("transformers")
    except ImportError:
        raise UserError(
            "estimate-memory needs transformers",
            "it builds the model from its config.json, without memory",
            f"pip install transformers, or distui plan --model {model_name}",
        ) from None
    from distui.core.sharding.start.empty import init_empty_weights
    from distui.tui.format import num_bytes

    config = transformers.AutoConfig.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    with init_empty_weights():
        model = transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    total = sum(param.numel() for param in model.parameters())
    whole = set(getattr(model, "_no_split_modules", None) or ())
    layers = [part for part in model.modules() if type(part).__name__ in whole or not list(part.children())]
    largest = max(sum(param.numel() for param in part.parameters()) for part in layers)
    click.echo(f"{model_name}: {total:,} parameters")
    click.echo(f"{'dtype':10} {'largest layer':>14} {'total size':>14} {'training with Adam':>20}")
    for dtype in dtypes or tuple(_DTYPES):
        size = _DTYPES[dtype]
        # Weights, gradients and two moments in fp32; half precision keeps fp32 masters beside its weights.
        adam = num_bytes(total * 16) if size >= 2 else "n/a"
        click.echo(f"{dtype:10} {num_bytes(largest * size):>14} {num_bytes(total * size):>14} {adam:>20}")
    click.echo(f"with activations, and on several devices: distui plan --model {model_name}")


@accelerate.command("test", context_settings={**_HELP, "ignore_unknown_options": True})
@click.argument("launch_options", nargs=-1, type=click.UNPROCESSED)
def run_test(launch_options: tuple[str, ...]) -> None:
    """Train a small model on every rank, and compare with one process; the options are those of `distui launch`."""
    import subprocess
    import sys

    from distui.compat.accelerate.test_utils import check

    start = [sys.executable, "-m", "distui", "launch", "--no-tui", *launch_options, str(check.__file__)]
    status = subprocess.run(start, check=False).returncode
    if status:
        raise SystemExit(status)
    click.echo("Test is a success! You are ready for your distributed training!")


@deepspeed.command("zero_to_fp32")
@click.argument("checkpoint_dir", type=click.Path(path_type=Path))
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option("-t", "--tag", help="Checkpoint in the folder.  [default: the one that `latest` names]")
@click.option("--safe_serialization", is_flag=True, help="safetensors in place of pytorch_model.bin.")
@click.option("--max_shard_size", default="5GB", show_default=True, help="Largest file, with safetensors.")
@click.option("-d", "--debug", is_flag=True, hidden=True)
def zero_to_fp32(
    checkpoint_dir: Path, output_dir: Path, tag: str | None, safe_serialization: bool, max_shard_size: str, debug: bool
) -> None:
    """Write the whole fp32 weights of a checkpoint, DeepSpeed's or distui's."""
    from distui.compat.deepspeed.utils import zero_to_fp32 as theirs
    from distui.core.checkpoint.export import parse_size, write_safetensors

    if not safe_serialization:
        theirs.convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint_dir), str(output_dir), tag)
    else:
        weights = theirs.get_fp32_state_dict_from_zero_checkpoint(str(checkpoint_dir), tag)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_safetensors(weights, output_dir, parse_size(max_shard_size))
    click.echo(f"{output_dir}: written")
