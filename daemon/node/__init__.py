"""This node: its processors, GPUs and processes, and the starting of its daemon.

Way in: `hardware.HardwareSampler`, `processes.process_state`, `spawn.ensure_daemon`. What cannot be read is absent,
never 0. Must not know runs.
"""
