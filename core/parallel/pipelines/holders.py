"""Which ranks of a pipeline hold which parameters of a model: its blocks, and what lies around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from distui.core.errors import UserError

ALONE = "set strategy.pipeline_parallel to 1"


class Places:
    """The modules outside of a model's blocks that hold parameters: registered in front of them, or behind."""

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        self.model, self.blocks = model, blocks
        names = [name for name, _ in blocks]
        inside = {id(inner) for _, block in blocks for inner in block.modules()}
        self.front: dict[str, nn.Module] = {}
        self.behind: dict[str, nn.Module] = {}
        self.around: dict[str, nn.Module] = {}
        """Those that the blocks are in: their own parameters are read by whatever stage comes to it."""
        reached = False
        for name, module in model.named_modules():
            if id(module) in inside:
                reached = True
            elif any(param is not None for param in module._parameters.values()):
                is_around = not name or any(block.startswith(f"{name}.") for block in names)
                place = self.around if is_around else self.behind if reached else self.front
                place[name] = module

    def costs(self) -> tuple[float, float]:
        """Return what lies in front of the blocks and behind them costs, in parameters that are multiplied."""
        front, behind = (sum(map(_cost, place.values())) for place in (self.front, self.behind))
        return float(front), float(behind)

    def holders(
        self, parts: Sequence[range], rank_of: Callable[[int], int], num_ranks: int
    ) -> dict[int, tuple[int, ...]]:
        """Return the ranks that hold each parameter, by its identity; `parts` are the blocks of each stage.

        Raises: UserError for one that some ranks share, and these are not the ends.
        """
        first, last, found = rank_of(0), rank_of(len(parts) - 1), dict[int, set[int]]()

        def hold(module: nn.Module, ranks: Iterable[int]) -> None:
            for param in module._parameters.values():
                if param is not None:
                    # A number cannot be left out of a shape; all hold it.
                    found.setdefault(id(param), set()).update(ranks if param.dim() else range(num_ranks))

        for stage, of_stage in enumerate(parts):
            for index in of_stage:
                for module in self.blocks[index][1].modules():
                    hold(module, (rank_of(stage),))
        for module in self.around.values():
            hold(module, range(num_ranks))
        for place, rank in ((self.front, first), (self.behind, last)):
            for module in place.values():
                # A norm may be registered on the other side of the blocks than it is called: both ends hold it.
                hold(module, (first, last) if is_small(module) else (rank,))
        for name, param in self.model.named_parameters():
            ranks = found[id(param)]
            if 2 < len(ranks) < num_ranks or (len(ranks) == 2 < num_ranks and ranks != {first, last}):
                raise UserError(
                    f"{name} is used by {', '.join(map(str, sorted(ranks)))} of {num_ranks} ranks of a pipeline",
                    "a parameter can be shared by the first and the last stage, as a tied embedding is, or by all",
                    f"{ALONE}, or to a size at which the blocks that share it are on one rank",
                )
        return {number: tuple(sorted(ranks)) for number, ranks in found.items()}


def _cost(module: nn.Module) -> float:
    """Return what a module costs beside the blocks, in parameters that are multiplied: a lookup costs nothing."""
    if isinstance(module, nn.Embedding):
        return 0.0
    return float(sum(param.numel() for param in module._parameters.values() if param is not None))


def is_small(module: nn.Module) -> bool:
    """Tell whether a module holds rows of numbers only, as norms do."""
    return all(param is None or param.dim() <= 1 for param in module._parameters.values())
