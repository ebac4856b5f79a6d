"""The ranks of benchmarks/gpu: each trains what it is told, and leaves its figures in a file."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

PARITY = {
    **{f"stage {stage}": (stage, "none", "none") for stage in range(4)},
    "stage 2, optimizer on the host": (2, "cpu", "none"),
    "stage 3, optimizer on the host": (3, "cpu", "none"),
    "stage 3, all on the host": (3, "cpu", "cpu"),
}
"""What is compared with plain torch: stage, home of the optimizer, home of the parameters."""
ALLOWED_ERROR = 1e-3
"""Of how far the weights have moved: sums over the ranks come in another order."""


def build_model(shape: dict[str, int]) -> Any:
    """Return a decoder as Llama's: RMSNorm, rotary positions, SwiGLU, no biases."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    dim, heads = shape["dim"], shape["heads"]

    def rotate(x: Any) -> Any:
        width = x.shape[-1]
        rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device).float() / width)
        angles = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), rates)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
            self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.gate, self.up = nn.Linear(dim, shape["ffn"], bias=False), nn.Linear(dim, shape["ffn"], bias=False)
            self.down = nn.Linear(shape["ffn"], dim, bias=False)

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
            y = self.norm2(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(shape["vocab"], dim)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["layers"]))
            self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, shape["vocab"], bias=False)

        def forward(self, ids: Any) -> Any:
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Llama()


def loss_of(model: Any, ids: Any) -> Any:
    """Return the loss of the next token."""
    from torch.nn import functional as F

    return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())


def count_params(shape: dict[str, int]) -> int:
    """Return the parameters of the model."""
    block = 4 * shape["dim"] ** 2 + 3 * shape["dim"] * shape["ffn"] + 2 * shape["dim"]
    return shape["layers"] * block + 2 * shape["vocab"] * shape["dim"] + shape["dim"]


def _ids(shape: dict[str, int], batch: int, seed: int, device: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape["vocab"], (batch, shape["seq"] + 1), generator=generator).to(device)


def _engine(dtype: str, stage: int, optimizer: str = "none", params: str = "none", **sections: Any) -> Any:
    import distui

    return distui.Engine(
        strategy={"zero_stage": stage},
        precision={"dtype": dtype},
        offload={"optimizer": optimizer, "params": params},
        optimizer={"max_grad_norm": 1.0},
        **sections,
    )


def parity(shape: dict[str, int], device: Any, rank: int, world: int) -> dict[str, Any]:
    """Train with every placement, and return how far each is from plain torch."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    size = max(shape["batch"] // world, 1)

    def start() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = build_model(shape).to(device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, optimizer = start()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(5):
        loss_of(model, _ids(shape, size * world, step, device)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    plain = model.state_dict()
    found: dict[str, Any] = {}
    for name, (stage, home, params) in PARITY.items():
        engine = _engine("fp32", stage, home, params)
        prepared, adam = engine.prepare(*start())
        for step in range(5):
            mine = _ids(shape, size * world, step, device)[rank * size : (rank + 1) * size]
            engine.backward(loss_of(prepared, mine))
            adam.step()
            adam.zero_grad()
        state = {key: value.to(device) for key, value in engine.get_state_dict(prepared).items()}
        errors = [
            (state[key] - plain[key]).abs().max() / (plain[key] - before[key]).abs().max().clamp(min=1e-12)
            for key in state  # only rank 0 has them
        ]
        error = max((float(value) for value in errors), default=0.0)
        found[name] = {"error": error, "ok": error < ALLOWED_ERROR}
        engine.free_memory()
    return found


def llama(shape: dict[str, int], variant: str, device: Any, rank: int, steps: int) -> dict[str, Any]:
    """Time steps of one variant on this rank."""
    import torch

    from distui.core.model.flops import device_peak_flops

    step, ids = _variant(shape, variant, device), _ids(shape, shape["batch"], rank, device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        loss = step(ids)
    wait()
    begin = time.perf_counter()
    for _ in range(steps):
        loss = step(ids)
    wait()
    seconds = (time.perf_counter() - begin) / steps
    tokens_per_s = shape["batch"] * shape["seq"] / seconds
    matrices = count_params(shape) - shape["vocab"] * shape["dim"]
    flops = 6 * matrices + 6 * shape["layers"] * shape["dim"] * shape["seq"]
    peak = device_peak_flops(device, "bf16")
    return {
        "tokens_per_s": tokens_per_s,
        "step_s": seconds,
        "mfu": tokens_per_s * flops / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "loss": float(loss),
    }


def _variant(shape: dict[str, int], variant: str, device: Any) -> Any:
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(shape)
    if variant.startswith("stage"):
        engine = _engine("bf16", int(variant[5]), "cpu" if variant.endswith("_cpu") else "none")
        net, adam = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))

        def ours(ids: Any) -> Any:
            loss = loss_of(net, ids)
            engine.backward(loss)
            adam.step()
            adam.zero_grad()
            return loss.detach()

        return ours
    if variant == "deepspeed3":
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": shape["batch"],
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
        }
        theirs, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)

        def deep(ids: Any) -> Any:
            loss = loss_of(theirs, ids)
            theirs.backward(loss)
            theirs.step()
            return loss.detach()

        return deep
    net = model
    if variant == "ddp":
        net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (*model.blocks, model):
            fully_shard(part, mp_policy=policy)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def plain(ids: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=variant == "ddp"):
            loss = loss_of(net, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return plain


def largest(shape: dict[str, int], device: Any, rank: int) -> dict[str, Any]:
    """Train two steps of a model that was never whole on the device."""
    import torch

    import distui

    engine = _engine("bf16", 3, "cpu", "cpu", activation_checkpointing={"mode": "full"})
    with distui.init_empty_weights():
        model = build_model(shape)
    net, adam = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    for step in range(2):
        begin = time.perf_counter()
        loss = loss_of(net, _ids(shape, shape["batch"], 100 * step + rank, device))
        engine.backward(loss)
        adam.step()
        adam.zero_grad()
        value = float(loss)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    report = engine.memory_report()
    return {"step_s": time.perf_counter() - begin, "peak_bytes": peak, "host_bytes": report.get("host"), "loss": value}


def worker(options: argparse.Namespace) -> None:
    """Be one rank, and leave its figures in a file."""
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    shape = json.loads(options.shape)
    if options.variant in ("ddp", "fsdp2", "deepspeed3"):
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    if options.worker == "parity":
        found = parity(shape, device, rank, world)
    elif options.worker == "llama":
        found = llama(shape, options.variant, device, rank, options.steps)
    else:
        found = largest(shape, device, rank)
    Path(options.result, f"{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("worker", choices=["parity", "llama", "largest"])
    for name in ("device", "shape", "result", "variant"):
        parser.add_argument(f"--{name}", required=name != "variant", default="")
    parser.add_argument("--steps", type=int, default=8)
    worker(parser.parse_args())
