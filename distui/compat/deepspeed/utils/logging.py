"""`deepspeed.utils.logging`: a logger, and lines of chosen ranks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import psutil
import torch
import torch.distributed as dist

logger = logging.getLogger("DeepSpeed")
if not logger.handlers:
    handler = logging.StreamHandler(stream=sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log on the given ranks; on all for None or -1."""
    if not ranks or -1 in ranks or _rank() in ranks:
        logger.log(level, "[Rank %d] %s", _rank(), message)


def set_log_level_from_string(level: str) -> None:
    """Set the logger's level by its name."""
    logger.setLevel(level.upper())


def see_memory_usage(message: str, force: bool = False) -> None:
    """Print device and host memory on rank 0, if `force`."""
    if not force or _rank():
        return
    gib = 2.0**30
    print(message)
    if torch.cuda.is_available():
        used, peak = torch.cuda.memory_allocated() / gib, torch.cuda.max_memory_allocated() / gib
        print(f"MA {used:.2f} GB  Max_MA {peak:.2f} GB  CA {torch.cuda.memory_reserved() / gib:.2f} GB")
        torch.cuda.reset_peak_memory_stats()
    host = psutil.virtual_memory()
    print(f"CPU Virtual Memory:  used = {(host.total - host.available) / gib:.2f} GB, percent = {host.percent}%")
