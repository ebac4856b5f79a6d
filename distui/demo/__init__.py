"""What `distui demo` trains: a byte-level GPT, on the text of the installed Python standard library.

The names load on first use, so that importing the package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {
    "ByteGPT": "distui.demo.model",
    "LossLog": "distui.demo.loss_log",
    "StdlibText": "distui.demo.data",
}

__all__ = ["ByteGPT", "LossLog", "StdlibText"]

if TYPE_CHECKING:
    from distui.demo.data import StdlibText
    from distui.demo.loss_log import LossLog
    from distui.demo.model import ByteGPT


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'distui.demo' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
