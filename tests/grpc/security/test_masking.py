"""Secrets in a script's arguments: the script gets them, the run does not keep them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from distui.core.paths import default_runs_dir
from distui.launcher.job.masking import is_secret, masked

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node

SECRETS = re.findall(
    r"\S+",
    """
    password --password --db-password DB_PASSWORD passwd PGPASSWORD passphrase --secret pwd --token --hub_token HF_TOKEN
    hfToken --push-to-hub-token auth_token GITHUB_TOKEN --auth --api-key WANDB_API_KEY wandb.api_key +wandb.api_key
    apikey OpenAIApiKey --access-key AWS_SECRET_ACCESS_KEY --private_key signing_key credentials --bearer
    --openai-key OPENAI_KEY --wandb_key hf-key --hftoken --accesstoken --smtp-pass --pass --cookie --jwt --otp --webhook
    X-Amz-Signature sig --api-keys
    """,
)
NO_SECRETS = re.findall(
    r"\S+",
    """
    --tokenizer --max-tokens --num_tokens --token-budget --pad_token eos_token --mask-token key --sort-key --lr --author
    --monkey -- = --password-file token_path --secret-name --keys --authors -p --compass --passes --tokens_per_batch
    --forward-pass num_pass --bypass --signal --sigma --hub_id --s3-bucket --groupby-key --primary_key --webhook-type
    """,
)


def test_which_names_are_those_of_secrets() -> None:
    assert [name for name in SECRETS if not is_secret(name)] == []
    assert [name for name in NO_SECRETS if is_secret(name)] == []


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["t.py", "--password", "p", "--lr", "1e-3"], ["t.py", "--password", "***", "--lr", "1e-3"]),
        (["t.py", "--token=p", "x"], ["t.py", "--token=***", "x"]),
        (["t.py", "WANDB_API_KEY=p", "lr=1"], ["t.py", "WANDB_API_KEY=***", "lr=1"]),
        (["t.py", "+wandb.api_key=a=b c"], ["t.py", "+wandb.api_key=***"]),
        (["-m", "token", "--api-key", "p"], ["-m", "token", "--api-key", "***"]),
        (["-m", "pkg.train", "data"], ["-m", "pkg.train", "data"]),
        (["t.py", "--password", "--lr", "1"], ["t.py", "--password", "--lr", "1"]),
        (["t.py", "--env", "HF_TOKEN=p"], ["t.py", "--env", "HF_TOKEN=***"]),
        (["t.py", "--env=HF_TOKEN=p"], ["t.py", "--env=HF_TOKEN=***"]),
        (["t.py", '{"lr": 1, "password": "p", "x": 2}'], ["t.py", '{"lr": 1, "password": "***", "x": 2}']),
        (["t.py", "https://u:p@host/x?a=1&token=p&b=2"], ["t.py", "https://***@host/x?a=1&token=***&b=2"]),
        (["t.py", "https://h/?token=p"], ["t.py", "https://h/?token=***"]),
        (["t.py", "https://h/?b=1&c=https://h?token=p"], ["t.py", "https://h/?b=1&c=https://h?token=***"]),
        (["t.py", "password: p"], ["t.py", "password: ***"]),
        (["t.py", """{'password': 'two "words"', "b": 1}"""], ["t.py", """{'password': '***', "b": 1}"""]),
        (["t.py", r'{"a": {"token": "p\"q?r"}, "b": "c"}'], ["t.py", '{"a": {"token": "***"}, "b": "c"}']),
        (["t.py", "-H", "Authorization: Bearer p", "x"], ["t.py", "-H", "Authorization: ***", "x"]),
        (["t.py", "{h: 'x', Authorization: Basic p, lr: 1}"], ["t.py", "{h: 'x', Authorization: ***, lr: 1}"]),
        (["t.py", "postgres://u:p@ss@host/db"], ["t.py", "postgres://***@host/db"]),
        (["t.py", "--api-keys", "p", "q", "--lr", "1"], ["t.py", "--api-keys", "***", "***", "--lr", "1"]),
        (["t.py", "--password", "-p1", "--lr", "1"], ["t.py", "--password", "***", "--lr", "1"]),
        (["t.py", "--token", "-v"], None),
        (["t.py", "--password: p"], ["t.py", "--password: ***"]),
        (["t.py", '{"password": ["p"], "x": 1}'], ["t.py", '{"password": ***, "x": 1}']),
        (
            ["t.py", "https://h/c?sv=1&sig=p%3D&X-Amz-Signature=p"],
            ["t.py", "https://h/c?sv=1&sig=***&X-Amz-Signature=***"],
        ),
        (["t.py", "https://hooks.slack.com/services/T0/B0/p"], ["t.py", "https://hooks.slack.com/***"]),
        (["t.py", "--x", "hf_" + "p" * 34, "x=ghp_" + "p" * 36], ["t.py", "--x", "***", "x=***"]),
        (["t.py", "AKIA" + "P" * 16, "sk-proj-" + "p" * 40], ["t.py", "***", "***"]),
        (["t.py", "eyJhbGciOiJI.eyJzdWIiOiIx.pppp", "hf_small", "sk-learn"], ["t.py", "***", "hf_small", "sk-learn"]),
        (["t.py", "s3://bucket/a@b"], None),
        (["t.py", "--tokenizer", "gpt2", "--note", "user@host: a=b"], None),
        (["t.py", "--password"], None),
        (["t.py"], None),
        ([], None),
    ],
)
def test_what_is_kept_of_arguments(words: list[str], kept: list[str] | None) -> None:
    assert masked(words, "secrets") == (kept or words)
    assert masked(words, "none") == words


def test_a_long_argument_takes_no_longer_than_its_length() -> None:
    for part in (
        "x",
        "a=",
        "a.",
        '"',
        "token: ",
        "://@",
        'token="',
        "token='x",
        "eyJ-",
        "hf_",
        "token=[",
        "a-",
        "://x",
    ):
        masked(["t.py", part * 100_000], "secrets")  # quadratic, it would outlast the test's limit


def test_nothing_is_kept_of_any_value() -> None:
    words = ["t.py", "--lr", "1e-3", "data", "--x=1", "y=2", "-v"]
    assert masked(words, "all") == ["t.py", "--lr", "***", "***", "--x=***", "y=***", "-v"]


@pytest.mark.parametrize("setting", ["secrets", "all", "none"])
def test_the_script_gets_what_the_run_does_not_keep(node: Node, tmp_path: Path, setting: str) -> None:
    node.start()  # ended with the test, unlike one that a launch starts
    long = "x" * 100_000  # more than a pipe holds
    words = ["--password", "hunter2", "API_KEY=hunter2", "--lr", "0.5", "ü \udcff", long, long]
    script = tmp_path / "train.py"
    script.write_text("import json, sys; json.dump(sys.argv[1:], open(sys.argv[0] + '.got', 'w'))")
    command = [sys.executable, "-m", "distui", "launch", "--nproc", "1", "--no-tui"]
    command += ["--set", f"run.mask_arguments={setting}", str(script)]
    done = subprocess.run([*command, *words], capture_output=True, timeout=180, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "train.py.got").read_text()) == words
    (folder,) = default_runs_dir().iterdir()
    kept = json.loads((folder / "run.json").read_text())["command"]
    assert kept[0] == str(script) and len(kept) == 1 + len(words)
    assert ("0.5" in kept) == (setting != "all")
    found = [path for path in folder.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    shown = subprocess.run([sys.executable, "-m", "distui", "report", "-o", "page.html"], cwd=tmp_path, timeout=180)
    assert shown.returncode == 0
    assert bool(found) == ("hunter2" in (tmp_path / "page.html").read_text()) == (setting == "none")
