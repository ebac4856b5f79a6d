"""The face of Hugging Face Accelerate 1.15: `from distui.compat.accelerate import Accelerator`.

`distui launch --as accelerate train.py` gives it to a script that imports `accelerate`. Names load on first use.
What is not offered can be imported and raises where it is used, with the way around (`refusals.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distui.compat.accelerate.refusals import NotOffered, install_module_refusals, offered

if TYPE_CHECKING:
    from distui.compat.accelerate.accelerator import Accelerator as Accelerator
    from distui.compat.accelerate.big_modeling import init_empty_weights as init_empty_weights
    from distui.compat.accelerate.data_loader import skip_first_batches as skip_first_batches
    from distui.compat.accelerate.launchers import debug_launcher as debug_launcher
    from distui.compat.accelerate.launchers import notebook_launcher as notebook_launcher
    from distui.compat.accelerate.state import PartialState as PartialState

__version__ = "1.15.0"
"""Of the Accelerate whose API this is: scripts compare it."""

install_module_refusals()

_BASE = "distui.compat.accelerate"
_IN: dict[str, str] = {
    "accelerator": "Accelerator",
    "big_modeling": "init_empty_weights init_on_device",
    "data_loader": "skip_first_batches",
    "launchers": "debug_launcher notebook_launcher",
    "local_sgd": "LocalSGD",
    "state": "PartialState",
    "utils": "AutocastKwargs DataLoaderConfiguration DDPCommunicationHookType DeepSpeedPlugin "
    "DistributedDataParallelKwargs DistributedType FullyShardedDataParallelPlugin GradScalerKwargs "
    "InitProcessGroupKwargs ParallelismConfig ProfileKwargs find_executable_batch_size is_rich_available "
    "load_checkpoint_in_model "
    "synchronize_rng_states",
}
_LAZY = {name: f"{_BASE}.{module}" for module, names in _IN.items() for name in names.split()}

__all__ = ["NotOffered", "__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    value = offered("accelerate", _LAZY, name)
    globals()[name] = value
    return value
