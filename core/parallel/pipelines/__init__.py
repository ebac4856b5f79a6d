"""A model whose blocks lie on several ranks, without a change to it.

Way in: `pipeline.pipelined`, which runs the schedule's table; `stages` makes of the model what this rank runs of it, by
what `holders` says it holds; `messages` is what stages send, `placeholders`, `left_behind` and `outputs` stand for what
is on other stages, `shared` sums what several hold, `weights_later` puts gradients of weights off (zbv). Must not know
optimizers, checkpoints or backends.
"""
