"""`--as`: an unchanged script gets distui's face of another trainer, and its launcher's flags are read.

Way in: `faces.wear` in a rank, `deepspeed_flags` in `distui launch`. Must not know the faces' own code, which
is `distui/compat`.
"""
