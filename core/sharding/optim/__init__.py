"""The user's own optimizer on flat shards, or on whole matrices where it needs them.

Way in: `optim.ShardedOptimizer`; `prepared` is what every backend's prepared optimizer offers the engine. Knows units
as ranges of shards, and of the schedule what it may wait for; never modules or their forwards.
"""
