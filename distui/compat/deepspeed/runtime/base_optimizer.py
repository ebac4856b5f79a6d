"""`deepspeed.runtime.base_optimizer`: the class of the optimizers that `initialize` returns."""

from distui.core.sharding.optim.prepared import PreparedOptimizer as DeepSpeedOptimizer

__all__ = ["DeepSpeedOptimizer"]
