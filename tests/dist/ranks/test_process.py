"""A process's place among the ranks, and the ways for ranks to wait for each other."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.ranks.process import ProcessState

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _place() -> dict[str, Any]:
    state = ProcessState()
    values = {
        "rank": state.process_index,
        "world": state.num_processes,
        "main": state.is_main_process,
        "local": state.is_local_main_process,
        "last": state.is_last_process,
        "distributed": state.use_distributed,
        "on_main": state.on_main_process(lambda: "ran")(),
        "on_last": state.on_last_process(lambda: "ran")(),
        "on_0": state.on_process(process_index=0)(lambda: "ran")(),
    }
    state.wait_for_everyone()
    state.destroy()
    assert dist.is_initialized() == (state.num_processes > 1), "a group of the user's stays"
    return values


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_rank_knows_its_place(run_ranks: RunRanks, world: int) -> None:
    for rank, place in enumerate(run_ranks(_place, world)):
        first, last = rank == 0, rank == world - 1
        assert place == {
            "rank": rank,
            "world": world,
            "main": first,
            "local": first,
            "last": last,
            "distributed": world > 1,
            "on_main": "ran" if first else None,
            "on_last": "ran" if last else None,
            "on_0": "ran" if first else None,
        }


def _go_in_order(path: str) -> list[bool]:
    state, seen = ProcessState(), []
    for name in ("first", "second"):
        with state.main_process_first():
            if state.is_main_process:
                time.sleep(0.05)  # the others would see no file if they did not wait
                Path(path, name).touch()
            seen.append(Path(path, name).exists())
    if state.is_main_process:
        with pytest.raises(KeyError), state.local_main_process_first():
            raise KeyError
    else:
        with state.local_main_process_first():
            seen.append(True)
    return seen


def test_the_main_process_goes_first_and_its_error_frees_the_others(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(_go_in_order, 3, str(tmp_path)) == [[True, True], [True] * 3, [True] * 3]


def _split(value: Any, apply_padding: bool) -> Any:
    with ProcessState().split_between_processes(value, apply_padding) as part:
        return part


def test_splitting_gives_the_first_ranks_more(run_ranks: RunRanks) -> None:
    assert run_ranks(_split, 3, [1, 2, 3, 4], False) == [[1, 2], [3], [4]]
    assert run_ranks(_split, 3, ["a"], False) == [["a"], [], []]
    assert run_ranks(_split, 1, ["a"], True) == [["a"]]
    parts = run_ranks(_split, 2, {"x": torch.arange(3), "y": list("abc"), "z": (1, 2, 3)}, True)
    assert [(part["x"].tolist(), part["y"], part["z"]) for part in parts] == [
        ([0, 1], ["a", "b"], (1, 2)),
        ([2, 2], ["c", "c"], (3, 3)),
    ]
    with pytest.raises(UserError, match="x: 1, y: 2"):
        run_ranks(_split, 2, {"x": [1], "y": [1, 2]}, False)


def _triggers() -> list[bool]:
    state = ProcessState()
    seen = [state.check_trigger()]
    if state.is_last_process:
        state.set_trigger()
    return [*seen, state.check_trigger(), state.check_trigger()]


@pytest.mark.parametrize("world", [1, 2])
def test_any_rank_can_raise_the_flag(run_ranks: RunRanks, world: int) -> None:
    assert run_ranks(_triggers, world) == [[False, True, False]] * world


def _join_from_environment(port_file: str) -> int:
    dist.destroy_process_group()
    rank = int(os.environ["RANK"])
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        Path(port_file + ".tmp").write_text(str(store.port))
        Path(port_file + ".tmp").rename(port_file)
    while not Path(port_file).exists():
        time.sleep(0.01)
    # As under torch elastic: the agent's store is there already, and no rank serves it.
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(port_file).read_text(), TORCHELASTIC_USE_AGENT_STORE="True"
    )
    state = ProcessState()
    total = torch.tensor([state.process_index + 1])
    dist.all_reduce(total)
    state.wait_for_everyone()
    state.destroy()
    assert not dist.is_initialized()
    return int(total.item())


def test_the_environment_of_torchrun_makes_the_group(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(_join_from_environment, 2, str(tmp_path / "port")) == [3, 3]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no rank"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=2 is not among WORLD_SIZE=2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ProcessState()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_wanted_must_be_there() -> None:
    with pytest.raises(UserError, match=r"run\.device=cuda"):
        ProcessState("cuda")


def test_printing_and_refusing_alone(capsys: pytest.CaptureFixture[str]) -> None:
    state = ProcessState()
    state.print("hello", end="!")
    assert capsys.readouterr().out == "hello!"
    with pytest.raises(UserError, match="process_index=1"):
        state.on_process(process_index=1)
