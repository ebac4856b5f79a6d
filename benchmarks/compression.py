"""What compressed communication costs in loss, and gains in bytes and, over a slow link, in time.

    python benchmarks/compression.py --what convergence    # the byte GPT, 500 steps, exact against each format
    sudo python benchmarks/compression.py --what link      # step time over 100 Mbit/s (two network namespaces)

Convergence: 2 gloo ranks train the byte GPT on the text of the standard library, from one seed on the same batches; the
loss is the mean of the last 50 steps. Link: each rank lives in a network namespace of its own, joined by a veth pair
whose two ends let `--mbit` through (tc tbf). Medians over the steps; formats run one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

CASES = {
    "exact": (0, None, None),
    "int8": (0, "int8", None),
    "fp8": (0, "fp8", None),
    "onebit": (0, "onebit", None),
    "exact, stage 3": (3, None, None),
    "int8 + int8 weights, stage 3": (3, "int8", "int8"),
}
CONVERGENCE = ("exact", "int8", "fp8", "onebit")


def worker(options: argparse.Namespace) -> None:
    """Train each case on this rank; rank 0 prints a line of JSON for each."""
    import torch
    import torch.distributed as dist

    from distui.core.sharding.sharded import ShardedModel
    from distui.core.sharding.transport.compression import Compression
    from distui.demo import ByteGPT, StdlibText

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=options.init, rank=options.rank, world_size=2)
    data = StdlibText(context=options.context)
    for case in options.cases:
        stage, gradients, weights = CASES[case]
        torch.manual_seed(0)
        model = ByteGPT(options.layers, options.dim, context=options.context)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        compression = Compression(gradients, weights, warmup_steps=options.warmup) if gradients else None
        sharded = ShardedModel(model, stage=stage, group=dist.group.WORLD, compression=compression)
        optimizer = sharded.prepare_optimizer(optimizer)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1)).tolist()
        losses, times, sent = [], [], []
        for step in range(options.steps):
            picked = [order[(step * 2 + options.rank + 2 * i * options.steps) % len(order)] for i in range(4)]
            rows = [data[index] for index in picked]
            ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
            begin, before = time.perf_counter(), sharded.sent_bytes
            sharded.schedule.hide_gradients()
            loss = model(ids, labels).loss
            loss.backward()
            sharded.schedule.end_backward()
            optimizer.step()
            optimizer.zero_grad()
            sharded.schedule.finish_gathers()
            times.append(time.perf_counter() - begin)
            sent.append(sharded.sent_bytes - before)
            losses.append(loss.detach())
        mean = torch.stack(losses[-min(50, options.steps) :]).mean()
        dist.all_reduce(mean)
        if options.rank == 0:
            num_params = sum(param.numel() for param in model.parameters()) if stage < 3 else 0
            half = len(times) // 2
            figures = {"case": case, "loss": mean.item() / 2, "step_s": statistics.median(times[half:])}
            print(json.dumps({**figures, "sent": sent[-1], "params": num_params}), flush=True)
    dist.destroy_process_group()


def start(options: argparse.Namespace, cases: list[str], init: str, prefixes: list[list[str]]) -> list[dict[str, Any]]:
    """Run both ranks, each behind its command prefix, and return rank 0's figures."""
    ranks = []
    for rank, prefix in enumerate(prefixes):
        command = [*prefix, sys.executable, os.path.abspath(__file__), "--worker", "--rank", str(rank), "--init", init]
        for key in ("steps", "warmup", "layers", "dim", "context"):
            command += [f"--{key}", str(getattr(options, key))]
        command += ["--cases", *cases]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if prefix:
            environment["GLOO_SOCKET_IFNAME"] = f"dtbench{rank}"
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    try:
        assert ranks[0].stdout is not None
        found = []
        for line in ranks[0].stdout:
            found.append(json.loads(line))
            print(f"  {found[-1]['case']} done", file=sys.stderr, flush=True)
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a rank failed")
        return found
    finally:
        for rank_process in ranks:
            rank_process.kill()
            rank_process.wait()


def show(rows: list[dict[str, Any]]) -> None:
    """Print one table; ratios are to the exact run of the same stage."""
    print(f"{'case':30}{'loss':>9}{'to exact':>10}{'sent/step':>12}{'fewer':>8}{'step ms':>10}{'faster':>8}")
    exact: dict[str, Any] = {}
    for row in rows:
        if row["case"].startswith("exact"):
            exact = row
        print(
            f"{row['case']:30}{row['loss']:9.4f}{row['loss'] / exact['loss'] - 1:+10.2%}{row['sent'] / 1e6:9.3f} MB"
            f"{exact['sent'] / row['sent']:7.1f}x{row['step_s'] * 1e3:10.1f}{exact['step_s'] / row['step_s']:7.2f}x"
        )


def link(options: argparse.Namespace) -> None:
    """Compare step times over a limited link between two namespaces, which are taken down again."""
    names = ["dtbench0", "dtbench1"]

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True)

    try:
        for name in names:
            run(f"ip netns add {name}")
        run(f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}")
        for index, name in enumerate(names):
            run(f"ip -n {name} addr add 10.213.7.{index + 1}/24 dev {name}")
            run(f"ip -n {name} link set {name} up")
            run(f"ip -n {name} link set lo up")
            run(f"tc -n {name} qdisc add dev {name} root tbf rate {options.mbit}mbit burst 64kb latency 400ms")
        prefixes = [["ip", "netns", "exec", name] for name in names]
        rows = start(options, list(options.cases or CASES), "tcp://10.213.7.1:29411", prefixes)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
    print(f"byte GPT, {rows[0]['params'] / 1e6:.2f}M parameters, 2 ranks, a link of {options.mbit} Mbit/s")
    show(rows)


def main() -> None:
    """Print the asked tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["convergence", "link"], default="convergence")
    parser.add_argument("--steps", type=int, default=None, help="500 for convergence, 16 for link")
    parser.add_argument("--warmup", type=int, default=None, help="exact steps of onebit: a fifth of the steps")
    parser.add_argument("--mbit", type=int, default=100)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=None, help="128 for convergence, 256 for link")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=None)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--init", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    options.steps = options.steps or (500 if options.what == "convergence" else 16)
    options.warmup = options.warmup or max(options.steps // 5, 1)
    options.dim = options.dim or (128 if options.what == "convergence" else 256)
    if options.what == "link":
        if os.geteuid():
            raise SystemExit("--what link makes network namespaces: run it as root")
        link(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = start(options, list(options.cases or CONVERGENCE), f"file://{folder}/store", [[], []])
    print(f"byte GPT, {rows[0]['params'] / 1e6:.2f}M parameters, 2 ranks, {options.steps} steps")
    show(rows)


if __name__ == "__main__":
    main()
