"""The example scripts: five lines between plain PyTorch and distui, and the plain one trains."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from distui.demo import ByteGPT, LossLog, StdlibText
from distui.demo.data import read_stdlib

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def _lines(name: str) -> list[str]:
    return [line.strip() for line in (EXAMPLES / name).read_text().splitlines()]


def test_the_distui_script_changes_five_lines_of_the_plain_one() -> None:
    plain, ours = _lines("train_bytes_torch.py"), _lines("train_bytes.py")
    changes = difflib.SequenceMatcher(a=plain, b=ours, autojunk=False).get_opcodes()
    num_changed = sum(max(a2 - a1, b2 - b1) for kind, a1, a2, b1, b2 in changes if kind != "equal")
    assert 0 < num_changed <= 5
    added = [line for kind, _, _, b1, b2 in changes if kind != "equal" for line in ours[b1:b2]]
    assert all("engine" in line for line in added), added


def test_the_demo_is_the_example() -> None:
    link = ROOT / "distui" / "demo" / "train.py"
    assert link.is_symlink() and link.resolve() == (EXAMPLES / "train_bytes.py").resolve()


def test_the_plain_script_learns(tmp_path: Path) -> None:
    losses_file = tmp_path / "losses.json"
    options = ["--steps", "12", "--layers", "1", "--dim", "32", "--context", "32", "--loss-file", str(losses_file)]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_bytes_torch.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads(losses_file.read_text())
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.3
    assert f"step    10  loss {losses[9]:.4f} nats/byte" in done.stdout


def test_the_text_is_the_same_every_time_and_splits_without_overlap() -> None:
    text = read_stdlib(20_000)
    assert len(text) == 20_000 and text == read_stdlib(20_000) and b"import" in text
    train, validation = (StdlibText(64, split, max_bytes=20_000) for split in ("train", "validation"))
    assert len(train) + len(validation) == (20_000 - 1) // 64 and 0 < len(validation) < len(train)
    sample = train[0]
    assert bytes(sample["input_ids"].tolist()) == text[64:128], "window 0 is kept for validation"
    assert bytes(sample["labels"].tolist()) == text[65:129]
    assert bytes(validation[0]["input_ids"].tolist()) == text[:64]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, text in (("b.py", "2"), ("a/z.py", "1"), ("test/x.py", "no"), ("c.txt", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_stdlib(folder=tmp_path) == b"12"


def test_the_model_is_tied_causal_and_starts_at_chance() -> None:
    torch.manual_seed(0)
    model = ByteGPT(num_layers=2, dim=32, context=16)
    assert model.lm_head.weight is model.token_embedding.weight
    ids, labels = torch.randint(256, (2, 2, 16))
    loss, logits = model(ids, labels)
    assert logits.shape == (2, 16, 256) and loss.dtype == torch.float32 and abs(loss.item() - 5.545) < 0.3
    changed = ids.clone()
    changed[:, 10:] = 0
    assert torch.allclose(model(changed).logits[:, :10], logits[:, :10], atol=1e-5), "no byte sees those after it"
    assert model(ids).loss is None


def test_the_loss_log_averages_micro_batches_of_a_step(tmp_path: Path) -> None:
    log = LossLog(str(tmp_path / "losses.json"), every=2)
    for step, loss in ((0, 1.0), (1, 3.0), (1, 5.0), (2, 7.0)):
        log.add(step, torch.tensor(loss))
    log.close()
    assert json.loads((tmp_path / "losses.json").read_text()) == [2.0, 6.0]
