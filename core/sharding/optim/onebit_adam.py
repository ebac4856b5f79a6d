"""1-bit Adam: after a warm-up the variance is frozen, and what travels is the momentum, one bit an element.

    warm-up   exact Adam; the gradient is all-reduced as ever
    frozen    d  = max(sqrt(v / (1 - beta2^T)), floor) + eps         T = the step at which v was frozen
              m  <- beta1 * m + (1 - beta1) * g                      g of this rank only
              u  = exchange(m / d)                                   two phases, each with error feedback:
                     all-to-all of sign chunks, mean at the chunk's owner; all-gather of the mean's signs
              m  <- u * d
              p  <- p - lr / (1 - beta1^t) * u                       AdamW: p <- p * (1 - lr * weight_decay) before

Where it departs from the paper: what is compressed is m / d rather than m. d is the same on every rank and does not
change, so this is the paper's algorithm in other coordinates, in which the elements of a block are of one size and a
sign says more of each. And d has a floor, 1% of its root mean square, so that a weight without gradients in the warm-up
is not thrown about by the noise of the signs. Scales are of blocks, not of a whole tensor.

Source: Tang et al., arXiv 2102.02888, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.sharding.transport.transport import Pending, Transport
from distui.core.sharding.units.pool import BufferPool
from distui.kernels.onebit import compress_onebit, unpack_signs

if TYPE_CHECKING:
    from distui.core.sharding.optim.runs import FlatRun
    from distui.core.sharding.units.unit import Unit

BLOCK = 1024
"""Elements that share a scale: 1 bit and 1/32 bit of scale an element."""
FLOOR = 0.01


def why_not_onebit(optimizer: torch.optim.Optimizer) -> str:
    """Return why 1-bit Adam cannot take the place of `optimizer`; empty where it can."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"it is a {type(optimizer).__name__}, and only the variance of Adam can be frozen"
    for option in ("amsgrad", "capturable", "differentiable"):
        if any(group.get(option) for group in optimizer.param_groups):
            return f"{option}=True, and the step with the frozen variance does not have it"
    return ""


class Packet:
    """One unit's momentum and what error feedback keeps of it."""

    def __init__(self, unit: Unit, runs: list[tuple[dict[str, Any], FlatRun]], transport: Transport) -> None:
        self.unit, self.runs = unit, runs
        ranks = transport.world_size
        self.chunk = -(-unit.layout.padded_numel // (ranks * 8)) * 8
        """Elements of one rank's part."""
        device = unit.device

        def buffer(numel: int) -> torch.Tensor:
            return torch.zeros(numel, dtype=torch.float32, device=device)

        self.momentum, self.divisor = buffer(self.chunk * ranks), buffer(self.chunk * ranks)
        self.worker_error, self.server_error = buffer(self.chunk * ranks), buffer(self.chunk)
        unheld = torch.ones(self.chunk * ranks, dtype=torch.bool, device=device)
        for _, run in runs:
            unheld[run.start : run.end] = False
        for low, high in unit.layout.gaps:
            unheld[low:high] = True
        self.gaps = unheld.nonzero().view(-1)
        """What no parameter of the optimizer lies in: signs have no zero, so it is set to zero by hand."""

    def nbytes(self) -> int:
        """Return the bytes of all buffers beyond what exact Adam holds."""
        return self.divisor.nbytes + self.worker_error.nbytes + self.server_error.nbytes


class OneBitAdam:
    """Steps the runs of one Adam or AdamW; `frozen` says in which of the two phases it is."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        runs: list[list[FlatRun]],
        units: list[Unit],
        transport: Transport,
        pool: BufferPool,
        warmup_steps: int,
    ) -> None:
        """Raises: UserError where the optimizer has no variance to freeze."""
        if reason := why_not_onebit(inner):
            raise UserError(
                f"compression.gradients=onebit with the optimizer {type(inner).__name__}",
                reason,
                "use torch.optim.Adam or AdamW without that option, or compression.gradients=int8 or fp8",
            )
        self.inner, self.transport, self.warmup_steps = inner, transport, warmup_steps
        self.frozen_at = 0
        """The step at which the variance was frozen; 0 in the warm-up."""
        self._pool, self._units = pool, units
        self._runs = runs
        self._packets: list[Packet] = []
        self._num_ranks = transport.world_size

    @property
    def frozen(self) -> bool:
        """Whether the warm-up is over: gradients then stay on their rank."""
        return self.frozen_at > 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes held beyond what exact Adam holds."""
        return sum(packet.nbytes() for packet in self._packets)

    def follow(self) -> None:
        """After an exact step: freeze the variance where the warm-up is over."""
        if self.frozen:
            return
        count = int(next((state["step"] for state in self.inner.state.values() if "step" in state), 0))
        if count >= self.warmup_steps:
            self._freeze(count)

    def mean_norm(self, total: torch.Tensor, norm_type: float) -> torch.Tensor:
        """Return the mean over the ranks of the p-th power of their gradients' norms (for inf: the largest norm).

        The norm of the mean gradient is known to nobody, since no rank has it; its p-th power is at most this.
        Collective. Shapes: `total` is the sum of |g / ranks|^p on this rank, a scalar.
        """
        infinite = norm_type == float("inf")
        total = total * float(self._num_ranks if infinite else self._num_ranks ** (norm_type - 1.0))
        self.transport.all_reduce(total, op=dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM).wait()
        return total

    def _freeze(self, count: int) -> None:
        self.frozen_at = count
        by_unit: dict[int, list[tuple[dict[str, Any], FlatRun]]] = {}
        for group, runs in zip(self.inner.param_groups, self._runs, strict=True):
            for run in runs:
                by_unit.setdefault(id(run.unit), []).append((group, run))
        self._packets = [Packet(unit, by_unit[id(unit)], self.transport) for unit in self._units if id(unit) in by_unit]
        self._set_divisors()
        for unit in self._units:
            unit.sends_gradient = False
        self.transport.telemetry.event(
            "info", "compression", f"1-bit Adam: variance frozen after {count} steps; the momentum travels as signs"
        )

    def _set_divisors(self) -> None:
        for packet in self._packets:
            packet.divisor.fill_(1.0)
            for group, run in packet.runs:
                state = self.inner.state[run.param]
                if "exp_avg" not in state:  # its parameters had no gradient yet
                    state["step"] = torch.tensor(float(self.frozen_at))
                    state["exp_avg"] = torch.zeros_like(run.param.detach())
                    state["exp_avg_sq"] = torch.zeros_like(run.param.detach())
                root = (state["exp_avg_sq"].float() / (1.0 - group["betas"][1] ** self.frozen_at)).sqrt_().view(-1)
                used = root[root > 0]
                floor = FLOOR * used.square().mean().sqrt().item() if used.numel() else 1.0
                packet.divisor[run.start : run.end] = root.clamp_(min=floor).add_(group["eps"])
            packet.divisor[packet.gaps] = 1.0

    def _hold_momentum(self, packet: Packet) -> None:
        # A loaded state brings tensors of its own.
        for _, run in packet.runs:
            state = self.inner.state[run.param]
            view = packet.momentum[run.start : run.end].view(run.param.shape)
            if state["exp_avg"].data_ptr() != view.data_ptr():
                view.copy_(state["exp_avg"])
                state["exp_avg"] = view

    @torch.no_grad()
    def step(self) -> None:
        """Step with the frozen variance. Collective: all ranks. Each run's `grad` is its rank's share of the mean."""
        first, second = [], []
        for packet in self._packets:
            self._hold_momentum(packet)
            for group, run in packet.runs:
                self._add_gradient(group, run)
            first.append(self._send_to_owners(packet))
        for packet, (pending, mean) in zip(self._packets, first, strict=True):
            pending.wait()
            second.append(self._send_to_all(packet, mean()))
        for packet, (pending, unpack) in zip(self._packets, second, strict=True):
            pending.wait()
            self._update(packet, unpack())

    def _add_gradient(self, group: dict[str, Any], run: FlatRun) -> None:
        grad = run.param.grad
        assert grad is not None
        beta1, ranks = float(group["betas"][0]), self._num_ranks
        sign = -1.0 if group["maximize"] else 1.0
        momentum = self.inner.state[run.param]["exp_avg"]
        momentum.mul_(beta1).add_(grad, alpha=sign * (1.0 - beta1) * ranks)
        if group["weight_decay"] and not self._decoupled(group):
            momentum.add_(run.param, alpha=(1.0 - beta1) * float(group["weight_decay"]))

    def _decoupled(self, group: dict[str, Any]) -> bool:
        return isinstance(self.inner, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))

    # ---- the two phases ------------------------------------------------------------------------------------------

    def _scale_bytes(self, packet: Packet) -> int:
        return 4 * -(-packet.chunk // BLOCK)

    def _write(self, packet: Packet, values: torch.Tensor, error: torch.Tensor, message: torch.Tensor) -> None:
        bits, scale = compress_onebit(values, error, BLOCK)
        at = self._scale_bytes(packet)
        message[:at].copy_(scale.view(torch.uint8))
        message[at : at + bits.numel()].copy_(bits)

    def _read(self, packet: Packet, message: torch.Tensor, out: torch.Tensor) -> None:
        at = self._scale_bytes(packet)
        bits = message[at : at + packet.chunk // 8]
        unpack_signs(bits, packet.chunk, message[:at].view(torch.float32), out=out, block=BLOCK)

    def _buffer(self, packet: Packet) -> torch.Tensor:
        width = self._scale_bytes(packet) + -(-packet.chunk // 32) * 4
        return self._pool.take(self._num_ranks * width, torch.uint8, packet.unit.device)

    def _send_to_owners(self, packet: Packet) -> tuple[Pending, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
        ranks, chunk = self._num_ranks, packet.chunk
        scaled = self._pool.take(ranks * chunk, torch.float32, packet.unit.device)
        torch.div(packet.momentum, packet.divisor, out=scaled)
        buffers = [self._buffer(packet), self._buffer(packet)]
        sent, received = (buffer.view(ranks, -1) for buffer in buffers)
        for rank, (values, error) in enumerate(zip(scaled.split(chunk), packet.worker_error.split(chunk), strict=True)):
            self._write(packet, values, error, sent[rank])

        def mean() -> tuple[torch.Tensor, torch.Tensor]:
            total, part = scaled[:chunk], scaled[chunk : 2 * chunk]  # what they held is sent
            self._read(packet, received[0], total)
            for rank in range(1, ranks):
                self._read(packet, received[rank], part)
                total.add_(part)
            for buffer in buffers:
                self._pool.give(buffer)
            return total.mul_(1.0 / ranks), scaled

        return self.transport.all_to_all(received, sent), mean

    def _send_to_all(
        self, packet: Packet, mean: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[Pending, Callable[[], torch.Tensor]]:
        total, scaled = mean
        buffer = self._buffer(packet)
        messages = buffer.view(self._num_ranks, -1)
        self._write(packet, total, packet.server_error, messages[self.transport.rank])

        def unpack() -> torch.Tensor:
            for message, part in zip(messages, scaled.split(packet.chunk), strict=True):
                self._read(packet, message, part)
            self._pool.give(buffer)
            return scaled.index_fill_(0, packet.gaps, 0.0)

        return self.transport.all_gather(buffer, messages[self.transport.rank]), unpack

    def _update(self, packet: Packet, direction: torch.Tensor) -> None:
        torch.mul(direction, packet.divisor, out=packet.momentum)
        for group, run in packet.runs:
            state = self.inner.state[run.param]
            state["step"] += 1
            lr, beta1 = float(group["lr"]), float(group["betas"][0])
            if group["weight_decay"] and self._decoupled(group):
                run.param.mul_(1.0 - lr * float(group["weight_decay"]))
            piece = direction[run.start : run.end].view(run.param.shape)
            run.param.add_(piece, alpha=-lr / (1.0 - beta1 ** int(state["step"])))
        self._pool.give(direction)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's error feedback, and when the variance was frozen."""
        return {
            "frozen_at": self.frozen_at,
            "num_ranks": self._num_ranks,
            "worker_errors": [packet.worker_error for packet in self._packets],
            "server_errors": [packet.server_error for packet in self._packets],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on after the inner optimizer's states were loaded. None: the checkpoint has nothing for this rank.

        Errors of another number of ranks are of no use; they begin at zero again, and an event says so.
        """
        self.frozen_at = 0
        self._packets = []
        for unit in self._units:
            unit.sends_gradient = True
        self.follow()
        if not self.frozen:
            return
        if state is not None and state["frozen_at"]:
            self.frozen_at = state["frozen_at"]
            self._set_divisors()
            mine = [*(p.worker_error for p in self._packets), *(p.server_error for p in self._packets)]
            saved = [*state["worker_errors"], *state["server_errors"]]
            if state["num_ranks"] == self._num_ranks and [t.shape for t in mine] == [t.shape for t in saved]:
                for tensor, value in zip(mine, saved, strict=True):
                    tensor.copy_(value)
                return
        before = f"{state['num_ranks']} ranks" if state is not None else "a run without 1-bit Adam"
        self.transport.telemetry.event(
            "warning",
            "compression",
            f"1-bit Adam: error feedback begins at zero, because the checkpoint is of {before} and these are "
            f"{self._num_ranks}; a few steps are noisier",
        )
