"""distui trains any PyTorch model on whatever hardware there is.

The public names load on first use, so `import distui` stays fast and imports neither torch, textual nor grpc.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Engine": "distui.core.engine.engine",
    "DistuiError": "distui.core.errors",
    "MoE": "distui.core.parallel.experts.moe",
    "UserError": "distui.core.errors",
    "balance_experts": "distui.core.parallel.experts.moe",
    "expert_load": "distui.core.parallel.experts.tokens",
    "init_empty_weights": "distui.core.sharding.start.empty",
    "notebook_launcher": "distui.launcher.notebook.launcher",
}

__all__ = [
    "DistuiError",
    "Engine",
    "MoE",
    "UserError",
    "__version__",
    "balance_experts",
    "expert_load",
    "init_empty_weights",
    "notebook_launcher",
]

if TYPE_CHECKING:
    from distui.core.engine.engine import Engine
    from distui.core.errors import DistuiError, UserError
    from distui.core.parallel.experts.moe import MoE, balance_experts
    from distui.core.parallel.experts.tokens import expert_load
    from distui.core.sharding.start.empty import init_empty_weights
    from distui.launcher.notebook.launcher import notebook_launcher


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'distui' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
