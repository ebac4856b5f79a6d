"""Ranks that the others wait for and that are at work: an evaluation, a save, a child process, a long computation."""

from __future__ import annotations

from distui.core.telemetry.kinds import DEBUGGER, INPUT
from distui.core.telemetry.stacks import KnownStack, known_stack
from distui.daemon.diagnosis.observe import DEAD, FINISHED, STOPPED, Observed, Wait, this_node
from distui.daemon.node.activity import activity, note, waits_for_time_or_peer
from distui.daemon.runs.state import RunState

BUSY_S = 2.5
"""A stack that was the same for less is one of a thread at work."""
LOADER = "/torch/utils/data/"
PATIENT_S = 300.0
WORK_S = 600.0
"""Who uses a processor or a disk for so long while others wait is told as a hang: a loop that spins looks the same."""
LOADER_S = 60.0
"""A loader whose workers rest for so long gives no batch any more."""
BARRIER_S = 30.0
"""A barrier is where ranks wait for what one does alone, though it be to sleep."""
PATIENT_PHASES = frozenset({"evaluation", "checkpoint"})
_COMPILERS = ("/torch/_dynamo/", "/torch/_inductor/", "/torch/_functorch/", "/triton/compiler/")
_DEBUGGERS = ("/pdb.py:", "/IPython/terminal/", "/prompt_toolkit/", "/debugpy/")
"""What a stack has while somebody debugs without having told: an IPython shell, a debugger in an editor."""
_PERSON = {INPUT: "waits for somebody's input", DEBUGGER: "is in a debugger"}
_CHILD = ("/subprocess.py:", "/multiprocessing/popen_")


def note_all(state: RunState, ranks: list[Observed]) -> None:
    """Begin to look at the processes of those that nobody knows to wait."""
    for rank in ranks:
        if rank.wait is None and rank.process not in (DEAD, FINISHED, STOPPED) and rank.node == this_node():
            note(rank.pid, rank.began_s)


def at_work(state: RunState, rank: Observed, wait: Wait, now_s: float) -> str:
    """Return what a rank does that the others wait for in `wait`; "" where it does nothing that can be seen."""
    waited_s = now_s - wait.since_s
    if rank.busy:
        return rank.busy  # a person's debugger holds it
    if rank.phase == "evaluation":
        return "evaluates"
    if rank.phase in _PERSON:
        return _PERSON[rank.phase]
    if waited_s < BARRIER_S and wait.op == "barrier":
        return "alone before a barrier"
    if rank.node != this_node():
        return ""
    known = known_stack(state.run, rank.rank)
    fresh = known is None or now_s - known.time_s < BUSY_S
    if known is not None and fresh and any(part in frame for frame in known.frames for part in _DEBUGGERS):
        return _PERSON[DEBUGGER]
    if waited_s >= WORK_S:
        return ""
    moves = known is not None and fresh and known.time_s - known.since_s < BUSY_S
    if moves and known is not None and wait.since_s < known.time_s and waited_s < PATIENT_S:
        return "its stack changes"
    found = activity(rank.pid, rank.began_s)
    if found is None:
        return ""
    # Who holds the interpreter's lock for seconds and moves no data answers nobody: that is a hang, CPU time or not.
    frames = known.frames if known is not None else ()
    if (found.busy and fresh) or found.moves_data:
        compiles = any(part in frame for frame in frames for part in _COMPILERS)
        return f"compiles ({found.text()})" if compiles else found.text()
    child = found.num_children > 0 and any(part in frame for frame in frames for part in _CHILD)
    if (child or found.waits_for_child) and not any(LOADER in frame for frame in frames) and waited_s < PATIENT_S:
        return f"waits for a child process ({found.text()})"
    return ""


def stuck_since(rank: Observed, known: KnownStack, limit_s: float) -> float:
    """Return since when a rank waits for a lock, or for a loader at rest; 0 where it does anything. Units: Unix s."""
    loader = any(LOADER in frame for frame in known.frames)
    if known.time_s - known.since_s < (max(limit_s, LOADER_S) if loader else limit_s):
        return 0.0
    found = activity(rank.pid, rank.began_s)
    if found is None or found.busy or not (loader or found.waits_for_lock):
        return 0.0
    if not loader and known.time_s - known.since_s < PATIENT_S and waits_for_time_or_peer(rank.pid):
        return 0.0  # a pool whose workers wait for an environment or an upload: that lock is given back
    return known.since_s
