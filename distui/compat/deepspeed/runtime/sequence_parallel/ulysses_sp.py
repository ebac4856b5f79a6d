"""DeepSpeed's sequence parallelism for transformers' models, by the engine's context parallelism.

There a loader cuts the sequences and an attention joins them; here the model itself cuts what it is given, so the
loader hands out whole sequences, with the labels shifted as scripts expect. A loss of whole logits is the same number.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch.distributed as dist

from distui.compat.accelerate.data.loaders import shifted
from distui.compat.deepspeed.refusals import offered
from distui.compat.deepspeed.utils import groups
from distui.compat.not_offered import NotOffered


class SequenceParallel:
    """What `register_with_transformers` gives for `deepspeed.initialize(mpu=...)`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_sequence_parallel_world_size(self) -> int:
        """Return the ranks that share each sequence."""
        return self.size

    def get_sequence_parallel_group(self) -> Any:
        """Return their group, once `initialize` has made the engine."""
        return groups._get_sequence_parallel_group()

    def get_sequence_parallel_rank(self) -> int:
        """Return this rank among them."""
        return groups._get_sequence_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        """Return the ranks with batches of their own."""
        return groups._get_data_parallel_world_size()

    def get_data_parallel_rank(self) -> int:
        """Return this rank among them."""
        return groups._get_data_parallel_rank()

    def get_data_parallel_group(self) -> Any:
        """Return their group."""
        return groups._get_data_parallel_group()


class UlyssesSPAttentionHF:
    """Asks for sequences to be shared; the engine attends by torch's scaled_dot_product_attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        way = "UlyssesSPAttentionHF.register_with_transformers(...), whose mpu deepspeed.initialize takes"
        raise NotOffered("an UlyssesSPAttentionHF of one's own is not offered by distui", "the engine makes it", way)

    @classmethod
    def register_with_transformers(
        cls,
        model_name_or_path: Any,
        core_attn_implementation: str,
        sequence_parallel_size: int,
        micro_batch_size: int | None = None,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
        max_length: int | None = None,
    ) -> SequenceParallel | None:
        """Return what `deepspeed.initialize` takes as `mpu`; None for a size of 1. Shapes may change with every batch.

        Raises: NotOffered for what would change the evaluation.
        """
        if sequence_parallel_size == 1:
            return None
        if disable_in_eval:
            raise NotOffered(
                "UlyssesSPAttentionHF(disable_in_eval=True) is not offered by distui",
                "ranks that share a batch in training share it in evaluation",
                "give all of them the same batches there too",
            )
        return SequenceParallel(sequence_parallel_size)


class UlyssesSPDataLoaderAdapter:
    """Gives all ranks that share a sequence each other's batches in turn, with `shift_labels` in place of `labels`."""

    def __init__(self, dl: Any, sp_rank: int, sp_group: Any, sp_world_size: int, device: Any) -> None:
        self.dl, self.sp_rank, self.sp_group = dl, sp_rank, sp_group
        self.sp_world_size, self.device = sp_world_size, device
        self.iter = iter(dl)
        self.micro_batches: deque[Any] = deque()

    def __len__(self) -> int:
        return len(self.dl) * self.sp_world_size

    def __iter__(self) -> UlyssesSPDataLoaderAdapter:
        return self

    def __next__(self) -> Any:
        if not self.micro_batches:
            self.refill()
        return self.micro_batches.popleft()

    def refill(self) -> None:
        """Read a batch, and those of the others. Collective: the group.

        Raises: StopIteration on all ranks where one of them has no more; the next call begins anew.
        """
        own = next(self.iter, None)
        found: list[Any] = [None] * self.sp_world_size
        dist.all_gather_object(found, own, group=self.sp_group)
        if any(batch is None for batch in found):
            self.iter = iter(self.dl)
            raise StopIteration
        for batch in found:
            tensors = {key: value.to(self.device) if hasattr(value, "to") else value for key, value in batch.items()}
            self.micro_batches.append(shifted(tensors))


def __getattr__(name: str) -> Any:
    return offered({}, name)
