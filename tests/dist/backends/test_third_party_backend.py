"""A backend of somebody else's: found through a real distribution's entry point, loaded, trained with, refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import distui
from distui.core.config.check import check
from distui.core.config.settings import load
from distui.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

EXAMPLE = Path(__file__).parents[3] / "examples" / "third_party_backend"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example, as a folder on sys.path: its module and what pip writes beside it."""
    import tomlkit

    project = tomlkit.parse((EXAMPLE / "pyproject.toml").read_text()).unwrap()["project"]
    site = tmp_path_factory.mktemp("site")
    (site / "distui_local_sgd.py").write_text((EXAMPLE / "distui_local_sgd.py").read_text())
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["distui.backends"] | {"broken": "distui_local_sgd:NoSuchBackend"}
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[distui.backends]", *lines, "native = os:path", ""]))
    return site


def _train(site: str, **sections: Any) -> tuple[list[float], list[bool]]:
    sys.path.insert(0, site)
    try:
        engine = distui.Engine(strategy={"backend": "local_sgd"}, **sections)
    finally:
        sys.path.remove(site)
    torch.manual_seed(engine.process_index)
    model: Any = nn.Linear(6, 1)
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses, alike = [], []
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 + engine.process_index))
    for _ in range(8):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        weights = engine.gather(model.weight.detach())
        alike.append(all(torch.equal(weights[0], weight) for weight in weights))
    return losses, alike


def test_it_trains_by_its_own_rules(run_ranks: RunRanks, site: Path) -> None:
    for losses, alike in run_ranks(_train, 2, str(site)):
        assert losses[-1] < losses[0]
        assert alike == [False, False, False, True] * 2, "weights are averaged every fourth step"


def test_it_is_found_and_checks_for_itself(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(None, {"strategy.backend": "local_sgd"}, {}).config
    (problem,) = check(config)
    assert problem.path == "strategy.backend" and "deepspeed" in problem.why, "it is not installed yet"
    monkeypatch.syspath_prepend(str(site))
    assert check(config) == []
    with pytest.raises(ConfigError, match="local_sgd with zero_stage=2 and dtype=fp32"):
        distui.Engine(strategy={"backend": "local_sgd", "zero_stage": 2})
    with pytest.raises(UserError, match="cannot be loaded from distui_local_sgd:NoSuchBackend"):
        distui.Engine(strategy={"backend": "broken"})
    assert distui.Engine().backend.name == "native", "our names are ours"
