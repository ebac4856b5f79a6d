"""The command itself: help costs nothing, mistakes get three lines, bugs get a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import distui
from distui.core.errors import DaemonUnavailable
from distui.launcher import cli
from distui.launcher.commands import config as config_command

LOADED = """
import json, sys
from distui.launcher.cli import run
status = run({arguments})
print(json.dumps([status, sorted({{name.partition(".")[0] for name in sys.modules}}),
                  sorted(name for name in sys.modules if name.startswith("distui"))]), file=sys.stderr)
"""


def loaded_by(*arguments: str) -> tuple[int, set[str], set[str]]:
    code = LOADED.format(arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, packages, ours = json.loads(done.stderr.splitlines()[-1])
    return status, set(packages), set(ours)


def test_help_lists_every_command_and_imports_nothing_but_click() -> None:
    status, packages, ours = loaded_by("--help")
    assert status == 0 and "click" in packages
    heavy = {"torch", "numpy", "pydantic", "rich", "textual", "grpc", "google", "zmq", "psutil", "tomlkit", "asyncio"}
    assert packages & heavy == set()
    assert ours == {"distui", "distui.core", "distui.core.errors", "distui.launcher", "distui.launcher.cli"}


def test_starting_a_job_imports_no_torch() -> None:
    _, packages, ours = loaded_by("launch", "no_such_script.py")
    assert "distui.launcher.job.launch" in ours
    assert packages & {"torch", "textual", "grpc"} == set()


def test_help_has_one_line_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        assert any(text.split() == [name, *line.split()] for text in shown.splitlines()), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"distui, version {distui.__version__}"


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["lunch"], "no command is called 'lunch'", "distui launch"),
        (["--frobnicate"], "No such option '--frobnicate'", "distui --help"),
        (["launch", "--zro", "2", "x.py"], "No such option '--zro'", "--zero"),
        (["launch"], "Missing argument 'SCRIPT'", "distui launch --help"),
        (["launch", "--set", "strategy.zero_stage", "x.py"], "--set strategy.zero_stage sets nothing", "=8"),
        (
            ["control", "x", "explode"],
            "'explode' is not one of 'checkpoint', 'stacks', 'profile', 'stop', 'log-level'",
            "--help",
        ),
        (["config", "import", "ds.json"], "cannot read ds.json", "JSON or YAML"),
        (["monitor", "--port", "8000"], "--port without --web", "add --web"),
        (["monitor", "host1", "host2"], "2 runs were named", "name one"),
    ],
)
def test_a_mistake_gets_what_why_fix_and_exit_2(
    arguments: list[str], what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    first, why, last = captured.err.splitlines()
    assert captured.out == ""
    assert first.startswith("error: ") and what in first
    assert why.startswith("  why: ") and len(why) > 8
    assert last.startswith("  fix: ") and fix in last


def test_a_bug_exits_1_with_its_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_command.schema, "callback", lambda **_: 1 / 0)
    assert cli.run(["config", "schema"]) == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told and "bug in distui" in told


def test_other_errors_of_ours_exit_with_their_status_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(**_: object) -> None:
        raise DaemonUnavailable("nobody answers")

    monkeypatch.setattr(config_command.schema, "callback", away)
    assert cli.run(["config", "schema"]) == 1
    assert capsys.readouterr().err == "error: nobody answers\n"


def commands_of(name: str, command: click.Command) -> list[tuple[str, click.Command]]:
    inner = getattr(command, "commands", {})
    return [pair for part, each in inner.items() for pair in commands_of(f"{name} {part}", each)] or [(name, command)]


def test_every_help_has_examples_that_the_command_line_takes() -> None:
    context = click.Context(cli.cli)
    for name in cli.COMMANDS:
        command = cli.cli.get_command(context, name)
        assert command is not None
        for path, each in commands_of(name, command):
            help_text = each.get_help(click.Context(each, info_name=f"distui {path}"))
            _, _, examples = help_text.partition("Examples:\n")
            assert examples.strip(), f"distui {path} --help has no examples"
            for line in examples.strip().splitlines():
                words = line.strip().partition(" >")[0].split()
                assert words[: 1 + len(path.split())] == ["distui", *path.split()]
                each.make_context(path, words[1 + len(path.split()) :])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["completion", shell]) == 0
    assert f"_DISTUI_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_bash_completes_commands_and_options() -> None:
    script = 'eval "$(distui completion bash)"; complete -p distui; COMP_WORDS=(distui launch --npr); COMP_CWORD=2; '
    script += "_distui_completion distui; echo ${COMPREPLY[@]}; COMPREPLY=(); COMP_WORDS=(distui la); "
    script += "COMP_CWORD=1; "
    script += "_distui_completion distui; echo ${COMPREPLY[@]}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.stdout.splitlines()[1:] == ["--nproc", "launch"], done


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["launch", "--nprok", "2", "train.py"], "  fix: write --nproc"),
        (["launch", "--set", "strategy.zero=2", "train.py"], "  fix: write strategy.zero_stage"),
        (["launch", "--set", "strategy.tensor_paralel=2", "train.py"], "  fix: write strategy.tensor_parallel"),
    ],
)
def test_a_near_name_is_suggested_alone(arguments: list[str], fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    assert capsys.readouterr().err.splitlines()[2] == fix
