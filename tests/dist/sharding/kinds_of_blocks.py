"""Kinds of models by their blocks: run in another order, not at all, shared, of torch's own classes, or odd."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.dist.sharding.trainings import BATCH, DIM, Block, Net, Result, Run, batch, decaying, kind, square, train

# ---- which blocks run, and when -----------------------------------------------------------------------------------


class Ordered(Net):
    order: tuple[int, ...] = ()

    def between(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            x = self.blocks[index](x)
        return x


@kind()
def reordered_reused_and_dropped(run: Run) -> Result:
    ways = ((0, 1, 2, 3), (3, 2, 0), (1, 1, 3, 0), (2,), ())

    def before(step: int, model: Any) -> None:
        model.order = ways[step % len(ways)]

    return train(run, Ordered(), before=before, num_steps=6, make=decaying)


@kind()
def each_rank_its_own_way(run: Run) -> Result:
    model, optimizer = run.prepare(net := Ordered(), decaying(net))
    for step in range(5):

        def loss(part: torch.Tensor, rank: int, step: int = step) -> torch.Tensor:
            model.order = ((0, 1), (3, 2, 2, 0), (1,))[(rank + step) % 3]
            return square(model(part))

        run.backward(run.mean_over_ranks(loss, batch(step)))
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


class Experts(Net):
    """Each sample goes to one of four experts."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.blocks):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                mixed = mixed.index_copy(0, rows, expert(x[rows]))
        return self.head(self.first(mixed))


def _split_over_experts(step: int) -> torch.Tensor:
    """Return a batch whose first half never goes to experts 0 and 1, and whose second never to 2 and 3."""
    x = batch(step)
    x[: BATCH // 2, 0], x[BATCH // 2 :, 0] = x[: BATCH // 2, 0].abs(), -x[BATCH // 2 :, 0].abs()
    if step == 2:
        x[:, 1] = x[:, 1].abs()  # and two of them get no sample of any rank
    return x


@kind(in_bf16=True)
def idle_experts_from_the_first_step(run: Run) -> Result:
    return train(run, Experts(), inputs=_split_over_experts, num_steps=4, make=decaying)


@kind()
def idle_experts_later(run: Run) -> Result:
    return train(
        run, Experts(), inputs=lambda step: batch(step) if step == 0 else _split_over_experts(step), num_steps=4
    )


@kind()
def shared_blocks_and_weights(run: Run) -> Result:
    class Tied(Block):
        def __init__(self) -> None:
            super().__init__()
            self.outer = nn.Linear(DIM, DIM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.sin(self.outer(x))

    model = Net(Tied, 5)
    model.blocks[2].inner.weight = model.blocks[0].inner.weight  # type: ignore[union-attr]
    model.blocks[1].outer = model.blocks[3].outer
    model.blocks[4] = model.blocks[1]
    return train(run, model)


@kind()
def a_parameter_of_two_blocks(run: Run) -> Result:
    shared = nn.Parameter(torch.ones(DIM))

    class Sharing(Block):
        def __init__(self) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * self.shared)

    return train(run, Net(Sharing))


@kind()
def an_exception_in_forward_and_going_on(run: Run) -> Result:
    class Failing(Block):
        fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            if self.fails:
                raise FloatingPointError("in the middle of forward")
            return x

    def before(step: int, model: Any) -> None:
        block = model.blocks[step]
        block.fails = True
        try:
            model(run.local(batch(step + 20)))
        except FloatingPointError:
            block.fails = False
        assert not block.fails

    return train(run, Net(Failing), before=before)


# ---- modules of torch's own as blocks -----------------------------------------------------------------------------


class Sequences(Net):
    """Blocks that take [batch, time, dim]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).unflatten(0, (-1, 3))
        for block in self.blocks:
            found = block(x)
            x = found[0] if isinstance(found, tuple) else found
        return self.head(x.mean(1))


@kind(in_bf16=True)
def lstm_blocks(run: Run) -> Result:
    return train(run, Sequences(lambda: nn.LSTM(DIM, DIM, batch_first=True), 3))


@kind()
def gru_blocks_of_two_directions(run: Run) -> Result:
    return train(run, Sequences(lambda: nn.GRU(DIM, DIM // 2, 2, batch_first=True, bidirectional=True), 3))


@kind()
def attention_blocks(run: Run) -> Result:
    class Attending(nn.MultiheadAttention):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, x, x, need_weights=False)

    return train(run, Sequences(lambda: Attending(DIM, 2, batch_first=True), 3))


@kind()
def transformer_layers(run: Run) -> Result:
    def after(step: int, model: nn.Module) -> None:
        model.eval()  # takes a fused way that reads weights of all submodules
        with torch.no_grad():
            seen.append(model(batch(step)))
        model.train()

    seen: list[torch.Tensor] = []
    model = Sequences(lambda: nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.0, batch_first=True), 3)
    found = train(run, model, after=after)
    return found | {"seen": seen[-1]}


@kind()
def embeddings_as_blocks(run: Run) -> Result:
    class Embeddings(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            ids = (x[:, :3] * 3).long().detach() % 7
            for block in self.blocks:
                x = x + block(ids).mean(1)
            return x

    return train(run, Embeddings(lambda: nn.Embedding(7, DIM, padding_idx=2)))


@kind()
def batch_norm_blocks(run: Run) -> Result:
    class Normed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(DIM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.norm(x))

    model, optimizer = run.prepare(net := Net(Normed), torch.optim.SGD(net.parameters(), lr=0.2))
    for step in range(3):
        run.backward(run.mean_over_ranks(lambda part, _: square(model(part)), batch(step)))
        optimizer.step()
        optimizer.zero_grad()
    # Running statistics are each rank's own, as under DistributedDataParallel without its broadcast.
    return {name: value for name, value in run.state(model).items() if "running" not in name and "num_b" not in name}


@kind()
def odd_parameters(run: Run) -> Result:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.wide = nn.Parameter(torch.randn(DIM, 16, dtype=torch.float64) * 0.3)
            self.conv = nn.Conv2d(1, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.back = nn.Linear(32, DIM)

        def between(self, x: torch.Tensor) -> torch.Tensor:
            image = (x.double() @ self.wide).float().view(-1, 1, 4, 4)
            return self.back(self.conv(image * self.scale).flatten(1)) + self.empty.sum()

    return train(run, Odd())


class Looking(Block):
    """Reads the block beside it."""

    beside: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = self.__dict__["beside"]
        return super().forward(x) + 0.1 * F.linear(x, other.inner.weight)


@kind(joined=True)
def compiled_blocks_that_read_each_other(run: Run) -> Result:
    net = Net(Looking)
    for index, block in enumerate(net.blocks):
        vars(block)["beside"] = net.blocks[index - 1]
        block.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
        return train(run, net, num_steps=3)
