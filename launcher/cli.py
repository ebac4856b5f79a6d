"""The `distui` command: a lazy click group, so that `--help` and a typing error cost a few milliseconds.

Exit status: 0 done, 1 a bug in distui, 2 the user's mistake, 3 a rank failed, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import click

from distui import __version__
from distui.core.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, DistuiError, UserError

COMMANDS = {
    "setup": ("setup_command", "Write a config step by step: hardware, model, strategy, review."),
    "plan": ("plan_command", "Rank every strategy by predicted memory and throughput."),
    "launch": ("launch_command", "Start a training script on every rank."),
    "monitor": ("monitor_command", "Watch a running or finished run live."),
    "status": ("status_command", "Print one snapshot of a run, for people or as JSON."),
    "report": ("report_command", "Write a run on one page, or its telemetry as tables."),
    "control": ("control_command", "Act on a running job: checkpoint, stacks, profile, stop."),
    "checkpoint": ("checkpoint_command", "Look into checkpoints, and merge them to safetensors."),
    "config": ("config_command", "Show, check or describe the settings."),
    "daemon": ("daemon_command", "Run this node's telemetry daemon in the foreground."),
    "doctor": ("doctor_command", "Say what this machine has and what is broken."),
    "demo": ("demo_command", "Train a small GPT on the Python standard library's text."),
}
"""Command -> (module of the launcher package that has a click command named `command`, one line of help)."""


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the loaded command; None where there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command = import_module(f"distui.launcher.{module}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without loading a module."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names.

        Raises:
            UserError: there is none; the report has the nearest name.
        """
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            raise UserError(
                f"no command is called {args[0]!r}",
                f"the commands are {', '.join(COMMANDS)}",
                f"distui {near[0]}" if near else "distui --help",
            )
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distui")
def cli() -> None:
    """Train PyTorch models on more than one device: plan it, launch it, watch it."""


def _usage_error(error: click.ClickException) -> UserError:
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "distui"
    usage = context.command.get_usage(context).removeprefix("Usage: ") if context else "distui --help"
    possibilities = getattr(error, "possibilities", None)
    fix = f"write {' or '.join(sorted(possibilities))}" if possibilities else f"{where} --help"
    return UserError(error.format_message().rstrip("."), " ".join(usage.split()), fix)


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
    except UserError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_status
    except DistuiError as error:
        print(f"error: {error}", file=sys.stderr)
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
