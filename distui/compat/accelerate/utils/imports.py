"""Which libraries and devices there are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from distui.compat.accelerate.refusals import offered
from distui.compat.not_offered import NotInstalled

_LIBRARIES = {
    "aim": "aim",
    "bnb": "bitsandbytes",
    "boto3": "boto3",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "datasets": "datasets",
    "dvclive": "dvclive",
    "import_timer": "import_timer",
    "lomo": "lomo_optim",
    "matplotlib": "matplotlib",
    "mlflow": "mlflow",
    "pandas": "pandas",
    "peft": "peft",
    "pynvml": "pynvml",
    "pytest": "pytest",
    "rich": "rich",
    "schedulefree": "schedulefree",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "torchdata": "torchdata",
    "torchdata_stateful_dataloader": "torchdata.stateful_dataloader",
    "torchvision": "torchvision",
    "trackio": "trackio",
    "transformers": "transformers",
    "triton": "triton",
    "wandb": "wandb",
}
_NEVER = [
    "amdsmi",
    "deepspeed",
    "fp8",
    "habana_gaudi1",
    "hpu",
    "megatron_lm",
    "mlu",
    "mps",
    "msamp",
    "musa",
    "neuron",
    "npu",
    "pippy",
    "sagemaker",
    "sdaa",
    "torch_xla",
    "torchao",
    "transformer_engine",
    "transformer_engine_mxfp8",
    "xccl",
    "xpu",
    "4bit_bnb",
    "8bit_bnb",
    "bitsandbytes_multi_backend",
]
"""Not there for a script under distui, whatever is installed: distui's engine runs on none of them."""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def is_cuda_available() -> bool:
    """Return whether there is a CUDA or ROCm GPU."""
    return torch.cuda.is_available()


def is_rocm_available() -> bool:
    """Return whether the GPUs are AMD's."""
    return torch.cuda.is_available() and torch.version.hip is not None


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Return whether this machine computes in bf16."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else True


def is_fp16_available() -> bool:
    """Return whether this machine has a GPU to compute in fp16."""
    return torch.cuda.is_available()


def is_weights_only_available() -> bool:
    """Return True: every torch that distui runs on has it."""
    return True


def stateful_class() -> Any:
    """Return torchdata's StatefulDataLoader. Raises: NotInstalled."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise NotInstalled(
            "use_stateful_dataloader=True needs torchdata 0.8 or newer",
            f"its StatefulDataLoader cannot be imported ({error})",
            "pip install torchdata, or leave it out and use accelerator.skip_first_batches after a resume",
        ) from error
    return StatefulDataLoader


def _named(name: str, answer: Callable[[], bool]) -> Callable[..., bool]:
    def is_available(*args: Any, **kwargs: Any) -> bool:
        return answer()

    is_available.__name__ = f"is_{name}_available"
    is_available.__doc__ = f"Return whether {name} can be used."
    return is_available


def __getattr__(name: str) -> Any:
    if name.startswith("is_") and name.endswith("_available"):
        what = name.removeprefix("is_").removesuffix("_available")
        if what in _NEVER:
            return _named(what, lambda: False)
        if what in _LIBRARIES:
            return _named(what, lambda: _is_installed(_LIBRARIES[what]))
    if name == "is_habana_gaudi1":
        return _named("habana_gaudi1", lambda: False)
    return offered("accelerate.utils.imports", {}, name)


NAMES = sorted(
    [f"is_{what}_available" for what in (*_LIBRARIES, *_NEVER) if what != "habana_gaudi1"]
    + ["is_habana_gaudi1", "is_cuda_available", "is_rocm_available", "is_bf16_available", "is_fp16_available"]
    + ["is_weights_only_available"]
)
"""Every name of this module."""
