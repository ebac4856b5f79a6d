"""The optimizers that a DeepSpeed configuration names.

Way in: `optimizers.build_optimizer`. Must not know stages: the engine prepares what it returns.
"""
