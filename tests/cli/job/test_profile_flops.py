"""`distui launch --profile-flops`, end to end on two ranks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

SCRIPT = """
import torch, distui
engine = distui.Engine()
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
data = torch.utils.data.TensorDataset(torch.randn(24, 16))
loader = torch.utils.data.DataLoader(data, batch_size=8)
model, optimizer, loader = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
for (x,) in loader:
    engine.backward(model(x).square().mean())
    optimizer.step()
    optimizer.zero_grad()
engine.end_training()
"""


def test_the_table_is_shown_at_the_end_and_kept(
    home: Any, distui: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = home.script("flops/profiled.py", SCRIPT)
    done = distui("launch", "--nproc", "2", "--zero", "3", "--profile-flops", "--no-tui", str(script))
    assert done.returncode == 0, done.stderr
    run = home.run_named("profiled")
    table = run.flops.read_text(encoding="utf-8")
    assert table in done.stdout
    assert f"kept in {run.flops}" in done.stdout
    (whole,) = [line for line in table.splitlines() if line.startswith("Sequential")]
    assert whole.split()[2] == "676" and "100.0%" in whole
    assert "8 samples" in table and "model FLOPs" in table
    linear = [line.split() for line in table.splitlines() if " Linear " in line]
    assert [line[2] for line in linear] == ["544", "132"]
