"""`deepspeed.runtime.tensor_parallel`, for groups of one rank."""
