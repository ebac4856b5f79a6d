"""The mesh of ranks: every process group of a job, and how a tensor is cut over it.

Way in: `groups.Axes`, made once by all ranks; `sizes.AxisSizes` is its arithmetic and `cut.Cut` says which pieces of a
tensor a rank holds, both torch-free; `tensors` cuts and assembles by it. Only `sizes` knows the order of the ranks.
Must not know sharding, models or styles of parallelism.
"""
