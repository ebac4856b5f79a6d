"""What can go wrong in a job, or only look so: each a function that every rank of a small training calls at one step.

`job.py` has the training and the register; `hangs`, `deaths`, `drifts` the sick ones, with the verdict that is right;
`healthy` those that look sick; `roles` has jobs of both kinds whose ranks differ. `benchmarks/faults.py` runs them,
`tests/faults` some.
"""

from situations import deaths, drifts, hangs, healthy, roles

__all__ = ["deaths", "drifts", "hangs", "healthy", "roles"]
