"""What only describes: recipes for fp8. Who uses them is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distui.compat.accelerate.refusals import NotOffered
from distui.compat.accelerate.utils.dataclasses import KwargsHandler


class Fp8Recipe(KwargsHandler):
    """A recipe for matrix multiplications in fp8; using it is refused."""

    def refusal(self) -> NotOffered:
        """Return why no `Accelerator` takes it."""
        return NotOffered(
            f"Accelerator(kwargs_handlers=[{type(self).__name__}(...)]) is not offered by distui",
            "its engine has no fp8 matrix multiplications, so the training would not be what the recipe says",
            "train in bf16: mixed_precision='bf16'; compression.gradients='fp8' sends gradients in fp8",
        )


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {' or '.join(known)}.")


@dataclass
class AORecipeKwargs(Fp8Recipe):
    """torchao's float8 training."""

    config: Any = None
    module_filter_func: Callable[..., Any] | None = None
    pad_inner_dim: bool | None = None
    enable_fsdp_float8_all_gather: bool | None = None


@dataclass
class TERecipeKwargs(Fp8Recipe):
    """TransformerEngine's delayed scaling."""

    use_autocast_during_eval: bool = False
    margin: int = 0
    interval: int = 1
    fp8_format: str = "HYBRID"
    amax_history_len: int = 1024
    amax_compute_algo: str = "most_recent"
    override_linear_precision: tuple[bool, bool, bool] = (False, False, False)
    use_mxfp8_block_scaling: bool = False

    def __post_init__(self) -> None:
        self.fp8_format, self.amax_compute_algo = self.fp8_format.upper(), self.amax_compute_algo.lower()
        _one_of("fp8_format", self.fp8_format, ("HYBRID", "E4M3", "E5M2"))
        _one_of("amax_compute_algo", self.amax_compute_algo, ("max", "most_recent"))


@dataclass
class MSAMPRecipeKwargs(Fp8Recipe):
    """MS-AMP's levels."""

    opt_level: str = "O2"

    def __post_init__(self) -> None:
        _one_of("opt_level", self.opt_level, ("O1", "O2"))


@dataclass
class FP8RecipeKwargs(TERecipeKwargs):
    """The older name of the two before."""

    opt_level: str = "O2"
    backend: str = "TE"

    def __post_init__(self) -> None:
        self.backend = self.backend.upper()
        _one_of("backend", self.backend, ("TE", "MSAMP"))
        _one_of("opt_level", self.opt_level, ("O1", "O2"))
        super().__post_init__()
