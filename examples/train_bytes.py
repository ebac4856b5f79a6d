"""Trains a byte-level GPT on the text of the installed Python standard library.

train_bytes_torch.py is plain PyTorch in one process; train_bytes.py is the same on any number of ranks, as in
`distui launch --nproc 2 --zero 2 examples/train_bytes.py`. `diff -w` shows the five lines that differ.
"""

from __future__ import annotations

import argparse
import functools
import math

import torch

import distui.demo


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128, help="width of the model")
    parser.add_argument("--context", type=int, default=128, help="bytes of a sample")
    parser.add_argument("--batch", type=int, default=16, help="samples of an optimizer step, over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss-file", help="where to write the loss of each step, as a JSON list")
    return parser.parse_args()


def warmup_cosine(step: int, num_steps: int) -> float:
    """Return the learning rate of a step as a part of the highest: up over a tenth, then down to a tenth."""
    warmup = max(1, num_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup)))


def main() -> None:
    options = parse_options()
    engine = distui.Engine(total_steps=options.steps, batch={"global_size": options.batch})
    torch.manual_seed(options.seed)
    dataset = distui.demo.StdlibText(options.context)
    model = distui.demo.ByteGPT(options.layers, options.dim, context=options.context)
    order = torch.Generator().manual_seed(options.seed)
    loader = torch.utils.data.DataLoader(dataset, options.batch, shuffle=True, drop_last=True, generator=order)
    matrices = [param for param in model.parameters() if param.ndim >= 2]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(warmup_cosine, num_steps=options.steps))
    model, optimizer, loader, scheduler = engine.prepare(model, optimizer, loader, scheduler)
    log = distui.demo.LossLog(options.loss_file)
    while scheduler.last_epoch < options.steps:
        for batch in loader:
            with engine.accumulate(model):
                loss = model(**batch).loss
                engine.backward(loss)
                engine.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            log.add(scheduler.last_epoch, loss)
            if scheduler.last_epoch >= options.steps:
                break
    log.close()


if __name__ == "__main__":
    main()
