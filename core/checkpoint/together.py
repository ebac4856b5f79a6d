"""Steps that all ranks take together, or none: each tells how its own went before anybody goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from distui.core.errors import UserError


class Failed(Exception):
    """Some ranks could not read or write; all ranks raise it, with what each of those was told."""


def together(act: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Run `act`, and return what every rank's returned (as JSON keeps it), by rank. Collective.

    Raises: on all ranks, where one of them fails: the UserError that it raised, Failed for an OSError, and for
    anything else that error itself on the rank where it happened.
    """
    result: Any = None
    problem: list[str] = []
    bug: Exception | None = None
    try:
        result = act()
    except OSError as error:
        problem = [str(error)]
    except UserError as error:
        problem = [error.what, error.why, error.fix]
    except Exception as error:  # noqa: BLE001 - raised below, once the others know that nothing follows
        problem, bug = [f"{type(error).__name__}: {error}"], error
    outcomes = _exchange([result, problem], group)
    if bug is not None:
        raise bug
    told = [parts for _, parts in outcomes if len(parts) == 3]
    if told:
        raise UserError(*told[0])
    failed = [f"rank {rank}: {parts[0]}" for rank, (_, parts) in enumerate(outcomes) if parts]
    if failed:
        raise Failed("; ".join(failed))
    return [result for result, _ in outcomes]


def _exchange(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return every rank's `value`, by rank. Collective.

    By the group's own methods: they work on when the groups are destroyed under a thread that saves.
    """
    if group is None:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    group.allgather([sizes], [torch.tensor([content.numel()])]).wait()
    longest = int(max(size.item() for size in sizes))
    padded = torch.cat([content, torch.zeros(longest - content.numel(), dtype=torch.uint8)])
    contents = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    group.allgather([contents], [padded]).wait()
    return [
        json.loads(content[: int(size.item())].numpy().tobytes()) for content, size in zip(contents, sizes, strict=True)
    ]
