"""`distui.Engine`: the API that a training script sees, and what it is put together from.

Way in: `Engine`. `states` keeps and loads, `control` acts on commands at a step that all ranks agree on, `step_clock`
says where a step's time went, `job` finds what `distui launch` gave this rank, `scheduler` and `tracking` wrap the
script's own. The top floor of core: it knows every room, and none knows it.
"""

from distui.core.engine.engine import Engine

__all__ = ["Engine"]
