"""Checkpoints that somebody crafted: whoever reads one, nothing in it is run, and it is told for what it is."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distui
from distui.compat.deepspeed.saving import _plain
from distui.core.checkpoint.formats.opening import open_checkpoint
from distui.core.checkpoint.plain import Plain, read_plain
from distui.core.checkpoint.reshard import reshard
from distui.core.checkpoint.weights import read_weights
from distui.core.errors import UserError
from distui.core.ranks.random_states import RandomStates

FORMAT_1 = Path(__file__).with_name("format1.zip")


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _old_job() -> distui.Engine:
    engine = distui.Engine()
    model = nn.Module()
    model.embedding = nn.Embedding(7, 40)
    model.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))
    model.norm = nn.BatchNorm1d(40)
    model.head = nn.Linear(40, 7, bias=False)
    model.head.weight = model.embedding.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine.prepare(model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    engine.prepare(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2)), batch_size=2))
    engine.register_for_checkpointing(nn.Linear(1, 1))
    return engine


def _readers(folder: Path, engine: Callable[[], distui.Engine]) -> dict[str, Callable[[], object]]:
    return {
        "load_state": lambda: engine().load_state(str(folder)),
        "load_state, not strict": lambda: engine().load_state(str(folder), strict=False),
        "consolidate": lambda: read_weights(folder, tied=True),
        "reshard": lambda: reshard(folder, folder.parent / "out", 2),
    }


def _pickled(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _replace_1(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of format 1, checksum included."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _padded(content: bytes, length: int) -> bytes:
    """Return a file of torch.save with a comment that makes it so long."""
    packed = io.BytesIO(content)
    with zipfile.ZipFile(packed, "a") as archive:
        archive.comment = b"x" * (length - len(content))
    return packed.getvalue()


@pytest.mark.parametrize("name", [".metadata", "state.pt", "rank0.pt", "__0_0.distcp"])
def test_pickles_of_format_1_are_not_run(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(FORMAT_1) as packed:
        packed.extractall(tmp_path)
    folder, ran = tmp_path / "ck", tmp_path / "ran"
    evil = pickle.dumps(Evil(ran)) if name == ".metadata" else _pickled({"step": Evil(ran)})
    content = evil
    if name.endswith("distcp"):  # in the place of the first tensor
        chunks = [chunk for entry in open_checkpoint(folder).entries.values() for chunk in entry.chunks]
        first = next(chunk for chunk in chunks if chunk.file == name and chunk.offset == 0)
        evil = _padded(evil, first.nbytes)
        content = evil + (folder / name).read_bytes()[first.nbytes :]
    _replace_1(folder, name, content)
    told = 0
    for reader in _readers(folder, _old_job).values():
        try:
            reader()
        except UserError:
            told += 1
        assert not ran.exists()
    assert told >= 2
    pickle.loads(evil) if name == ".metadata" else torch.load(io.BytesIO(evil), weights_only=False)
    assert ran.exists(), "it would have run"


# ---- format 2 --------------------------------------------------------------------------------------------------------


def _job() -> distui.Engine:
    engine = distui.Engine()
    model = nn.Linear(3, 2)
    engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    engine.register_for_checkpointing(nn.Linear(1, 1))
    return engine


def _rewrite(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file with the data, and have the manifest agree."""
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / manifest["data"] / name
    found = json.loads(path.read_text())
    changed = change(found)
    content = json.dumps(found if changed is None else changed).encode()
    path.write_bytes(content)
    fact = manifest["files"][f"{manifest['data']}/{name}"]
    fact |= {"bytes": len(content), "crc32": [zlib.crc32(content)]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = to

    return change


WEIGHT = ("tensors", "model0.weight")
DEEP: Any = []
for _ in range(5000):
    DEEP = [DEEP]
INDEX_CHANGES: list[Callable[[Any], Any]] = [
    _set(*WEIGHT, 2, 0, 0, to="../../../etc/passwd"),
    _set(*WEIGHT, 2, 0, 0, to="/etc/passwd"),
    _set(*WEIGHT, 2, 0, 1, to=-8),
    _set(*WEIGHT, 2, 0, 1, to=10**12),
    _set(*WEIGHT, 2, 0, 3, to=10**12),
    _set(*WEIGHT, 2, 0, 3, to=5),
    _set(*WEIGHT, 2, 0, 3, to="6"),
    _set(*WEIGHT, 0, to="os.system"),
    _set(*WEIGHT, 0, to=["float32"]),
    _set(*WEIGHT, 1, to=[10**30]),
    _set(*WEIGHT, 1, to=[-1]),
    _set(*WEIGHT, 2, to=[]),
    _set("tensors", to=[]),
    _set("numbers", to={"optimizer0.weight.step": {"a": 1}}),
    lambda found: [],
    lambda found: None if found.clear() else {},
]
COMMON_CHANGES: list[Callable[[Any], Any]] = [
    _set("tree", to={"$import": "os"}),
    _set("tree", "registered objects", to={"$tensor": ["float32", [10**15], ""]}),
    _set("tree", "registered objects", to={"$tensor": ["float32", [4], 7]}),
    _set("tree", "registered objects", to={"$tensor": ["os.system", [1], "AAAA"]}),
    _set("tree", "registered objects", to={"$array": ["O", [1], "AAAAAAAAAAA="]}),
    _set("tree", "registered objects", to={"$default": ["os.system", []]}),
    _set("tree", "registered objects", to={"$dtype": "__class__"}),
    _set("tree", "registered objects", to={"$set": [[1]]}),
    lambda found: found.update(file="../../secret", places=[[0, 4]], tree={"$tensor": ["float32", [1], 0]}),
    lambda found: [],
]
MANIFEST_CHANGES: list[Callable[[Any], Any]] = [
    _set("data", to="../.."),
    _set("data", to=""),
    _set("lineage", to="../../../tmp"),
    _set("files", to={"../../etc/passwd": {"bytes": 1, "crc32": 1}}),
    _set("files", to={"/etc/passwd": {"bytes": 1, "crc32": 1}}),
    _set("files", to={"..": {"bytes": 1, "crc32": 1}}),
    _set("files", to={"a": {"bytes": -1, "crc32": 1}}),
    _set("files", to={"a": {"bytes": 1, "crc32": "x"}}),
    _set("files", to={"a": 1}),
    _set("shapes", to={"model0.weight": ["x"]}),
    _set("format", to=99),
    _set("step", to="1"),
]


def _told(folder: Path) -> None:
    for name, reader in _readers(folder, _job).items():
        with pytest.raises(UserError):
            reader()
            pytest.fail(name)
    assert not (folder.parent / "out").exists(), "nor is half of it left"


@pytest.mark.parametrize("change", INDEX_CHANGES)
def test_an_index_that_lies_is_told(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    _job().save_state(str(tmp_path / "ckpt"))
    _rewrite(tmp_path / "ckpt", "index.json", change)
    _told(tmp_path / "ckpt")


@pytest.mark.parametrize("change", COMMON_CHANGES)
def test_states_that_lie_are_told(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    _job().save_state(str(tmp_path / "ckpt"))
    _rewrite(tmp_path / "ckpt", "common.json", change)
    for name, reader in _readers(tmp_path / "ckpt", _job).items():
        if name != "consolidate":  # which reads weights only
            with pytest.raises(UserError):
                reader()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", MANIFEST_CHANGES)
def test_a_manifest_that_lies_is_told(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    _job().save_state(str(tmp_path / "ckpt"))
    path = tmp_path / "ckpt" / "manifest.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    _told(tmp_path / "ckpt")


def test_nesting_without_end_is_told(tmp_path: Path) -> None:
    _job().save_state(str(tmp_path / "ckpt"))
    text = "[" * 100_000 + "]" * 100_000
    for name in ("index.json", "common.json", "rank00000.json"):
        folder = tmp_path / name
        _job().save_state(str(folder))
        _rewrite(folder, name, lambda found: [])
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / manifest["data"] / name).write_text(text)
        fact = manifest["files"][f"{manifest['data']}/{name}"]
        fact |= {"bytes": len(text), "crc32": [zlib.crc32(text.encode())]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError):
            _job().load_state(str(folder))
    (tmp_path / "ckpt" / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        _job().load_state(str(tmp_path / "ckpt"))


# ---- plain data ------------------------------------------------------------------------------------------------------


def test_what_only_pickle_could_keep_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    class Held:
        def __init__(self, value: Any) -> None:
            self.value = value

        def state_dict(self) -> dict[str, Any]:
            return {"best": [1.0, self.value]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["best"][1]

    engine = distui.Engine()
    held = Held(lambda: None)
    engine.register_for_checkpointing(held)
    for value, named in ((lambda: None, "function"), (Held(1), "Held"), (torch.zeros(2).to_sparse(), "sparse")):
        held.value = value
        with pytest.raises(UserError) as caught:
            engine.save_state(str(tmp_path / "ckpt"))
        assert "the state['registered objects'][0]['best'][1] cannot be saved" in caught.value.what
        assert named in caught.value.why and "plain data" in caught.value.fix
    assert not (tmp_path / "ckpt").exists()
    cycle: list[Any] = []
    cycle.append(cycle)
    held.value = cycle
    with pytest.raises(UserError, match="contains itself"):
        engine.save_state(str(tmp_path / "ckpt"))


def test_plain_data_come_back_as_they_were() -> None:
    import argparse
    from collections import Counter, OrderedDict, defaultdict, deque
    from datetime import datetime

    import numpy as np

    value = {
        "numbers": [None, True, 3, 10**40, 0.1, float("inf"), 2 + 3j, np.float64(0.3), np.int8(-3)],
        "texts": ("a", b"b", bytearray(b"c"), Path("d/e"), datetime(2020, 2, 3, 4, 5)),
        "sets": [{1, 2}, frozenset({3}), range(2, 9, 3)],
        "mappings": [
            {1: 2, (3, 4): [5]},
            {"$tuple": [1]},
            OrderedDict(b=1, a=2),
            Counter("abca"),
            defaultdict(list, {"x": [1]}),
            deque([1, 2], maxlen=2),
            argparse.Namespace(lr=0.1, args=["x"]),
        ],
        "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")],
    }
    plain = Plain(value, "it")
    found = read_plain(json.loads(json.dumps(plain.tree, allow_nan=False)), "it", lambda number: bytearray())
    assert found == value and not plain.tensors
    assert [type(item) for item in found["mappings"]] == [type(item) for item in value["mappings"]]
    assert type(found["numbers"][7]) is np.float64 and found["mappings"][4].default_factory is list
    tensors: list[Any] = [
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor(3, dtype=torch.int8),
        torch.zeros(0, 4),
        torch.randn(9).bfloat16(),
        torch.tensor([1 + 2j]).conj(),
        nn.Parameter(torch.ones(2)),
        torch.randn(20_000),
    ]
    plain = Plain(tensors, "it")
    data = [bytearray(tensor.numpy().tobytes()) for tensor in plain.tensors]
    assert len(data) == 1, "the large one stands beside the tree"
    again = read_plain(json.loads(json.dumps(plain.tree)), "it", lambda number: data[number])
    for tensor, one in zip(tensors, again, strict=True):
        assert torch.equal(tensor.detach().resolve_conj(), one) and tensor.dtype == one.dtype


def test_random_states_come_back_through_plain_data() -> None:
    import random

    import numpy as np

    random.gauss(0, 1)
    np.random.randn()
    states = RandomStates.take()
    expected = torch.rand(2).tolist(), random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()
    plain = Plain(states.state_dict(), "it")
    RandomStates.of(read_plain(json.loads(json.dumps(plain.tree)), "it", lambda number: bytearray())).give_back()
    assert (
        torch.rand(2).tolist(),
        random.gauss(0, 1),
        random.random(),
        np.random.randn(),
        np.random.rand(),
    ) == expected


def test_a_client_state_of_format_1_is_not_run(tmp_path: Path) -> None:
    packed = torch.frombuffer(bytearray(_pickled({"args": Evil(tmp_path / "ran")})), dtype=torch.uint8)
    with pytest.raises(UserError, match="reading it could run code"):
        _plain(packed, "client_state")
    assert not (tmp_path / "ran").exists()
    packed = torch.frombuffer(bytearray(_pickled({"epoch": 3})), dtype=torch.uint8)
    assert _plain(packed, "client_state") == {"epoch": 3}
