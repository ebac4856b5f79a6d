"""`distui completion`: completion of commands and options in a shell, by click."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print what makes SHELL complete distui's commands and options with Tab; put it where the shell reads it."""
    from click.shell_completion import get_completion_class

    from distui.launcher.cli import cli

    found = get_completion_class(shell)
    assert found is not None, shell
    script = found(cli, {}, "distui", "_DISTUI_COMPLETE").source()
    click.echo(script)
