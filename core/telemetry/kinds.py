"""Which kinds of verdict say that a job is slow or drifts, and not that it is broken."""

WARNINGS = frozenset(
    {
        "straggler",
        "slow_link",
        "data_bound",
        "loss_spike",
        "memory_growth",
        "cpu_throttled",
        "launcher_stopped",
    }
)
"""They come and go while the job trains on; all other kinds are faults."""
