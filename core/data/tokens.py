"""How much work a batch is: tokens where it holds any, and samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distui.core.ranks.ops import iter_tensors

TOKEN_DTYPES = (torch.int64, torch.int32)


def count_tokens(batch: Any) -> tuple[int, int]:
    """Return (tokens, samples) of a batch; 0 where it has none.

    Tokens are `input_ids`, else the first int32 or int64 tensor of two dimensions (more are masks of pixels, one is
    labels). Padding counts: it is computed too.
    """
    tensors = [tensor for _, tensor in iter_tensors(batch)]
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else getattr(batch, "input_ids", None)
    if not isinstance(ids, torch.Tensor):
        ids = next((tensor for tensor in tensors if tensor.ndim == 2 and tensor.dtype in TOKEN_DTYPES), None)
    sized = ids if ids is not None and ids.ndim else next((tensor for tensor in tensors if tensor.ndim), None)
    return (ids.numel() if ids is not None else 0), (sized.shape[0] if sized is not None else 0)
