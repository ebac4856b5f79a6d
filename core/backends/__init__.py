"""The engines that a training script can run on: native, ddp, fsdp2, deepspeed and plug-ins, one protocol for all.

Way in: `registry.load_backend`; `base.Backend` says what each must do, `plain.PlainBackend` does most of it for models
that keep plain tensors, and the `*_items` files name what a rank holds for checkpoints. The names of the backends and
what each cannot do stand in `config/backends.py`, where they can be checked without torch. Must not know the engine
above, nor how files of a checkpoint look: it only says which range of which tensor a rank has.
"""
