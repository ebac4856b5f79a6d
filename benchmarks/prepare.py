"""What `engine.prepare` needs of memory beyond the script's own model: tracked tensor bytes, and the resident set.

    python benchmarks/prepare.py --ranks 2 --stage 3

Every rank counts the storages that tensors allocate while the model is prepared (a dispatch mode sees each result), and
those that the script's model frees. `after` is what stays: at stage 3 the shards of parameters and of gradients. `peak`
is the most that was alive at once; `goal` is what stays or what the script held before, and two units. On the CPU the
script's model is in host memory as well, and goes a unit at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from typing import Any

KINDS = ("cpu", "meta", "files")


def resident_bytes() -> int:
    """Return the resident set of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_rank(kind: str, stage: int, dim: int, num_layers: int, folder: str) -> dict[str, Any]:
    """Prepare one model, and return what it took in bytes."""
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    import distui
    from distui.core.sharding.units import partition

    partition.SMALL_UNIT_NUMEL = 1  # a layer a unit

    class Tracked(TorchDispatchMode):
        """Counts the memory of what operations return, for as long as it lives."""

        def __init__(self) -> None:
            super().__init__()
            self.alive: dict[int, int] = {}
            self.now = self.peak = 0

        def see(self, tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            if tensor.is_meta or storage._cdata in self.alive:
                return
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

        def _gone(self, key: int) -> None:
            self.now -= self.alive.pop(key)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.see(leaf)
            return result

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(dim, dim, bias=False) for _ in range(num_layers)))

    engine = distui.Engine(strategy={"zero_stage": stage}, telemetry={"enabled": False})
    engine.prepare(nn.Linear(2, 2))  # groups and the like
    tracked = Tracked()
    base = resident_bytes()
    if kind == "cpu":
        model = build()
    else:
        with distui.init_empty_weights():
            model = build()
    held = resident_bytes()
    for param in model.parameters():
        tracked.see(param)
    script = tracked.now
    with tracked:
        engine.prepare(model, weights=folder if kind == "files" else None)
    unit = 4 * dim * dim
    return {
        "kind": kind,
        "model": unit * num_layers,
        "script": script,
        "peak": tracked.peak,
        "goal": max(tracked.now, script) + 2 * unit,
        "after": tracked.now,
        "resident_before": held - base,
        "resident_after": resident_bytes() - base,
    }


def main() -> None:
    """Print, for each way a model may come, rank 0's figures in MB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        found = run_rank(args.kind, args.stage, args.dim, args.layers, args.folder)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        if "files" in args.kinds:
            import torch
            from safetensors.torch import save_file

            layers = {f"{index}.weight": torch.randn(args.dim, args.dim) for index in range(args.layers)}
            save_file(layers, f"{folder}/model.safetensors")
            del layers
        for kind in args.kinds:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
            command += [__file__, "--kind", kind, "--folder", folder, "--stage", str(args.stage)]
            command += ["--dim", str(args.dim), "--layers", str(args.layers)]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            found = json.loads(next(line for line in lines if line.startswith("{")))
            print("  ".join(f"{k} {v / 1e6:.0f}" if isinstance(v, int) else f"{v:5}" for k, v in found.items()))


if __name__ == "__main__":
    main()
