"""Parallelism inside a model: its modules are cut in place over the ranks that share a batch.

Way in: `tensor.cut_model`, by a plan that `plans` finds; `styles` says how a module is cut, `families` how those of
known models are, `regions` holds the collectives around what is cut and the random numbers inside. A module keeps its
class and its names. `sequence` cuts batches, `experts` and `pipelines` are packages of their own; `outside` is a loss
that the model does not compute. Must not know optimizers, checkpoints or backends.
"""
