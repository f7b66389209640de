#!/usr/bin/env python3
"""Outer optimizers for local updates, on the demo's text: loss and bytes at equal inner steps.

    python -m benchmarks.training.local_updates
    python -m benchmarks.training.local_updates --settings '[{"name": "mine", "lr": 0.7}]'

Four workers make H AdamW steps each between exchanges. Every setting has the same seed, data and
number of inner steps. The file is written anew after every setting and says which
are still missing, so that a run may be stopped; started again on the same day it goes on, also with
other settings.
"""

import argparse
import functools
import json
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

import gmc_cuda
from benchmarks import report
from benchmarks.training.logical_methods import DTYPES
from examples.demo import text
from examples.demo.arguments import positive_float, positive_int
from examples.demo.provenance import provenance
from examples.demo.task import Task
from examples.demo.training import evaluate, loss_of

DENSE = [
    {"name": "dense Nesterov", "lr": lr, "momentum": momentum, "density": 1.0, "nesterov": True}
    for lr, momentum in ((0.7, 0.9), (0.7, 0.5))
] + [{"name": "dense average", "lr": lr, "momentum": 0.0, "density": 1.0} for lr in (1.0, 1.4)]
# With four workers both have about 50 times fewer bytes on a link. What decides comes first.
FLOAT4 = {"wire_dtype": "float4"}
TWO_SIDED = {"name": "5 %, two-sided", "density": 0.05, "exchange": "reduce_scatter"} | FLOAT4
ALL_GATHER = {"name": "2 %, all-gather", "density": 0.02} | FLOAT4
RULES = [
    {"name": "SparseLoCo", "lr": 2.0, "momentum": 0.0, "memory_decay": 0.95},
    {"name": "GMC", "lr": 2.0, "momentum": 0.3},
    {"name": "DGC", "outer": "DGC", "lr": 1.0, "momentum": 0.5},
    {"name": "SparseLoCo", "lr": 1.0, "momentum": 0.0, "memory_decay": 0.95},
    {"name": "GMC", "lr": 1.0, "momentum": 0.5},
]
SPARSE = [
    rule | way | {"name": f"{rule['name']} {way['name']}"}
    for rule in RULES
    for way in (TWO_SIDED, ALL_GATHER)
]

OUTER = {"GMC": gmc_cuda.GMC, "DGC": gmc_cuda.DGC}
MEASURED = (
    "loss", "accuracy", "rounds", "bytes_per_round", "bytes_sent", "dense_bytes_per_round",
    "link_ratio", "seconds",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=positive_int, default=4)
    parser.add_argument("--rounds", type=positive_int, default=15)
    parser.add_argument("--every", type=positive_int, default=20, help="H, inner steps in a round")
    parser.add_argument("--batch", type=positive_int, default=8, help="windows a worker and step")
    parser.add_argument("--inner-lr", type=positive_float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--settings", type=json.loads, default=DENSE + SPARSE,
        help="what to try instead: a JSON list of GMC's options (DGC's with \"outer\": \"DGC\"), "
        "name, overlap, and step_ahead (0 if it is left out)",
    )  # fmt: skip
    report.add_output(parser)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)  # fail now, not at the end
    with tempfile.TemporaryDirectory(prefix="gmc-local-updates-") as folder:
        start_processes(
            work, (options, f"{folder}/store"), options.workers, start_method="forkserver"
        )
    return 0


def work(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=options.workers
    )
    task = text.load(rank, options.workers, non_iid=False)
    facts = provenance(torch.device("cpu"))
    asked = {n: v for n, v in vars(options).items() if n not in ("output", "settings")}
    content = {"benchmark": "local_updates", **facts, "options": asked, "data": task.data}
    name = f"local-updates-{options.rounds}-rounds-of-{options.every}"
    name += f"-seed-{options.seed}" if options.seed else ""
    stem = report.file_stem(name, facts)
    path = options.output / f"{stem}.json"
    results = report.earlier(path, content, "data").get("results", [])
    dist.barrier()  # all have read what rank 0 is about to replace
    done = [{key: r[key] for key in r if key not in MEASURED} for r in results]
    missing = [setting for setting in options.settings if setting not in done]
    while missing:
        results.append(run(task, rank, options, missing.pop(0)))
        if rank == 0:
            print(json.dumps(results[-1]), flush=True)
            report.write_json(path, content | {"not_tried": missing, "results": results})
    dist.destroy_process_group()


def run(task: Task, rank: int, options: argparse.Namespace, setting: dict) -> dict:
    own = ("name", "overlap", "outer", "step_ahead")
    outer = {n: v for n, v in setting.items() if n not in own}
    if "wire_dtype" in outer:
        outer["wire_dtype"] = DTYPES[outer["wire_dtype"]]
    torch.manual_seed(options.seed)
    model = task.make_model()
    generator = torch.Generator().manual_seed(options.seed * options.workers + rank)
    optimizer = gmc_cuda.LocalUpdates(
        torch.optim.AdamW(model.parameters(), lr=options.inner_lr),
        functools.partial(OUTER[setting.get("outer", "GMC")], **outer),
        options.every,
        overlap=setting.get("overlap", False),
        step_ahead=setting.get("step_ahead", 0.0),
    )
    steps = options.rounds * options.every
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=options.every)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    for _ in range(steps):
        inputs, targets = task.batch(options.batch, generator)
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        cosine.step()
    optimizer.synchronize()
    seconds = time.perf_counter() - started
    loss, accuracy = evaluate(model, task, options.workers)
    stats = optimizer.stats()
    sent, rounds = stats["bytes_per_step"], stats["steps"]
    figures = (round(loss, 4), round(accuracy, 4), rounds, sent, sent * rounds,
               stats["dense_bytes_per_step"], round(stats["bytes_ratio"], 1),
               round(seconds, 1))  # fmt: skip
    return setting | dict(zip(MEASURED, figures, strict=True))


if __name__ == "__main__":
    sys.exit(main())
