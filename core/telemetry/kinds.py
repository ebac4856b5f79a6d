"""Kinds that ranks and daemon share: verdicts that say that a job is slow, not broken; waits for a person."""

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

RESTART = "restart"
"""The launcher's event: all ranks have been ended, and are started again."""

AGAIN = "started_again"
"""The launcher's event: all hosts are there, and the ranks of another attempt are started."""

INPUT, DEBUGGER = "input", "debugger"
FOR_A_PERSON = frozenset({INPUT, DEBUGGER})
"""Phases, and kinds of events, in which a rank waits for a person: no hang, however long, and no straggler."""
