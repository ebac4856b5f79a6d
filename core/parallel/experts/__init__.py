"""Expert parallelism: the ranks of a group hold a part of the experts each, and tokens travel to them and back.

Way in: `tokens.spread_experts`, which finds a model's experts and cuts their parameters; `exchange` is the uneven
all-to-all as an autograd function. `moe.MoE` is a mixture of our own, which works without any of this too. Must not
know optimizers, checkpoints or backends.
"""
