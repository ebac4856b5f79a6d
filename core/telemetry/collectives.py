"""Every collective of this process in the telemetry ledger: the engine's, the script's own, and those of C++ reducers.

    script, FSDP2, object collectives ... ──> ProcessGroup.allreduce, ... (wrapped here) ──> backend
    DDP's reducer, functional collectives, in C++ ──> the dispatcher's c10d::allreduce_, ... (kernels of ours)
    whoever waits ──> Work.wait (wrapped here): the main thread is blocked in this collective

The dispatcher alone would see all of them, but a Python kernel in it costs 30 us a call against 5 us here, so it is put
in only when a model is wrapped in DDP or split by tensor parallelism. A collective ends when its future says so, or its
wait where it has none.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.library import Library

from distui.core.telemetry.after_import import after_import
from distui.core.telemetry.collective import IS_ROOT, SIDE_THREAD
from distui.core.telemetry.source import TelemetrySource, current

F = TypeVar("F", bound=Callable[..., Any])

METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}
"""Methods of ProcessGroup, and the operation that each is told as."""
_NO_FUTURE = frozenset({"send", "recv", "recv_anysource"})
OUTPUT_FIRST = frozenset({"all_gather", "reduce_scatter", "gather", "scatter", "all_to_all"})
"""Operations whose methods take the output before the input."""
ROOTED = frozenset({"broadcast", "scatter", "gather", "reduce"})
"""Operations in which one rank gives to, or takes from, all others."""
DISPATCHED = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "barrier": "barrier",
}
"""Operators of the dispatcher that C++ code calls by itself."""


class _Quiet(threading.local):
    on = False


quiet = _Quiet()
"""While `quiet.on`, this thread's collectives are parts of one that is recorded already."""

_tokens: dict[int, int] = {}
"""id of a Work -> token, until it is waited for. Each new Work overwrites what an older one left in its place."""
_labels: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[str, int]] = weakref.WeakKeyDictionary()
_dtypes: dict[torch.dtype, str] = {}
_main = threading.main_thread().ident
_installed = False
_dispatched: Library | None = None
_wait = dist.Work.wait


def install() -> None:
    """Record every collective from now on in the telemetry of this process. Does nothing the second time."""
    global _installed
    if _installed:
        return
    _installed = True
    for method, op in METHODS.items():
        original = getattr(dist.ProcessGroup, method, None)
        if original is not None:
            setattr(dist.ProcessGroup, method, _recorded(original, op, method))
    dist.Work.wait = _recorded_wait  # type: ignore[method-assign]
    ddp = torch.nn.parallel.DistributedDataParallel
    construct = ddp.__init__

    @functools.wraps(construct)
    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        install_dispatched()
        construct(self, *args, **kwargs)

    ddp.__init__ = watched  # type: ignore[method-assign]
    after_import("torch.distributed.tensor.parallel", lambda module: install_dispatched())


def install_dispatched() -> None:
    """Record what C++ code calls by itself, too. Does nothing the second time, or where nothing is recorded."""
    global _dispatched
    if _dispatched is not None or not _installed:
        return
    _dispatched = Library("c10d", "IMPL")
    for name, op in DISPATCHED.items():
        overload = getattr(torch.ops.c10d, name).default
        _dispatched.impl(name, _kernel(overload, op), "BackendSelect", with_keyset=True)


def one_collective(call: F) -> F:
    """Decorate what records a collective itself and makes it of several others, which are not recorded."""

    @functools.wraps(call)
    def quietly(*args: Any, **kwargs: Any) -> Any:
        quiet.on = True
        try:
            return call(*args, **kwargs)
        finally:
            quiet.on = False

    return cast(F, quietly)


def group_label(group: dist.ProcessGroup, name: str = "") -> str:
    """Return a name that all members, and no other group, have for `group`.

    Like `world`, `data_parallel`, `group 4[0-6:2]`: the brackets hold the global ranks of a part of the world. Without
    a `name`, it is torch's description and number of the group.
    """
    if group is dist.group.WORLD:
        return name or "world"
    try:
        ranks = dist.get_process_group_ranks(group)
    except (KeyError, RuntimeError):  # made below torch.distributed: nobody has told its members
        return f"{name or 'group'} {group.group_name[:8]}"
    if not name:
        kind = group.group_desc if group.group_desc not in ("", "undefined") else "group"
        name = f"{kind} {group.group_name[:8]}"
    return f"{name}[{_compact(sorted(ranks))}]" if len(ranks) < dist.get_world_size() else name


def _compact(ranks: list[int]) -> str:
    steps = {after - before for before, after in itertools.pairwise(ranks)}
    if len(ranks) > 2 and len(steps) == 1:
        (step,) = steps
        return f"{ranks[0]}-{ranks[-1]}" + (f":{step}" if step > 1 else "")
    text = ",".join(map(str, ranks))
    return text if len(text) <= 24 else f"{ranks[0]},..,{ranks[-1]}"


def _recorded(original: Callable[..., Any], op: str, method: str) -> Callable[..., Any]:
    at = 1 if op in OUTPUT_FIRST else 0
    once = one_collective(original)  # or the dispatcher's kernel would record it again

    @functools.wraps(original, assigned=("__doc__", "__name__"))
    def call(self: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        source = current()
        if quiet.on or source is None or not source.active:
            return original(self, *args, **kwargs)
        data = args[at] if len(args) > at else None
        token = _begin(source, self, op, data, args, method)
        try:
            work = original(self, *args, **kwargs) if _dispatched is None else once(self, *args, **kwargs)
        except BaseException:
            source.collective_end(token)
            raise
        if work is None:  # monitored_barrier: it has waited itself
            source.collective_end(token)
        else:
            _tokens[id(work)] = token
            # Without torch's options nobody has promised to wait at once: then, too, the end is not when somebody does.
            if getattr(args[-1] if args else None, "asyncOp", method not in _NO_FUTURE):
                see_end(source, work, token)
        return work

    return call


def _begin(
    source: TelemetrySource, group: dist.ProcessGroup, op: str, data: Any, args: tuple[Any, ...], method: str = ""
) -> int:
    found = _labels.get(group)
    if found is None:
        found = _labels[group] = group_label(group), group.size()
    name, size = found
    num_bytes, dtype = 0, ""
    while type(data) is list or type(data) is tuple:
        if len(data) > 1 and type(data[0]) is torch.Tensor:
            num_bytes = sum(tensor.nbytes for tensor in data[1:])
        data = data[0] if data else None
    if type(data) is torch.Tensor or isinstance(data, torch.Tensor):
        num_bytes += data.nbytes
        dtype = _dtypes.get(data.dtype) or _dtypes.setdefault(data.dtype, str(data.dtype).removeprefix("torch."))
    if op == "send" or op == "recv":
        name = _pair(group, name, op, args, method)
        size = 2
    flags = _side() | (IS_ROOT if op in ROOTED and _root(args, method) == group.rank() else 0)
    return source.collective_begin(name, op, dtype, num_bytes, size, flags)


def _root(args: tuple[Any, ...], method: str) -> int:
    """Return the rank in its group that gives or takes; -1 where the call does not say."""
    if not method:  # the dispatcher's broadcast_: tensors, group, root, ...
        return args[2] if len(args) > 2 and type(args[2]) is int else -1
    root = getattr(args[-1], "rootRank", None) if args else None
    if root is None and len(args) > 1 and type(args[1]) is int:
        root = args[1]  # broadcast(tensor, root) and its like
    return root if type(root) is int else -1


def _pair(group: dist.ProcessGroup, name: str, op: str, args: tuple[Any, ...], method: str) -> str:
    """Name one direction between two ranks: both ends count what passes there."""
    own = dist.get_global_rank(group, group.rank()) if group is not dist.group.WORLD else group.rank()
    peer: int | str = "any"
    if method != "recv_anysource" and len(args) > 1:
        peer = dist.get_global_rank(group, args[1]) if group is not dist.group.WORLD else args[1]
    return f"{name.partition('[')[0]}[{own}>{peer}]" if op == "send" else f"{name.partition('[')[0]}[{peer}>{own}]"


def _side() -> int:
    if threading.get_ident() == _main:
        return 0
    # Autograd's own threads are dummies to Python: they are part of the training step.
    return 0 if isinstance(threading.current_thread(), threading._DummyThread) else SIDE_THREAD


class _End:
    """Notes the end of a collective; called on the backend's thread."""

    __slots__ = ("source", "token")

    def __init__(self, source: TelemetrySource, token: int) -> None:
        self.source, self.token = source, token

    def __call__(self, future: Any) -> None:
        self.source.collective_end(self.token)


def see_end(source: TelemetrySource, work: Any, token: int) -> bool:
    """Have the work's future note the end. On CUDA a future is complete once launched: the wait has to do."""
    try:
        future = work.get_future()
    except RuntimeError:  # gloo's send and recv have none
        return False
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return False
    source.collective_seen(token)
    future.add_done_callback(_End(source, token))
    return True


def _recorded_wait(self: Any, *args: Any, **kwargs: Any) -> Any:
    token = _tokens.pop(id(self), 0)
    source = current()
    if not token or source is None:
        return _wait(self, *args, **kwargs)
    main = threading.get_ident() == _main
    if main:
        source.waiting(token)
    began = time.perf_counter()
    try:
        return _wait(self, *args, **kwargs)
    finally:
        if main:
            source.waiting(None)
        source.collective_waited(token, time.perf_counter() - began)


def _kernel(overload: Any, op: str) -> Callable[..., Any]:
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
    at = 1 if op in OUTPUT_FIRST else 0
    place = 2 if op in OUTPUT_FIRST else 1
    redispatch = overload._handle.redispatch_boxed
    unbox_group, unbox_work = dist.ProcessGroup.unbox, dist.Work.unbox

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        source = current()
        if quiet.on or source is None or not source.active:
            return redispatch(keys & below, *args, **kwargs)
        token = _begin(source, unbox_group(args[place]), op, args[at], args if op in ROOTED else ())
        try:
            result = redispatch(keys & below, *args, **kwargs)
        except BaseException:
            source.collective_end(token)
            raise
        work = unbox_work(result[-1] if isinstance(result, tuple) else result)
        if not see_end(source, work, token):
            _tokens[id(work)] = token
        return result

    return kernel
