"""Where a model's first numbers come from: the script, its modules' own initialisation, or safetensors files.

Way in: `start.Start`, which a model's units are filled by, and `empty.init_empty_weights`. Must not know how units are
cut, or which stage they are for.
"""
