"""distui's own engine: ZeRO 0 to 3 as one mechanism of flat buffers, views, and collectives in one fixed order.

Way in: `sharded.ShardedModel`, which lays a model out and hands out its optimizers. `schedule` decides when a unit is
gathered, reduced and freed; `units` owns the buffers, `transport` moves them, `optim` steps them, `homes` keeps them
off the device; `hooks` stay out of compiled graphs and behind in copies. There is no class for a stage. Must not know
checkpoints, where settings come from, the script's loop or the engine above.
"""
