"""Context parallelism: each rank has a piece of every sequence.

Before the model's own forward the batch is cut along the sequence: labels are shifted first, positions are those of the
whole. Attention goes through transformers' registry. By Ulysses (Jacobs et al., arXiv 2309.14509) an all-to-all gives a
rank the whole sequence of its heads, plain attention follows, another brings back its piece of all heads; by a ring
(`ring`) pieces stay where they are, and keys and values go around. The loss is the mean over the valid tokens of the
whole sequences, the same on all ranks.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from distui.core.errors import UserError
from distui.core.parallel.batches import LOOKED_AT, compare_batch
from distui.core.parallel.ring import ring_attention, zigzag
from distui.core.ranks import ops
from distui.core.sharding.hooks import Hook

IGNORED = -100
"""The label of a token that no loss is computed of."""
_numbers = itertools.count()


class _AllToAll(torch.autograd.Function):
    """Sends piece i of the first dimension to rank i; its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        sent = x.contiguous().to(ops.device_over(x.device, group))
        found = torch.empty_like(sent)
        dist.all_to_all_single(found, sent, group=group)
        return found.to(x.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


class _SumOfParts(torch.autograd.Function):
    """Adds the ranks' parts of a loss. Gradients are averaged over the ranks later, so they begin that much larger."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.num_ranks = dist.get_world_size(group)
        total = part.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.num_ranks, None


class _Join(torch.autograd.Function):
    """Joins the ranks' pieces of the sequence (dimension 1), whose `places` [rank, token] are in the whole.

    The gradient is of the whole, the same on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.places = group, places
        sent = x.contiguous().to(ops.device_over(x.device, group))
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, sent, group=group)
        return torch.cat(parts, 1).to(x.device).index_select(1, places.flatten().argsort())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        own = grad.index_select(1, ctx.places[dist.get_rank(ctx.group)])
        return own * dist.get_world_size(ctx.group), None, None


class SequenceCut:
    """Cuts the sequences of one model's batches over the ranks of a group."""

    def __init__(self, model: Any, group: dist.ProcessGroup, method: str = "auto", *, is_staged: bool = False) -> None:
        """Set hooks on `model`, and its attention; `method` is ulysses, ring, or auto: ulysses where heads divide.

        Where it `is_staged`, a pipeline has `forward` cut each micro-batch, in the place of hooks.

        Raises: UserError for what is not known to come out right.
        """
        self.model, self.group = model, group
        self.index, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        _refuse_model(model)
        self.is_ring = _goes_round(model.config, self.num_ranks, method)
        self._signature = inspect.signature(type(model).forward)
        self._padding: torch.Tensor | None = None
        self._labels: torch.Tensor | None = None
        self._num_valid: Any = None
        self._length = self._num_attended = self._seen = 0
        self._is_inside = False
        self._random: list[torch.Tensor] = []
        self._plain_loss = model.loss_function
        model.loss_function = self._loss
        self._register()
        self._is_staged, self._own_forward = is_staged, model.forward
        if not is_staged:
            model.register_forward_pre_hook(Hook(self._before), with_kwargs=True)
            model.register_forward_hook(Hook(self._after), always_call=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward on this rank's pieces; it may end before the model does. Collective."""
        output = None
        args, kwargs = self._before(self.model, args, kwargs)
        try:
            output = self._own_forward(*args, **kwargs)
        finally:
            if output is None:
                self._after(self.model, args, None)
        return self._after(self.model, args, output)

    def _register(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._attend = sdpa_attention_forward
        name = f"distui_context_{next(_numbers)}"
        AttentionInterface.register(name, self._attention)
        AttentionMaskInterface.register(name, self._mask)
        self.model.set_attn_implementation(name)
        if self.model.config._attn_implementation != name:
            raise _unknown(self.model, "its attention does not go through transformers' registry")

    # ---- the batch -----------------------------------------------------------------------------------------------

    def _places(self, device: torch.device) -> torch.Tensor:
        """Return which tokens of the whole each rank has, [rank, token]."""
        if self.is_ring:
            return zigzag(self._length, self.num_ranks).to(device)
        return torch.arange(self._length, device=device).view(self.num_ranks, -1)

    def _piece(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, self._places(x.device)[self.index])

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = self._signature.bind(module, *args, **kwargs).arguments
        more = given.pop(next((p.name for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD), ""), {})
        given = {name: value for name, value in itertools.islice(given.items(), 1, None)} | more
        if module.training and self._seen < LOOKED_AT and torch._C._current_autograd_node() is None:
            self._seen += 1
            compare_batch(given, self.group, "context-parallel")
        known = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "num_items_in_batch"}
        known.add("shift_labels")
        off = {name: value for name, value in given.items() if name not in known and _is_set(name, value)}
        if off:
            name, value = next(iter(off.items()))
            raise UserError(
                f"{name}={value if isinstance(value, bool | int) else '...'} under context_parallel={self.num_ranks}",
                "the sequence is cut over ranks, and of what a model is given only "
                f"{', '.join(sorted(known))} are known to come out as of the whole",
                f"call the model without {name}, or set strategy.context_parallel to 1",
            )
        whole = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        assert isinstance(whole, torch.Tensor)
        length, parts = whole.shape[1], self.num_ranks * (2 if self.is_ring else 1)
        if length % parts:
            below = length - length % parts
            raise UserError(
                f"sequences of {length} tokens over context_parallel={self.num_ranks} ranks",
                f"{length} = {length // parts} x {parts} + {length % parts}; every rank takes "
                + ("two pieces of as many tokens in a ring" if self.is_ring else "as many tokens"),
                f"pad or cut them to {below or parts} or {below + parts} tokens",
            )
        self._length, self._num_attended = length, 0
        self._take_mask(given.pop("attention_mask", None), length)
        labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
        if labels is not None and shifted is None:
            shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]  # first: or a piece would lose its last target
        # Without labels the model computes no loss: shifted ones are for one of the script's own.
        self._take_labels(shifted if labels is not None else None, given.pop("num_items_in_batch", None))
        self._is_inside = True
        positions = torch.arange(length, device=whole.device)[None]
        own = given.pop("position_ids", None)
        if own is not None and not torch.equal(own, positions.expand_as(own)):
            raise UserError(
                "position_ids that are not 0, 1, 2, ... under context parallelism",
                "packed sequences would need a mask of their own",
                "leave position_ids out, and give padding in attention_mask",
            )
        cut = {name: self._piece(value) for name, value in given.items() if isinstance(value, torch.Tensor)}
        if self._labels is not None:
            cut["labels"] = self._labels
        if self.is_ring:  # or transformers would take positions that do not follow each other for packed sequences
            cut["attention_mask"] = torch.ones(whole.shape[0], length // self.num_ranks, device=whole.device).long()
        self._fork_random()
        return (), cut | {"position_ids": self._piece(positions), "use_cache": False}

    def _take_mask(self, mask: torch.Tensor | None, length: int) -> None:
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
            raise UserError(
                f"an attention_mask of {list(mask.shape)} under context parallelism",
                f"it says which of {length} tokens are padding, as [batch, {length}]",
                "give such a mask, or none",
            )
        self._padding = None if mask is None or bool(mask.bool().all()) else mask.bool()

    def _take_labels(self, shifted: torch.Tensor | None, num_items: Any) -> None:
        self._labels = None
        if shifted is not None:
            self._num_valid = num_items if num_items is not None else (shifted != IGNORED).sum()
            self._labels = self._piece(shifted)

    # ---- what the model computes with ----------------------------------------------------------------------------

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        if not self._is_inside:  # the script's own, of whole logits
            loss: torch.Tensor = self._plain_loss(logits, labels, vocab_size=vocab_size, **kwargs)
            return loss
        shifted, self._labels = self._labels, None
        if shifted is None:
            raise _unknown(self.model, "it computes a loss of labels that it was not given")
        part = self._plain_loss(
            logits, labels, vocab_size=vocab_size, shift_labels=shifted, num_items_in_batch=self._num_valid
        )
        total: torch.Tensor = _SumOfParts.apply(part, self.group)
        return total

    def _mask(self, batch_size: int, mask_function: Any = None, **kwargs: Any) -> torch.Tensor | None:
        """Return the mask of the whole sequences, True where a token is seen; None where it is causal and no more."""
        from transformers.masking_utils import causal_mask_function, sdpa_mask

        if mask_function is not causal_mask_function:
            raise _unknown(self.model, "its attention has another mask than a causal one and padding")
        if self._padding is None or self.is_ring:
            return None
        device = self._padding.device
        found: torch.Tensor | None = sdpa_mask(
            batch_size, self._length, self._length, mask_function=mask_function, attention_mask=self._padding,
            allow_is_causal_skip=False, device=device,
        )  # fmt: skip
        return found

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if not self._is_inside and torch._C._current_graph_task_id() == -1:  # in backward it is computed again
            raise UserError(
                f"a part of {type(self.model).__name__} was called, and not the model",
                "sequences are cut, and losses joined, around the model's own forward",
                "call model(...), or set strategy.context_parallel to 1",
            )
        self._num_attended += 1
        off = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if self.is_ring and dropout:
            off.append(f"dropout={dropout:g}")
        num_heads, num_shared = query.shape[1], key.shape[1]
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if off or (self.is_ring and not causal) or not (self.is_ring or _divide(num_heads, num_shared, self.num_ranks)):
            why = f"{off[0]} is set" if off else f"a rank has {num_heads} heads and {num_shared} of keys"
            raise UserError(
                f"attention of {type(module).__name__} over context_parallel={self.num_ranks} ranks",
                f"{why}; "
                + ("in a ring it is causal, without dropout" if self.is_ring else "each rank takes as many heads"),
                "set strategy.context_method to ulysses, or strategy.context_parallel to 1"
                if self.is_ring
                else "set strategy.context_parallel to what divides the heads, or strategy.context_method to ring",
            )
        if self.is_ring:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            padding = None if self._padding is None else ~self._padding
            if padding is not None and self._is_staged and torch._C._current_graph_task_id() != -1:
                raise UserError(
                    "padding in a ring that is computed again in a pipeline",
                    "micro-batches that are under way have masks of their own, and the ring knows the last one's",
                    "set activation_checkpointing.mode to none, or strategy.context_method to ulysses",
                )
            return ring_attention(query, key, value, padding, scale, self.group).transpose(1, 2).contiguous(), None
        if num_shared % self.num_ranks:
            key, value = (x.repeat_interleave(self.num_ranks // num_shared, 1) for x in (key, value))
        query, key, value = (self._whole_sequence(x) for x in (query, key, value))
        if (groups := query.shape[1] // key.shape[1]) > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        found = F.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal and attention_mask is None, scale=scaling
        )
        return self._own_piece(found).transpose(1, 2).contiguous(), None

    def _whole_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, T/P, D] gives [B, H/P, T, D]."""
        sent = x.unflatten(1, (self.num_ranks, -1)).movedim(1, 0)
        found: torch.Tensor = _AllToAll.apply(sent, self.group)  # [P, B, H/P, T/P, D], P the pieces of the sequence
        return found.movedim(0, 2).flatten(2, 3)

    def _own_piece(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H/P, T, D] gives [B, H, T/P, D]."""
        sent = x.unflatten(2, (self.num_ranks, -1)).movedim(2, 0)
        found: torch.Tensor = _AllToAll.apply(sent, self.group)  # [P, B, H/P, T/P, D], P the heads of each rank
        return found.movedim(0, 1).flatten(1, 2)

    # ---- afterwards ----------------------------------------------------------------------------------------------

    def _fork_random(self) -> None:
        """Draw other numbers on each rank, which has other tokens."""
        seed = int(torch.randint(2**62, ()).item()) ^ (self.index * 0x9E3779B97F4A7C15 & (2**62 - 1))
        self._random = [torch.get_rng_state()]
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._random.append(torch.cuda.get_rng_state())
            torch.cuda.manual_seed(seed)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._is_inside = False
        if self._random:
            torch.set_rng_state(self._random[0])
            if len(self._random) > 1:
                torch.cuda.set_rng_state(self._random[1])
            self._random = []
        if output is None:  # it ended by an exception
            return None
        if not self._num_attended:
            raise _unknown(self.model, "its attention was not called through transformers' registry")
        if self._labels is not None:
            raise _unknown(self.model, "its loss is not computed by model.loss_function")
        if not hasattr(output, "logits"):
            raise _unknown(self.model, f"its output is a {type(output).__name__} without logits")
        if getattr(output, "loss", None) is not None and torch.is_grad_enabled():
            output.logits = None  # of a piece: whole ones would be the largest tensor of all
        else:
            output.logits = _Join.apply(output.logits, self._places(output.logits.device), self.group)
        return output


def _is_set(name: str, value: Any) -> bool:
    if name == "return_dict":
        return False
    return value is not None and value is not False and not (name == "logits_to_keep" and value == 0)


def _unknown(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"context parallelism is not known to be right for {type(model).__name__}",
        why,
        "set strategy.context_parallel to 1; transformers' causal models with rotary positions, and GPT-2, can be cut",
    )


def _refuse_model(model: Any) -> None:
    kind, config = type(model), getattr(model, "config", None)
    ours = kind.__module__.startswith("transformers.") and hasattr(model, "set_attn_implementation")
    if config is None or not ours:
        raise _unknown(model, "it is none of transformers' models, whose attention and loss are known")
    rotary = any("RotaryEmbedding" in type(module).__name__ for module in model.modules())
    if not kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) or not (rotary or kind.__name__ == "GPT2LMHeadModel"):
        raise _unknown(model, "it is no causal model with rotary positions, so a piece is not known to be like a whole")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds or getattr(config, "output_router_logits", False) or getattr(config, "is_encoder_decoder", False):
        raise _unknown(model, f"its layers are {', '.join(sorted(kinds))}" if kinds else "it needs more than a piece")


def _divide(num_heads: int, num_shared: int, num_ranks: int) -> bool:
    """Tell whether each rank can have as many heads: of queries its own, of keys its own or its neighbours' too."""
    return not (num_heads % num_ranks or (num_shared % num_ranks and num_ranks % num_shared))


def _goes_round(config: Any, num_ranks: int, method: str) -> bool:
    """Tell whether keys go around in a ring. Raises: UserError where Ulysses is asked for and heads do not divide."""
    heads = int(config.num_attention_heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    if method == "ring" or _divide(heads, shared, num_ranks):
        return method == "ring"
    if method == "auto":
        return True
    fit = ", ".join(str(size) for size in range(1, heads + 1) if _divide(heads, shared, size))
    raise UserError(
        f"context_parallel={num_ranks} does not divide num_attention_heads={heads}"
        if heads % num_ranks
        else f"context_parallel={num_ranks} ranks and num_key_value_heads={shared} do not divide each other",
        "in attention by ulysses each rank has the whole sequence for its part of the heads",
        f"set strategy.context_parallel to one of {fit}, or strategy.context_method to ring",
    )
