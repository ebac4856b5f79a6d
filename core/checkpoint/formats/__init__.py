"""The formats of checkpoints that are read: today's, the one before it, and DeepSpeed's.

Way in: `opening.open_checkpoint`; `deepspeed_files` for what DeepSpeed wrote. Must not know an engine, and runs nothing
that is pickled in a file.
"""
