"""Step time, CPU time and memory of the native engine against its peers, in one run.

    python benchmarks/engine.py --model wide --dtype fp32 --variants ddp native1 native3 fsdp2_reshard deepspeed3

Each variant is a pair of gloo ranks, each pinned to a core of its own with one thread. All variants stay alive and take
turns: a round is a few steps of every variant, so drift of the machine hits all alike; medians over rounds are printed,
and ratios to DDP. *Overhead* is CPU time beyond bare forward and backward. Peak memory is how far the resident set grew
from before the model was built. DeepSpeed and Accelerate are left out where they are not installed (distui[bench]).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

MODELS = {
    "small": {"num_layers": 6, "dim": 256, "num_heads": 8, "batch": 8, "seq": 128},
    "wide": {"num_layers": 4, "dim": 768, "num_heads": 12, "batch": 4, "seq": 128},
    "tiny": {"num_layers": 6, "dim": 256, "num_heads": 8, "batch": 1, "seq": 16},
    "deep": {"num_layers": 48, "dim": 128, "num_heads": 4, "batch": 4, "seq": 64},
}
DEFAULT = ["bare", "ddp", "native0", "native1", "native2", "native3", "zero_redundancy", "fsdp2_keep", "fsdp2_reshard"]
BACKENDS = ["engine_native0", "engine_native3", "engine_ddp0", "engine_fsdp2_2", "engine_fsdp2_3", "engine_deepspeed2"]
"""`distui.Engine` and the documented loop on each backend: what the engine adds to what stands under it."""
SOCKETS = [f"native{stage}_sockets" for stage in range(4)]
"""As between hosts: ranks that do not read each other's memory."""
ALL = [*DEFAULT, *SOCKETS, "deepspeed1", "deepspeed2", "deepspeed3", "accelerate_fsdp2", *BACKENDS]
VOCAB = 256


def build_model(name: str) -> Any:
    """Return the byte-level GPT of configuration `name`."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    shape = MODELS[name]
    dim, num_heads, seq = shape["dim"], shape["num_heads"], shape["seq"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            heads = self.qkv(self.norm1(x)).view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.position = nn.Embedding(VOCAB, dim), nn.Embedding(seq, dim)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["num_layers"]))
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCAB, bias=False)

        def forward(self, ids: Any) -> Any:
            x = self.embedding(ids) + self.position(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    return GPT()


def make_step(variant: str, model: Any, dtype: str) -> Any:
    """Return `step(ids)` that does one optimizer step of `variant` and returns the loss."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F

    low = torch.bfloat16 if dtype == "bf16" else None

    def loss_of(net: Any, ids: Any) -> Any:
        return F.cross_entropy(net(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())

    def adamw(params: Any) -> Any:
        return torch.optim.AdamW(params, lr=1e-3, fused=True)

    def plain(net: Any, optimizer: Any) -> Any:
        def step(ids: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=low is not None):
                loss = loss_of(net, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    if variant == "bare":

        def bare(ids: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=low is not None):
                loss = loss_of(model, ids)
            loss.backward()
            for param in model.parameters():
                param.grad = None
            return loss

        return bare
    if variant in ("ddp", "zero_redundancy"):
        net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        if variant == "ddp":
            return plain(net, adamw(net.parameters()))
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return plain(net, ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-3, fused=True))
    if variant.startswith("native"):
        from distui.core.ranks.precision import apply_border_casts
        from distui.core.sharding.sharded import ShardedModel
        from distui.core.sharding.transport.transport import Transport

        if variant.endswith("_sockets"):
            Transport.min_read_bytes = 1 << 60
        optimizer = adamw(model.parameters())
        sharded = ShardedModel(model, stage=int(variant[6]), group=dist.group.WORLD, compute_dtype=low)
        if low is not None:
            apply_border_casts(model, low)
        prepared = sharded.prepare_optimizer(optimizer)

        def native(ids: Any) -> Any:
            sharded.schedule.hide_gradients()
            loss = loss_of(model, ids)
            loss.backward()
            sharded.schedule.end_backward()
            prepared.step()
            prepared.zero_grad()
            return loss

        return native
    if variant.startswith("engine_"):
        import distui

        backend = variant.removeprefix("engine_")[:-1].rstrip("_")
        strategy = {"backend": backend, "zero_stage": int(variant[-1])}
        trainer = distui.Engine(strategy=strategy, precision={"dtype": dtype})
        net, stepping = trainer.prepare(model, adamw(model.parameters()))

        def engine_step(ids: Any) -> Any:
            with trainer.accumulate(net):
                loss = loss_of(net, ids)
                trainer.backward(loss)
                stepping.step()
                stepping.zero_grad()
            return loss

        return engine_step
    if variant.startswith("fsdp2"):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
        reshard = variant.endswith("reshard")
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=reshard, mp_policy=policy)
        fully_shard(model, reshard_after_forward=reshard, mp_policy=policy)
        optimizer = adamw(model.parameters())

        def fsdp(ids: Any) -> Any:
            loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return fsdp
    if variant == "accelerate_fsdp2":
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
        engine = Accelerator(fsdp_plugin=plugin, cpu=True, mixed_precision="bf16" if low else "no")
        net, optimizer = engine.prepare(model, adamw(model.parameters()))

        def accelerated(ids: Any) -> Any:
            loss = loss_of(net, ids)
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return accelerated
    if variant.startswith("deepspeed"):
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(variant[-1])},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
            "gradient_clipping": 0.0,
            "bf16": {"enabled": low is not None},
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)

        def deep(ids: Any) -> Any:
            loss = loss_of(engine, ids)
            engine.backward(loss)
            engine.step()
            return loss

        return deep
    raise SystemExit(f"unknown variant {variant}; known are {', '.join(ALL)}")


def worker(options: argparse.Namespace) -> None:
    """Serve rounds of steps: a number of steps on stdin, a line of figures on stdout."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries chat on stdout
    os.sched_setaffinity(0, {options.rank % (os.cpu_count() or 1)})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{options.store}", rank=options.rank, world_size=2)
    shape = MODELS[options.model]
    torch.manual_seed(options.rank)
    ids = torch.randint(0, VOCAB, (shape["batch"], shape["seq"] + 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(options.variant, build_model(options.model), options.dtype)
    for _ in range(3):
        loss = step(ids)
    for line in sys.stdin:
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            loss = step(ids)
        figures = {
            "wall": (time.perf_counter() - wall) / int(line),
            "cpu": (time.process_time() - cpu) / int(line),
            "rss_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
            "loss": loss.item(),
        }
        print(json.dumps(figures), file=report, flush=True)
    dist.destroy_process_group()


def start(variant: str, options: argparse.Namespace, folder: str) -> list[Any]:
    """Start the two ranks of a variant."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "ACCELERATE_USE_CPU": "true",
    }
    script, own = __file__, variant.removeprefix("before_")
    if own != variant:
        script = f"{options.before}/benchmarks/engine.py"
        environment |= {"PYTHONPATH": options.before}
    ranks = []
    for rank in range(2):
        command = [sys.executable, script, "--worker", "--variant", own, "--rank", str(rank)]
        command += ["--model", options.model, "--dtype", options.dtype, "--store", f"{folder}/{variant}"]
        ranks.append(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=open(f"{folder}/{variant}.{rank}.log", "w"),  # noqa: SIM115
                text=True,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
        )
    return ranks


def measure(variants: list[str], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return medians by variant."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        pairs = {variant: start(variant, options, folder) for variant in variants}
        try:
            for _ in range(options.rounds):
                for variant, ranks in pairs.items():
                    for rank in ranks:
                        with contextlib.suppress(BrokenPipeError):  # it has ended: its empty line says so below
                            rank.stdin.write(f"{options.steps}\n")
                            rank.stdin.flush()
                    lines = [rank.stdout.readline() for rank in ranks]
                    if not all(lines):
                        log = "\n".join(open(f"{folder}/{variant}.{r}.log").read()[-1500:] for r in range(2))  # noqa: SIM115
                        raise SystemExit(f"{variant} failed:\n{log}")
                    figures = [json.loads(line) for line in lines]
                    found[variant].append(
                        {
                            "wall": max(f["wall"] for f in figures),
                            "cpu": sum(f["cpu"] for f in figures) / 2,
                            "rss_mib": max(f["rss_mib"] for f in figures),
                            "loss": sum(f["loss"] for f in figures) / 2,
                        }
                    )
        finally:
            for ranks in pairs.values():
                for rank in ranks:
                    with contextlib.suppress(BrokenPipeError):
                        rank.stdin.close()
                    rank.terminate()
                for rank in ranks:
                    rank.wait()
    medians = {}
    for variant, rows in found.items():
        medians[variant] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return medians


def main() -> None:
    """Print one table for a model and a format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wide")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--variants", nargs="+", default=None, help=f"among {', '.join(ALL)}")
    parser.add_argument("--before", metavar="CHECKOUT", help="an earlier version, for variants such as before_native3")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    variants = options.variants or [
        *DEFAULT,
        *(["deepspeed1", "deepspeed2", "deepspeed3"] if importlib.util.find_spec("deepspeed") else []),
        *(["accelerate_fsdp2"] if importlib.util.find_spec("accelerate") else []),
    ]
    for needed in ("ddp", "bare"):
        if needed not in variants:
            variants.insert(0, needed)
    figures = measure(variants, options)
    ddp, bare = figures["ddp"], figures["bare"]
    print(f"{options.model}, {options.dtype}, 2 gloo ranks, one core each; medians of {options.rounds} rounds")
    print(f"{'variant':18}{'wall ms':>9}{'/ddp':>7}{'cpu ms':>9}{'/ddp':>7}{'overhead':>10}{'peak MiB':>10}{'loss':>9}")
    for variant, row in figures.items():
        overhead = (row["cpu"] - bare["cpu"]) / bare["cpu"]
        print(
            f"{variant:18}{row['wall'] * 1e3:9.1f}{row['wall'] / ddp['wall']:7.3f}{row['cpu'] * 1e3:9.1f}"
            f"{row['cpu'] / ddp['cpu']:7.3f}{overhead:10.1%}{row['rss_mib']:10.0f}{row['loss']:9.4f}"
        )


if __name__ == "__main__":
    main()
