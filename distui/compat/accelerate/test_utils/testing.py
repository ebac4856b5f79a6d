"""The old place of what is in `accelerate.test_utils`."""

from distui.compat.accelerate.test_utils import are_the_same_tensors, assert_exception, require_bnb, torch_device

__all__ = ["are_the_same_tensors", "assert_exception", "require_bnb", "torch_device"]
