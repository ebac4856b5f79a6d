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
    """Commands of `accelerate`; for its launch: distui launch --as accelerate."""


@command.group(context_settings=_HELP)
def deepspeed() -> None:
    """Commands of DeepSpeed; for its launcher: distui launch --as deepspeed."""


@accelerate.command("env")
@click.option("--config_file", type=click.Path(path_type=Path), help="Accelerate's file, or a distui.toml, to show.")
@click.pass_context
def env(context: click.Context, config_file: Path | None) -> None:
    """Say what this machine has, as `distui doctor` does, which libraries, and the configuration."""
    _report(context)
    path = config_file or next((path for path in _config_files() if path.is_file()), None)
    if path is None:
        click.echo("configuration: none; distui setup writes one")
        return
    if not path.is_file():
        raise UserError(f"{path} is not there", "--config_file names it", "name a file, or leave it out")
    click.echo(f"configuration: {path}")
    for line in path.read_text(encoding="utf-8").splitlines():
        click.echo(f"    {line}")


def _config_files() -> list[Path]:
    """Return where the configuration of this folder, and Accelerate's, may stand."""
    import os

    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    theirs = cache.expanduser() / "accelerate"
    return [Path("distui.toml"), *(theirs / f"default_config.{kind}" for kind in ("yaml", "yml", "json"))]


@accelerate.group("config", invoke_without_command=True)
@click.option("--config_file", type=click.Path(path_type=Path), help="File to write; ./distui.toml by default.")
@click.pass_context
def config(context: click.Context, config_file: Path | None) -> Any:
    """Write a configuration step by step: the wizard of `distui setup`, which writes distui.toml."""
    if context.invoked_subcommand is not None:
        return None
    from distui.launcher.commands.setup import command as setup

    _need_toml(config_file)
    return context.invoke(setup, config_path=config_file or Path("distui.toml"))


@config.command("default")
@click.option("--config_file", type=click.Path(path_type=Path), help="File to write; ./distui.toml by default.")
@click.option("--mixed_precision", type=click.Choice(["no", "fp16", "bf16"]), default="no", show_default=True)
@click.pass_context
def config_default(context: click.Context, config_file: Path | None, mixed_precision: str) -> None:
    """Write what fits this machine without a question: data parallelism over its devices, in the given precision."""
    path = config_file or Path("distui.toml")
    _need_toml(path)
    if path.exists():
        raise UserError(f"{path} is there", "it would be overwritten", "remove it, or name another --config_file")
    dtype = {"no": "fp32"}.get(mixed_precision, mixed_precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'[precision]\ndtype = "{dtype}"\n', encoding="utf-8")
    click.echo(f"{path}: written; distui launch starts a rank on each device")


@config.command("update")
@click.option("--config_file", required=True, type=click.Path(path_type=Path), help="Accelerate's file.")
@click.pass_context
def config_update(context: click.Context, config_file: Path) -> None:
    """Bring a file of Accelerate's up to date: as distui.toml, with a word on every key."""
    from distui.launcher.commands.config import import_settings

    context.invoke(import_settings, file=config_file)


def _need_toml(path: Path | None) -> None:
    if path is not None and path.suffix != ".toml":
        raise UserError(
            f"--config_file {path} is not written", "distui's settings are TOML", f"name {path.with_suffix('.toml')}"
        )


@deepspeed.command("ds_report")
@click.option("--hide_operator_status", is_flag=True, help="Without the line on operations.")
@click.option("--hide_errors_and_warnings", is_flag=True, help="Libraries only.")
@click.pass_context
def ds_report(context: click.Context, hide_operator_status: bool, hide_errors_and_warnings: bool) -> None:
    """Say what this machine has, as `distui doctor` does, and which libraries: no operation needs to be compiled."""
    _report(context, examines=not hide_errors_and_warnings)
    if not hide_operator_status:
        click.echo("operations: none is compiled; torch's own, and Triton's kernels where there is a GPU")


def _report(context: click.Context, examines: bool = True) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    from distui.launcher.commands.doctor import command as doctor

    click.echo(f"python {platform.python_version()} on {platform.platform()}")
    for name in ("distui", "torch", "numpy", "transformers", "accelerate", "deepspeed", "triton"):
        try:
            click.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} is not installed")
    if (spec := find_spec("torch")) is not None:
        click.echo(f"torch is in {Path(str(spec.origin)).parent}")
    if examines:
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
@click.argument("more_dtypes", nargs=-1, type=click.Choice(list(_DTYPES)))
@click.option("--dtypes", multiple=True, type=click.Choice(list(_DTYPES)), help="One or more.  [default: all]")
@click.option("--trust_remote_code", is_flag=True, help="Run the code that comes with the model.")
@click.option("--library_name", type=click.Choice(["transformers", "timm"]), help="By default by the model's name.")
def estimate_memory(
    model_name: str,
    more_dtypes: tuple[str, ...],
    dtypes: tuple[str, ...],
    trust_remote_code: bool,
    library_name: str | None,
) -> None:
    """Print what a model of transformers or timm takes, and what training it with Adam takes, before activations."""
    from distui.core.sharding.start.empty import init_empty_weights
    from distui.tui.format import num_bytes

    library_name = library_name or ("timm" if model_name.startswith("timm/") else "transformers")
    try:
        library: Any = __import__(library_name)
    except ImportError:
        raise UserError(
            f"estimate-memory needs {library_name}",
            "it builds the model without memory",
            f"pip install {library_name}, or distui plan --model {model_name}",
        ) from None
    if library_name == "timm":
        with init_empty_weights():
            model = library.create_model(model_name.removeprefix("timm/"), pretrained=False)
    else:
        config = library.AutoConfig.from_pretrained(model_name, trust_remote_code=trust_remote_code)
        with init_empty_weights():
            model = library.AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    total = sum(param.numel() for param in model.parameters())
    whole = set(getattr(model, "_no_split_modules", None) or ())
    layers = [part for part in model.modules() if type(part).__name__ in whole or not list(part.children())]
    largest = max(sum(param.numel() for param in part.parameters()) for part in layers)
    click.echo(f"{model_name}: {total:,} parameters")
    click.echo(f"{'dtype':10} {'largest layer':>14} {'total size':>14} {'training with Adam':>20}")
    for dtype in (*dtypes, *more_dtypes) or tuple(_DTYPES):
        size = _DTYPES[dtype]
        # Weights, gradients and two moments in fp32; half precision keeps fp32 masters beside its weights.
        adam = num_bytes(total * 16) if size >= 2 else "n/a"
        click.echo(f"{dtype:10} {num_bytes(largest * size):>14} {num_bytes(total * size):>14} {adam:>20}")
    click.echo(f"with activations, and on several devices: distui plan --model {model_name}")


@accelerate.command("test", context_settings={**_HELP, "ignore_unknown_options": True})
@click.option("--config_file", type=click.Path(path_type=Path), help="A distui.toml; else that of this folder.")
@click.argument("launch_options", nargs=-1, type=click.UNPROCESSED)
def run_test(config_file: Path | None, launch_options: tuple[str, ...]) -> None:
    """Train a small model on every rank, and compare with one process; the options are those of `distui launch`."""
    import subprocess
    import sys

    from distui.compat.accelerate.test_utils import check

    if config_file is not None and config_file.suffix != ".toml":
        raise UserError(
            f"{config_file} is Accelerate's", "distui's settings are TOML", f"distui config import {config_file}"
        )
    chosen = ["--config", str(config_file)] if config_file is not None else []
    start = [sys.executable, "-m", "distui", "launch", "--no-tui", *chosen, *launch_options, str(check.__file__)]
    status = subprocess.run(start, check=False).returncode
    if status:
        raise SystemExit(status)
    click.echo("Test is a success! You are ready for your distributed training!")


@deepspeed.command("zero_to_fp32")
@click.argument("checkpoint_dir", type=click.Path(path_type=Path))
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option("-t", "--tag", help="Checkpoint in the folder.  [default: the one that `latest` names]")
@click.option("--safe_serialization", is_flag=True, help="safetensors in place of pytorch_model.bin.")
@click.option("--max_shard_size", default="5GB", show_default=True, help="Largest file.")
@click.option("--exclude_frozen_parameters", is_flag=True, help="Trained weights only, of DeepSpeed's checkpoints.")
@click.option("-d", "--debug", is_flag=True, hidden=True)
def zero_to_fp32(
    checkpoint_dir: Path,
    output_dir: Path,
    tag: str | None,
    safe_serialization: bool,
    max_shard_size: str,
    exclude_frozen_parameters: bool,
    debug: bool,
) -> None:
    """Write the whole fp32 weights of a checkpoint, DeepSpeed's or distui's."""
    from distui.compat.deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(
        str(checkpoint_dir), str(output_dir), max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )
    click.echo(f"{output_dir}: written")
