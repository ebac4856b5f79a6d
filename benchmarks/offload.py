"""What offloading costs and what it gives: step time and memory, the disk's rate under the step, the largest model.

    python benchmarks/offload.py compare --python /path/to/python-with-deepspeed
    python benchmarks/offload.py disk
    python benchmarks/offload.py largest --limit-mib 1024

`compare` runs every variant as a process of its own; their steps take turns, so drift hits all alike. `disk` counts the
bytes that a step moves, and the seconds that a plain O_DIRECT reader and writer of as many threads and the same chunks
take for them in a file beside it. `largest` trains bf16 GPTs of growing depth in a memory cgroup without swap (v1 or
v2; needs the right to make one) until the kernel ends the process. The folder for NVMe is --folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

VARIANTS = {
    "none": ("none", "none"),
    "cpu": ("cpu", "none"),
    "cpu+params": ("cpu", "cpu"),
    "nvme": ("nvme", "none"),
    "nvme+params": ("nvme", "nvme"),
}


def build(shape: dict[str, int], dtype: str) -> Any:
    """Return a byte-level GPT whose weights are made in `dtype`."""
    import torch

    from distui.demo.model import ByteGPT

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if dtype == "bf16" else torch.float32)
    model = ByteGPT(shape["layers"], shape["dim"], context=shape["seq"])
    torch.set_default_dtype(torch.float32)
    return model


def prepare(options: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """Return a function that runs a step, and the engine."""
    import torch

    data = torch.randint(0, 256, (1, options.seq + 1))
    low = torch.bfloat16 if options.dtype == "bf16" else None

    def loss_of(run: Any) -> Any:
        return run(data[:, :-1], data[:, 1:]).loss

    if options.variant.startswith("deepspeed"):
        import deepspeed

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        home = options.variant.partition("-")[2] or "none"
        zero: dict[str, Any] = {"stage": 3}
        if home != "none":
            place = {"device": home, "nvme_path": options.folder} if home == "nvme" else {"device": home}
            zero |= {"offload_optimizer": place, "offload_param": place}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": low is not None},
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

        def deep() -> Any:
            loss = loss_of(engine)
            engine.backward(loss)
            engine.step()
            return loss

        return deep, None
    import distui

    optimizer_home, params_home = VARIANTS[options.variant]
    own = distui.Engine(
        strategy={"zero_stage": 3},
        precision={"dtype": options.dtype},
        offload={"optimizer": optimizer_home, "params": params_home, "nvme_path": options.folder},
    )
    model, adam = own.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))

    def ours() -> Any:
        loss = loss_of(model)
        own.backward(loss)
        adam.step()
        adam.zero_grad()
        return loss

    return ours, own


def worker(options: argparse.Namespace) -> None:
    """Run one step for each line read, and print a line of figures."""
    import torch

    torch.set_num_threads(1)
    shape = {"layers": options.layers, "dim": options.dim, "seq": options.seq}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(shape, options.dtype)
    num_params = sum(param.numel() for param in model.parameters())
    step, own = prepare(options, model)
    file = None
    if own is not None:
        (sharded,) = own.backend._models.values()
        file = sharded.homes.nvme.file if sharded.homes is not None and sharded.homes.nvme is not None else None
    print(json.dumps({"params": num_params}), flush=True)
    for _ in sys.stdin:
        moved = (file.bytes_read, file.bytes_written, file.waited_s) if file is not None else (0, 0, 0.0)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = float(step())
        row = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}
        row["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        row["rss_mib"] = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        if file is not None:
            row |= {"read": file.bytes_read - moved[0], "written": file.bytes_written - moved[1]}
            row["waited"] = file.waited_s - moved[2]
        print("\n" + json.dumps(row), flush=True)


def start(options: argparse.Namespace, variant: str, cgroup: Path | None = None, **changed: Any) -> Any:
    """Start a worker, inside `cgroup` before it allocates anything."""
    python = options.python if variant.startswith("deepspeed") else sys.executable
    given = {"dtype": options.dtype, "layers": options.layers, "dim": options.dim, "seq": options.seq} | changed
    words = [f"--{key}={value}" for key, value in given.items()]
    command = [python, __file__, "worker", f"--variant={variant}", f"--folder={options.folder}", *words]

    def enter() -> None:
        assert cgroup is not None
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if not options.verbose else None,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=enter if cgroup is not None else None,
    )


def answer(process: Any) -> dict[str, Any] | None:
    """Return the worker's next line of figures; None when it has ended."""
    for line in process.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def one_step(process: Any) -> dict[str, Any] | None:
    """Have a worker run a step."""
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    return answer(process)


def compare(options: argparse.Namespace) -> None:
    """Print step time and memory of every variant."""
    variants = list(VARIANTS)
    if options.python:
        variants += ["deepspeed", "deepspeed-cpu", "deepspeed-nvme"]
    elif importlib.util.find_spec("deepspeed") is None:
        print("deepspeed: not installed here, and no --python names one that has it")
    workers = {}
    for variant in variants:
        process = start(options, variant)
        first = answer(process)
        if first is None:
            lines = (process.stderr.read() if process.stderr else "").strip().splitlines()
            print(f"{variant}: does not run here: {lines[-1] if lines else process.wait()}")
            continue
        workers[variant] = process
        num_params = first["params"]
    rows: dict[str, list[dict[str, Any]]] = {variant: [] for variant in workers}
    for _ in range(options.rounds + 2):
        for variant, process in list(workers.items()):
            row = one_step(process)
            if row is None:
                print(f"{variant}: ended: {process.stderr.read()[-300:] if process.stderr else ''}")
                del workers[variant]
            else:
                rows[variant].append(row)
    print(f"{num_params / 1e6:.1f}M parameters, {options.dtype}, one rank, stage 3; medians of {options.rounds} steps")
    print(f"{'variant':16}{'wall ms':>9}{'cpu ms':>9}{'/none':>7}{'peak MiB':>10}{'now MiB':>9}{'loss':>9}")
    base = statistics.median(row["cpu"] for row in rows["none"][2:])
    for variant, process in workers.items():
        timed = rows[variant][2:]
        wall, cpu = (statistics.median(row[key] for row in timed) for key in ("wall", "cpu"))
        last = timed[-1]
        print(
            f"{variant:16}{wall * 1e3:9.0f}{cpu * 1e3:9.0f}{cpu / base:7.2f}"
            f"{last['peak_mib']:10.0f}{last['rss_mib']:9.0f}{last['loss']:9.4f}"
        )
        process.communicate()


def plain_rate(folder: str, nbytes: int, write: bool) -> float:
    """Return bytes/s of a plain O_DIRECT reader or writer with the engine's threads and chunks."""
    from distui.core.ranks.host_memory import page_buffer
    from distui.core.sharding.homes.nvme import CHUNK_BYTES, NUM_THREADS

    nbytes = nbytes // CHUNK_BYTES * CHUNK_BYTES
    handle = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT, 0o600)
    os.posix_fallocate(handle, 0, nbytes)
    view = page_buffer(nbytes).numpy().data  # as the step does: other memory for each chunk, not one in the cache

    def move(first: int, writes: bool) -> None:
        for offset in range(first * CHUNK_BYTES, nbytes, NUM_THREADS * CHUNK_BYTES):
            chunk = view[offset : offset + CHUNK_BYTES]
            os.pwritev(handle, [chunk], offset) if writes else os.preadv(handle, [chunk], offset)
            chunk.release()

    def run(writes: bool) -> float:
        started = time.perf_counter()
        threads = [threading.Thread(target=move, args=(index, writes)) for index in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return nbytes / (time.perf_counter() - started)

    run(True)
    if not write:
        run(False)
    rate = run(write)
    os.close(handle)
    return rate


def disk(options: argparse.Namespace) -> None:
    """Print the disk's rate under the optimizer's step beside that of a plain reader and writer."""
    import torch

    torch.set_num_threads(1)
    options.variant = "nvme+params"
    step, own = prepare(options, build({"layers": options.layers, "dim": options.dim, "seq": options.seq}, "fp32"))
    (sharded,) = own.backend._models.values()
    file, stream = sharded.homes.nvme.file, sharded.optimizers[0].stream
    for _ in range(2):
        step()
    for unit in sharded.units:
        unit.shard_holds_gradient = True  # the last gradients are still in the file: step them again and again
    ratios: dict[str, list[float]] = {"with the update": [], "input and output alone": []}
    inner_step = sharded.optimizers[0].inner.step
    for _ in range(options.rounds):
        for name, found in ratios.items():
            # The same step without the arithmetic shows what the streaming itself reaches.
            sharded.optimizers[0].inner.step = inner_step if name == "with the update" else lambda: None
            before = (file.bytes_read, file.bytes_written)
            started = time.perf_counter()
            stream.step(1.0)
            seconds = time.perf_counter() - started
            read, written = file.bytes_read - before[0], file.bytes_written - before[1]
            least = read / plain_rate(options.folder, read, False) + written / plain_rate(options.folder, written, True)
            found.append(least / seconds)
            print(
                f"{name}: {read / 2**20:.0f} MiB read, {written / 2**20:.0f} MiB written in {seconds:.3f} s, "
                f"{(read + written) / seconds / 1e9:.2f} GB/s; a plain reader, then writer: {least:.3f} s"
            )
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.0%} of the plain rate (median of {options.rounds}; goal 90%)")


class MemoryLimit:
    """A cgroup with a memory limit and no swap; whatever exceeds it is killed by the kernel."""

    def __init__(self, limit_bytes: int) -> None:
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        name = f"distui-bench-{os.getpid()}"
        if (v1 / "memory.limit_in_bytes").exists():
            self.path = v1 / name
            self.path.mkdir()
            (self.path / "memory.limit_in_bytes").write_text(str(limit_bytes))
            (self.path / "memory.swappiness").write_text("0")
        else:
            self.path = v2 / name
            self.path.mkdir()
            (self.path / "memory.max").write_text(str(limit_bytes))
            (self.path / "memory.swap.max").write_text("0")

    def close(self) -> None:
        """Remove it; its processes have ended."""
        self.path.rmdir()


def largest(options: argparse.Namespace) -> None:
    """Print the largest model that trains in the memory limit, with and without offload."""
    limit = MemoryLimit(options.limit_mib << 20)
    found: dict[str, tuple[float, int]] = {}
    print(
        f"limit {options.limit_mib} MiB (cgroup {limit.path.parent}), bf16, width {options.dim}, {options.seq} tokens"
    )
    try:
        for variant, first in (("none", options.layers), ("nvme+params", None)):
            layers = first if first is not None else found["none"][1] * 4
            while True:
                process = start(options, variant, limit.path, dtype="bf16", layers=layers)
                head = answer(process)
                rows = [one_step(process) if head is not None else None for _ in range(2)]
                process.communicate()
                ok = head is not None and rows[-1] is not None
                size = f"{head['params'] / 1e6:.0f}M" if head is not None else f"{layers} layers"
                how = f"trains, {rows[-1]['wall']:.1f} s a step" if rows[-1] is not None else "does not fit"
                print(f"  {variant}: {size}: {how} (exit status {process.returncode})", flush=True)
                if not ok:
                    break
                assert head is not None
                found[variant] = (head["params"], layers)
                layers = max(layers + 1, int(layers * options.growth))
    finally:
        limit.close()
    if len(found) == 2:
        ratio = found["nvme+params"][0] / found["none"][0]
        print(
            f"largest: {found['none'][0] / 1e6:.0f}M without, {found['nvme+params'][0] / 1e6:.0f}M with, {ratio:.1f}x"
        )


def main() -> None:
    """Run what the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "disk", "largest", "worker"])
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk for the nvme home")
    parser.add_argument("--python", default="", help="a Python that has DeepSpeed")
    parser.add_argument("--limit-mib", type=int, default=1024)
    parser.add_argument("--growth", type=float, default=1.25)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="show what the workers print to stderr")
    options = parser.parse_args()
    if options.what == "disk":
        options.dtype = "fp32"
    {"compare": compare, "disk": disk, "largest": largest, "worker": worker}[options.what](options)


if __name__ == "__main__":
    main()
