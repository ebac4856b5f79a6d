"""The collectives around what is cut, as autograd functions, and the random numbers inside.

`f` hands a whole tensor to cut modules: nothing forward, a sum of the gradients backward. `g` takes what they computed
together: a sum forward, nothing backward (Shoeybi et al., arXiv 1909.08053, section 3). A region lies between them.
Whole activations need the same dropout on all ranks, those inside a region another on each; so inside, the generators
go on from a seed that is drawn of the common state, and get that state back at the end. Recomputation draws the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distui.core.axes.cut import part_of
from distui.core.ranks import ops
from distui.core.sharding.hooks import Hook


def _sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.contiguous()
    total = total.clone() if total is tensor else total
    dist.all_reduce(total, group=group)
    return total


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SumForward.apply(grad, ctx.group), None


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # What is derived of it once more is of each rank's pieces again.
        return _SumBackward.apply(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    """Joins the ranks' pieces along a dimension; every rank's gradient is of the whole, and the same."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, total: int, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, total, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Split.apply(grad, ctx.group, ctx.dim), None, None, None


class _Split(torch.autograd.Function):
    """Takes this rank's piece of a dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.total = group, dim, x.shape[dim]
        low, high = part_of(x.shape[dim], dist.get_world_size(group), dist.get_rank(group))
        return x.narrow(dim, low, high - low).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Gather.apply(grad, ctx.total, ctx.group, ctx.dim), None, None


class _GatherSummed(_Gather):
    """Joins the ranks' pieces along a dimension; every rank's gradient is a part of a sum."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _SumSplit.apply(grad, ctx.group, ctx.dim), None, None, None


class _SumSplit(torch.autograd.Function):
    """Sums over the ranks, of which each gets its piece of a dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.total = group, dim, x.shape[dim]
        return _summed_piece(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _GatherSummed.apply(grad, ctx.total, ctx.group, ctx.dim), None, None


_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13


def _summed_piece(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    places = [part_of(x.shape[dim], num_ranks, other) for other in range(num_ranks)]
    rows = x.movedim(dim, 0)
    most = max(high - low for low, high in places)
    sent = rows.new_zeros(num_ranks, most, *rows.shape[1:])  # collectives want one size
    for other, (low, high) in enumerate(places):
        sent[other, : high - low] = rows[low:high]
    sent = sent.to(ops.device_over(sent.device, group))
    found = torch.empty_like(sent[0])
    _reduce_scatter(found, sent.view(num_ranks * most, *rows.shape[1:]), group=group)
    low, high = places[rank]
    return found[: high - low].to(x.device).movedim(0, dim).contiguous()


def _gathered(x: torch.Tensor, total: int, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    num_ranks, shape = dist.get_world_size(group), list(x.shape)
    sizes = [high - low for low, high in (part_of(total, num_ranks, rank) for rank in range(num_ranks))]
    shape[dim] = max(sizes)  # collectives want one size
    own = x.new_zeros(shape)
    own.narrow(dim, 0, x.shape[dim]).copy_(x)
    travelling = own.to(ops.device_over(own.device, group))
    parts = [torch.empty_like(travelling) for _ in sizes]
    dist.all_gather(parts, travelling, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim).to(x.device)


@torch.compiler.disable
def sum_of_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `g` of x: the sum over the ranks. Collective."""
    found: torch.Tensor = _SumForward.apply(x, group)
    return found


@torch.compiler.disable
def gather_last(x: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the ranks' pieces joined along the last dimension, `total` long. Collective."""
    found: torch.Tensor = _Gather.apply(x, total, group, -1)
    return found


@torch.compiler.disable
def split_last(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's piece of the last dimension. Collective in backward."""
    found: torch.Tensor = _Split.apply(x, group, -1)
    return found


def gather_rows(x: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the ranks' rows behind each other, `total` of them. Collective."""
    found: torch.Tensor = _Gather.apply(x, total, group, 0)
    return found


def split_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's part of the rows. Collective in backward."""
    found: torch.Tensor = _Split.apply(x, group, 0)
    return found


@torch.compiler.disable
def split_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's part of the tokens of what is whole. Shapes: [B, T, D] gives [B, T/P, D]."""
    found: torch.Tensor = _Split.apply(x, group, 1)
    return found


@torch.compiler.disable
def gather_tokens(x: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the whole of the ranks' parts of the tokens, `total` of them. Collective."""
    found: torch.Tensor = _Gather.apply(x, total, group, 1)
    return found


@torch.compiler.disable
def gather_summed(x: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The same for cut modules, whose gradients are summed. Collective, in backward too."""
    found: torch.Tensor = _GatherSummed.apply(x, total, group, 1)
    return found


@torch.compiler.disable
def sum_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's part of the tokens of the sum over the ranks. Collective, in backward too."""
    found: torch.Tensor = _SumSplit.apply(x, group, 1)
    return found


class Region:
    """What lies between `f` and `g` of one model: at most one is open at a time."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.index = group, dist.get_rank(group)
        self._name: str | None = None
        self._given: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._before: list[torch.Tensor] = []
        self._device: torch.device | None = None
        self._watched: set[int] = set()

    @torch.compiler.disable
    def begin(self, name: str, *tensors: Any) -> list[Any]:
        """Return `f` of the tensors, once for all modules given the same; opens the region `name` where it is not."""
        if self._name != name:
            self.end()
            self._open(name, tensors[0].device)
        return [self._handed(value) for value in tensors]

    def _handed(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.requires_grad or not torch.is_grad_enabled():
            return x
        for whole, handed in self._given:
            if whole is x:
                return handed
        handed = _SumBackward.apply(x, self.group)
        self._given.append((x, handed))
        return handed

    @torch.compiler.disable
    def end(self) -> None:
        """Close the region: random numbers go on as if nobody had drawn any inside but its seed."""
        if self._name is None:
            return
        torch.set_rng_state(self._before[0])
        if len(self._before) > 1:
            torch.get_device_module(self._device).set_rng_state(self._before[1])
        self._name = None
        self._given.clear()
        self._before.clear()

    def ends_with(self, module: torch.nn.Module) -> None:
        """Close the region where the forward of `module` ends by an exception: a recomputation is stopped by one."""

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            if output is None:
                self.end()

        if id(module) not in self._watched:
            self._watched.add(id(module))
            module.register_forward_hook(Hook(after), always_call=True)

    @torch.compiler.disable
    def fork(self, device: torch.device) -> None:
        """Open a region in which nothing is handed: what is computed in it has other tokens on each rank.

        In a recomputation, which gives the generators back what they were, until its end.
        """
        is_again = torch._C._current_graph_task_id() != -1
        self._open("" if is_again else "stream", device)
        if is_again:
            self._name = None
            self._before.clear()

    def _open(self, name: str, device: torch.device) -> None:
        seed = int(torch.randint(2**62, ()).item()) ^ (self.index * 0x9E3779B97F4A7C15 & (2**62 - 1))
        self._name, self._device = name, device
        self._before = [torch.get_rng_state()]
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            of_device = torch.get_device_module(device)
            self._before.append(of_device.get_rng_state())
            of_device.manual_seed(seed)

    def share_random(self) -> None:
        """Have all ranks go on with the random numbers of the first: whole activations need the same. Collective."""
        torch.set_rng_state(self._of_first(torch.get_rng_state()))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(self._of_first(torch.cuda.get_rng_state()))

    def _of_first(self, state: torch.Tensor) -> torch.Tensor:
        travelling = state.to(ops.object_device(self.group))
        dist.broadcast(travelling, group=self.group, group_src=0)
        return travelling.cpu()
