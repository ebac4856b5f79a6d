"""Peak memory of a training step of a causal model by sequence length, with and without tiles, on one CPU rank.

    python benchmarks/tiles.py [--lengths 1024,2048,4096,8192] [--tile 512]

Each case runs in a process of its own, and its peak is that of the resident set beyond what it had before the step.
The model is a Llama of two layers with recomputation of blocks, wide feed-forwards and a vocabulary of 32,000.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "recomputation": {},
    "loss in tiles": {"loss_tile": True},
    "loss and mlp in tiles": {"loss_tile": True, "mlp_tile": True},
}


def measure(length: int, tile: int, tiled: dict[str, Any]) -> dict[str, float]:
    """Return the loss, the peak in MiB beyond the model and its states, and the seconds of a step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import distui

    torch.set_num_threads(1)
    sections: Any = {"mode": "full"} | {key: tile for key in tiled}
    engine = distui.Engine(activation_checkpointing=sections)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "vocab_size": 32_000, "max_position_embeddings": 1 << 17}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    short, ids = (torch.randint(0, 32_000, (1, num)) for num in (64, length))
    for batch in (short, ids):
        if batch is ids:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            begin = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"loss": float(loss), "peak_mib": peak / 1024, "step_s": time.perf_counter() - begin}


def main() -> None:
    """Print one line a length and case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(int(given.lengths), given.tile, CASES[given.case])))
        return
    print(f"{'tokens':>8}  {'case':24}{'peak MiB':>10}{'step s':>9}{'loss':>10}")
    for length in map(int, given.lengths.split(",")):
        for case in CASES:
            arguments = ["--lengths", str(length), "--tile", str(given.tile), "--case", case]
            ended = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
            found = json.loads(ended.stdout.splitlines()[-1])
            print(
                f"{length:8}  {case:24}{found['peak_mib']:10.0f}{found['step_s']:9.1f}{found['loss']:10.4f}", flush=True
            )


if __name__ == "__main__":
    main()
