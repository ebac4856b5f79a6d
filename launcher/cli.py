"""The `distui` command: a lazy click group, so that `--help` and a typing error cost a few milliseconds.

Exit status: 0 done, 1 a bug in distui, 2 the user's mistake, 3 a rank failed, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import click

from distui import __version__
from distui.core.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, DistuiError, NotOwn, UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {
    "setup": "Write a config step by step: hardware, model, strategy, review.",
    "plan": "Rank every strategy by predicted memory and throughput.",
    "launch": "Start a training script on every rank.",
    "runs": "List the jobs of this user.",
    "attach": "Have a job in the background before you again.",
    "logs": "Print what a rank has printed.",
    "stop": "End a job.",
    "monitor": "Watch a running or finished run live.",
    "status": "Print one snapshot of a run, for people or as JSON.",
    "tune": "Measure the first few plans, and keep the fastest.",
    "report": "Write a run on one page, or its telemetry as tables.",
    "why": "Tell where the time of a step goes, and what to do.",
    "compare": "Put runs side by side.",
    "control": "Act on a running job: checkpoint, stacks, profile, stop.",
    "cluster": "Say what each host has, and who reaches whom.",
    "checkpoint": "Look into checkpoints, and merge them to safetensors.",
    "config": "Show, check or describe the settings.",
    "daemon": "Run this node's telemetry daemon in the foreground.",
    "doctor": "Say what this machine has and what is broken.",
    "completion": "Print what completes distui's commands in a shell.",
    "as": "Do what a command of Accelerate or DeepSpeed does.",
    "demo": "Train a small GPT on the Python standard library's text.",
}
"""Command -> one line of help; the module of its name in launcher/commands has the click command `command`."""
_FILES = {"as": "compat.commands", "cluster": "cluster.command", "completion": "completion"}
"""Modules that are elsewhere, or cannot have the command's name."""


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the loaded command; None where there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"distui.launcher.{_FILES.get(cmd_name, f'commands.{cmd_name}')}").command
        assert isinstance(command, click.Command)
        import_module("distui.launcher.examples").add_examples(cmd_name, command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that begin so, without loading a module: a Tab is not to be waited for."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        from click.shell_completion import CompletionItem

        return [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without loading a module."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, line in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names.

        Raises:
            UserError: there is none; the report has the nearest name.
        """
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            raise UserError(
                f"no command is called {args[0]!r}",
                f"the commands are {', '.join(COMMANDS)}",
                f"distui {near[0]}" if near else "distui --help",
            )
        return super().resolve_command(ctx, args)


EXAMPLES = """\b
Examples:
  distui demo
  distui setup
  distui launch --nproc 8 --zero 2 train.py
  distui monitor"""


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(__version__, prog_name="distui")
def cli() -> None:
    """Train PyTorch models on more than one device: plan it, launch it, watch it."""


def _usage_error(error: click.ClickException) -> UserError:
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "distui"
    usage = context.command.get_usage(context).removeprefix("Usage: ") if context else "distui --help"
    what, fix = error.format_message().rstrip("."), f"{where} --help"
    if isinstance(error, click.NoSuchOption):
        import difflib

        what = f"No such option {error.option_name!r}"
        near = difflib.get_close_matches(error.option_name, error.possibilities or [], n=1, cutoff=0.0)
        fix = f"write {near[0]}" if near else fix
    elif possibilities := getattr(error, "possibilities", None):
        fix = f"write {' or '.join(sorted(possibilities))}"
    return UserError(what, " ".join(usage.split()), fix)


def _tell(text: str) -> None:
    """Write an error to stderr: it may have words of ranks and of daemons in it."""
    from distui.core.telemetry.harmless import harmless

    print(harmless(text, lines=True), file=sys.stderr)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; errors are told on stderr."""
    try:
        status = cli.main(list(arguments), prog_name="distui", standalone_mode=False)
        return status if isinstance(status, int) else EXIT_OK
    except click.exceptions.Abort:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        # A group without a command: its message is its help (click 8.1 prints that by itself).
        is_help = isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ()))
        print(error.format_message() if is_help else _usage_error(error).report(), file=sys.stderr)
        return EXIT_USER
    except (UserError, NotOwn) as error:
        told = error if isinstance(error, UserError) else error.told()
        _tell(told.report())
        return told.exit_status
    except DistuiError as error:
        _tell(f"error: {error}")
        return error.exit_status
    except Exception:  # noqa: BLE001  the last frame of the program: a bug is told in full
        import traceback

        traceback.print_exc()
        print(
            f"\nThis is a bug in distui {__version__} (Python {sys.version.split()[0]}). "
            "Please report the lines above with the command that you ran.",
            file=sys.stderr,
        )
        return EXIT_BUG


def main() -> None:
    """Be the console script `distui`."""
    sys.exit(run(sys.argv[1:]))
