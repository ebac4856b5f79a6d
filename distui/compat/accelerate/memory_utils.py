"""The old place of `find_executable_batch_size`."""

from distui.compat.accelerate.utils.memory import find_executable_batch_size

__all__ = ["find_executable_batch_size"]
