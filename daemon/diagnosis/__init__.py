"""Verdicts: who died, who waits for whom, who is slow, what disagrees.

Way in: `verdicts.diagnose`, which asks `deaths`, `hangs`, `pace`, `collectives` and `gpu_faults` in the order of cause;
`observe.observe` first says what each rank is doing now. Reads a run and its ledgers, and must not act on a job.
`nccl_ras` alone asks NCCL over a socket, once an incident, and keeps the answer beside the run.
"""
