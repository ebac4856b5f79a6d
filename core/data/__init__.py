"""Which rank gets which samples: the same global batches for any number of ranks."""
