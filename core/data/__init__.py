"""Loaders: which rank gets which samples, so that the global batches are the same for any number of ranks.

Way in: `loader.prepare_loader`, `loader.skip_first_batches`. `slices` is the arithmetic, `order` the seeds, `stream`
is for iterable data sets, `tokens` counts a batch. Knows ranks; must not know models, stages or the engine.
"""
