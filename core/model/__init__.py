"""What is done to a user's modules beside sharding them: recomputation, kernels, and counting their FLOPs.

Way in: `activation_checkpointing.apply_activation_checkpointing`, `kernel_swap.apply_kernels`, `flops.FlopMeter`, each
of which can be taken off again; `quantized.apply_plain_parts` for weights that are tensor subclasses. Knows units only
by their borders, and no optimizer, checkpoint or backend.
"""
