"""`distui checkpoint`: look into what save_state wrote, export its weights, lay it out anew; in one process."""

from __future__ import annotations

import json
from pathlib import Path

import click

from distui.core.errors import UserError
from distui.core.telemetry.harmless import harmless


@click.group("checkpoint", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look into checkpoints, merge them to safetensors, and lay them out for other ranks."""


@command.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The manifest, for other programs.")
def inspect_checkpoint(folder: Path, as_json: bool) -> None:
    """Check every file of FOLDER against its checksum, and print what it holds."""
    from distui.core.checkpoint.folder import find, verify
    from distui.tui.format import count, num_bytes

    source = find(with_latest(folder.absolute()))
    manifest = verify(source)
    if as_json:
        click.echo(json.dumps(manifest, indent=1))
        return
    files, shapes = manifest["files"], manifest["shapes"]
    assert isinstance(files, dict) and isinstance(shapes, dict)
    total = sum(fact["bytes"] for fact in files.values())
    _say(f"{source}: step {manifest['step']}, whole: {len(files)} files, {num_bytes(total)}, all checksums match")
    backend = manifest.get("backend", "native")
    _say(
        f"saved by {manifest['world_size']} rank(s) under {'' if backend == 'native' else f'{backend} '}"
        f"ZeRO-{manifest['zero_stage']}, {manifest['dtype']}; any number of ranks, any stage and backend loads it"
    )
    num_parameters = 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        num_parameters += size
        _say(f"  {name}  {' x '.join(map(str, shape)) or 'scalar'}")
    _say(f"{len(shapes)} parameters, {count(num_parameters)} values")


@command.command("consolidate")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--max-shard-size", default="10GB", show_default=True, help="Largest file.")
def consolidate(folder: Path, output: Path, max_shard_size: str) -> None:
    """Write the weights in FOLDER to OUTPUT as safetensors, which Hugging Face loaders read.

    FOLDER is a checkpoint of distui's or of DeepSpeed's (ZeRO 0 to 3; the folder with `latest`, or one tag's).
    """
    from distui.core.checkpoint.export import parse_size, write_safetensors
    from distui.core.checkpoint.formats import deepspeed_files
    from distui.core.checkpoint.weights import read_weights

    limit = parse_size(max_shard_size)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already", "nothing is overwritten", "name a new or an empty folder")
    folder = with_latest(folder.absolute())
    if deepspeed_files.is_deepspeed(folder):
        saved = deepspeed_files.read(folder, optimizer_states=False)
        models = {"": {name: value for name, value in saved.weights.items() if name not in saved.tied}}
        _say(
            f"{saved.folder}: DeepSpeed {saved.version}, ZeRO-{saved.stage} on {saved.world_size} rank(s), "
            f"step {saved.global_steps}"
        )
    else:
        models = read_weights(folder, tied=False)
    for model, tensors in models.items():
        place = output if len(models) == 1 else output / model
        place.mkdir(parents=True, exist_ok=True)
        names = write_safetensors(tensors, place, limit)
        _say(f"{place}: {len(tensors)} tensors in {len(names)} file{'s' if len(names) > 1 else ''}")


def _say(text: str) -> None:
    """Print a line; names in a checkpoint are whatever somebody wrote there."""
    click.echo(harmless(text))


def with_latest(folder: Path) -> Path:
    """Return the folder that `latest` in it names, as `save_checkpoint` of `--as deepspeed` writes it, or itself."""
    latest = folder / "latest"
    return folder / latest.read_text(encoding="utf-8").strip() if latest.is_file() else folder


@command.command("reshard")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--ranks", required=True, type=click.IntRange(min=1), help="Number of ranks to lay it out for.")
@click.option("--stage", type=click.IntRange(0, 3), help="ZeRO stage that it is for.  [default: as it was saved]")
def reshard(folder: Path, output: Path, ranks: int, stage: int | None) -> None:
    """Write the state in FOLDER to OUTPUT, bit for bit, in the files that another number of ranks would write.

    Training needs it not: any number of ranks and any stage loads any checkpoint as it is.
    """
    from distui.core.checkpoint.reshard import reshard as lay_out
    from distui.tui.format import num_bytes

    facts = lay_out(folder.absolute(), output.absolute(), ranks, stage)
    click.echo(
        f"{output}: step {facts['step']} for {ranks} rank{'s' if ranks > 1 else ''} under ZeRO-{facts['zero_stage']}, "
        f"{num_bytes(facts['bytes'])}; any other number of ranks and stage loads it as well"
    )
