"""`distui launch --as deepspeed`: a script runs unchanged, with the flags of DeepSpeed's launcher and its hostfile."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from distui.core.errors import UserError
from distui.launcher.compat.deepspeed_flags import choose, config_path, place, read_hostfile

Launch = Callable[..., subprocess.CompletedProcess[str]]

SCRIPT = """\
import argparse
import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.accelerator import get_accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
args = deepspeed.add_config_arguments(parser).parse_args()
deepspeed.init_distributed()
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
data = torch.utils.data.TensorDataset(torch.ones(24, 4))
engine, _, loader, _ = deepspeed.initialize(args=args, model=model, training_data=data)
for (x,) in loader:
    engine.backward(engine(x.to(engine.device)).pow(2).mean())
    engine.step()
if engine.global_rank == 1:
    print("local rank", args.local_rank)
engine.engine.print(engine.global_steps, "steps at stage", engine.zero_optimization_stage(), engine.get_lr())
engine.save_checkpoint("ck")
"""
JSON = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "steps_per_print": 2,
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A script and its JSON."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "ds.json").write_text(json.dumps(JSON))
    return tmp_path


def test_a_script_runs_unchanged_and_its_checkpoint_is_merged(launch: Launch, project: Path) -> None:
    command = ["--as", "deepspeed", "--num_gpus", "2", "--zero", "3", "train.py", "--deepspeed_config", "ds.json"]
    done = launch(*command, cwd=project)
    assert done.returncode == 0, done.stderr
    assert "3 steps at stage 3 [0.01]" in done.stdout  # the command line's stage wins over the JSON's
    assert "step=2, skipped=0, lr=[0.01]" in done.stdout
    from click.testing import CliRunner

    from distui.launcher.commands.checkpoint import command as checkpoint

    merged = CliRunner().invoke(checkpoint, ["consolidate", str(project / "ck"), str(project / "out")])
    assert merged.exit_code == 0, merged.output
    assert (project / "out" / "model.safetensors").is_file() and "4 tensors in 1 file" in merged.output


def test_what_is_wrong_is_told_before_anything_starts(launch: Launch, project: Path) -> None:
    (project / "ds.json").write_text(json.dumps(JSON | {"gradient_cliping": 1.0, "zero_optimisation": {"stage": 3}}))
    done = launch("--as", "deepspeed", "--num_gpus", "2", "train.py", "--deepspeed_config", "ds.json", cwd=project)
    assert done.returncode == 2
    assert "error: gradient_cliping: unknown key" in done.stderr and "fix: write gradient_clipping" in done.stderr
    assert "zero_optimisation.stage" in done.stderr
    done = launch("--num_gpus", "2", "train.py", cwd=project)
    assert done.returncode == 2 and "--num_gpus without --as deepspeed" in done.stderr.replace(
        "--num_accelerators", "--num_gpus"
    )


HOSTS = "# the cluster\nalpha slots=4\nbeta slots=4  # spare\n\ngamma slots=2\n"


def test_hostfile_and_filters(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(HOSTS)
    pool = read_hostfile(hostfile)
    assert {host: len(slots) for host, slots in pool.items()} == {"alpha": 4, "beta": 4, "gamma": 2}
    assert choose(pool, "beta@alpha:0,2", "") == {"alpha": [0, 2], "beta": [0, 1, 2, 3]}
    assert choose(pool, "", "alpha@beta:0") == {"beta": [1, 2, 3], "gamma": [0, 1]}
    for include, exclude in (("delta", ""), ("gamma:2", ""), ("alpha:x", ""), ("", "alpha@beta@gamma")):
        with pytest.raises(UserError):
            choose(pool, include, exclude)
    for wrong in ("alpha 4\n", "alpha slots=2\nalpha slots=2\n", "# nobody\n"):
        hostfile.write_text(wrong)
        with pytest.raises(UserError):
            read_hostfile(hostfile)
    with pytest.raises(UserError):
        read_hostfile(tmp_path / "absent")


def test_flags_become_settings_of_this_node(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(HOSTS)
    flags = {"hostfile": str(hostfile)}
    one = place({**flags, "include": "beta:1,3"}, ["t.py"], {"beta"})
    assert one.overrides == {"cluster.nproc": "2"} and one.environment == {"CUDA_VISIBLE_DEVICES": "1,3"}
    two = place({**flags, "num_nodes": "2", "no_ssh": True, "ds_master_port": "1234"}, ["t.py"], {"beta"})
    assert two.overrides == {
        "cluster.nproc": "4",
        "cluster.nodes": "2",
        "cluster.master_addr": "alpha",
        "cluster.master_port": "1234",
        "cluster.node_rank": "1",
    }
    assert place({"num_gpus": "3", "no_local_rank": True}, ["t.py"]).overrides == {"cluster.nproc": "3"}
    with pytest.raises(UserError, match="does not log in") as refused:
        place({**flags, "num_nodes": "2"}, ["t.py", "--lr", "1"], {"alpha"})
    assert (
        "on beta: distui launch --as deepspeed --nproc 4 --nodes 2 --node-rank 1 --master-addr alpha"
        in refused.value.fix
    )
    for wrong in (
        {**flags},  # four slots, and two
        {**flags, "include": "beta", "num_gpus": "1"},
        {**flags, "num_gpus": "3"},
        {**flags, "include": "gamma"},  # another machine
        {"ds_launcher": "openmpi"},
        {"autotuning": "run"},
        {"num_nodes": "2"},
        {"num_gpus": "many"},
        {"exclude": "localhost:0"},
    ):
        with pytest.raises(UserError):
            place(wrong, ["t.py"], {"alpha"})
    assert (
        config_path(["--deepspeed_config=a.json"])
        == config_path(["x", "--deepspeed_config", "a.json"])
        == Path("a.json")
    )
