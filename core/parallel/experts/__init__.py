"""Expert parallelism: the ranks of a group hold a part of the experts each, and tokens travel to them and back.

Way in: `tokens.spread_experts`, which finds a model's experts and cuts their parameters; `exchange` is the uneven
all-to-all as an autograd function. Must not know routers, optimizers, checkpoints or backends.
"""
