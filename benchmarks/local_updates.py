"""Outer optimizers for local updates, on the text task: loss and bytes at equal inner steps.

    python benchmarks/local_updates.py --output benchmarks/results

Four workers make H AdamW steps each between exchanges. Every outer optimizer is tried at each of
its settings with the same seed, data and number of inner steps.
"""

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from demo import text
from demo.provenance import provenance
from demo.training import _loss, evaluate

import gmc_cuda


def settings(quick: bool) -> list[dict]:
    """name, options of GMC, and whether the exchange overlaps with the next round."""
    tried = [
        {"name": "dense Nesterov", "lr": lr, "momentum": 0.9, "density": 1.0, "nesterov": True}
        for lr in (0.4, 0.7)
    ]
    tried += [{"name": "dense average", "lr": 1.0, "momentum": 0.0, "density": 1.0}]
    tried += [
        {"name": "GMC 2 %", "lr": lr, "momentum": momentum, "density": 0.02, "memory_decay": decay}
        for lr, momentum, decay in [
            (0.7, 0.0, 1.0), (1.0, 0.0, 1.0), (0.7, 0.5, 1.0), (1.0, 0.5, 1.0), (0.7, 0.9, 1.0),
            (1.0, 0.3, 0.95), (1.0, 0.5, 0.95),
        ]
    ]  # fmt: skip
    tried += [
        {"name": "SparseLoCo 2 %", "lr": lr, "momentum": 0.0, "density": 0.02, "memory_decay": 0.95}
        for lr in (0.7, 1.0)
    ]
    return tried[:2] if quick else tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--every", type=int, default=20, help="H, inner steps in a round")
    parser.add_argument("--batch", type=int, default=8, help="windows of each worker and step")
    parser.add_argument("--inner-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two settings only")
    parser.add_argument("--only", type=json.loads, help="one setting, as JSON")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (options, f"{folder}/store"), nprocs=options.workers)


def work(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=options.workers
    )
    task = text.load(rank, options.workers, non_iid=False)
    results = []
    for setting in [options.only] if options.only else settings(options.quick):
        results.append(run(task, rank, options, dict(setting)))
        if rank == 0:
            print(json.dumps(results[-1]), flush=True)
    if rank == 0 and options.output:
        report = {"workers": options.workers, "rounds": options.rounds, "every": options.every}
        report |= {"batch": options.batch, "inner_lr": options.inner_lr, "seed": options.seed}
        report |= {"data": task.data, "results": results} | provenance(torch.device("cpu"))
        path = options.output / f"local-updates-{time.strftime('%Y-%m-%d')}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


def run(task, rank: int, options: argparse.Namespace, setting: dict) -> dict:
    record = dict(setting)
    setting.pop("name")
    overlap = setting.pop("overlap", False)
    torch.manual_seed(options.seed)
    model = task.make_model()
    generator = torch.Generator().manual_seed(options.seed * options.workers + rank)
    inner = torch.optim.AdamW(model.parameters(), lr=options.inner_lr)
    optimizer = gmc_cuda.LocalUpdates(
        inner, functools.partial(gmc_cuda.GMC, **setting), options.every, overlap=overlap
    )
    steps = options.rounds * options.every
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=options.every)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    for _ in range(steps):
        inputs, targets = task.batch(options.batch, generator)
        optimizer.zero_grad()
        _loss(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        cosine.step()
    optimizer.synchronize()
    loss, accuracy = evaluate(model, task, options.workers)
    stats = optimizer.stats()
    return record | {
        "loss": loss,
        "accuracy": accuracy,
        "bytes_per_round": stats["bytes_per_step"],
        "bytes_sent": stats["bytes_per_step"] * stats["steps"],
        "dense_bytes_per_round": stats["dense_bytes_per_step"],
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
