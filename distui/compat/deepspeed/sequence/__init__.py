"""`deepspeed.sequence`: attention over sequences of which each rank has a piece."""
