#!/usr/bin/env python3
"""Held-out loss of dense momentum SGD and of sparse methods at equal bytes, each at its best.

    python -m benchmarks.training.convergence        all tasks: about two core-hours
    python -m benchmarks.training.convergence --task digits --methods dense gmc:float4

All workers of a run live in one process. Each clips its gradient; the learning rate rises linearly,
then falls as a cosine. Momentum and learning rate are looked for with some seeds: from a start, all
neighbours of the two best points so far are tried until neither changes, so that what wins is never
the edge of what was tried. Then the best are trained with other seeds, and the best mean is
the method's: one seed of the search may favour a point by more than the points differ. A run that
was cut short goes on with --reuse FILE, and so does one with more methods.
"""

import argparse
import json
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch

from benchmarks.report import add_output, file_stem, load, write_json
from benchmarks.training import convergence_report, ladder, logical_workers
from benchmarks.training.logical_methods import DTYPES, NAMES, RULES, WHOLE, rule_of
from examples.demo import arguments, text
from examples.demo.provenance import provenance

TASKS = logical_workers.TASKS
BYTES_RATIO = 100.0
SIZES = {
    "text": {"steps": 600, "global_batch": 16, "search_seeds": 1, "seeds": 3},
    "digits": {"steps": 100, "global_batch": 64, "search_seeds": 3, "seeds": 6},
}
METHODS = [
    "dense", "gmc:float4:reduce_scatter", "growing:float4:reduce_scatter",
    "dgc:float4:reduce_scatter", "gmc:float4", "dgc:float4", "memsgd:float4:reduce_scatter",
    "plain:float4:reduce_scatter",
]  # fmt: skip


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    everything = [("text", False), ("digits", False), ("digits", True)]
    for task, non_iid in [(options.task, options.non_iid)] if options.task else everything:
        filled = argparse.Namespace(**vars(options))
        filled.task, filled.non_iid = task, non_iid
        for name, value in SIZES[task].items():
            if getattr(filled, name) is None:
                setattr(filled, name, value)
        compare(filled)


def compare(options: argparse.Namespace) -> None:
    task = logical_workers.load(options)[0]
    hidden = {"output", "processes", "reuse"}
    content = {
        "benchmark": "convergence",
        **provenance(torch.device("cpu")),
        "load": {"before": load()},
        "options": {name: value for name, value in vars(options).items() if name not in hidden},
        "task": {"title": task.title, "data": task.data},
        "units": {
            "bytes": "payload of one worker and step",
            "loss": "cross-entropy in nats on held-out data",
            "accuracy": "0 to 1, on held-out data",
        },
        "seeds": {
            "search": list(range(options.search_seeds)),
            "compared": list(range(options.search_seeds, options.search_seeds + options.seeds)),
        },
        "complete": False,
        "best": {},
        "results": [],
    }
    name = options.task + ("-non-iid" if options.non_iid else "")
    name += f"-{options.workers}-workers"
    if options.width is not None:
        name += f"-{options.width}-wide"
    if options.steps != SIZES[options.task]["steps"]:
        name += f"-{options.steps}-steps"
    if options.density is None and options.bytes_ratio != BYTES_RATIO:
        name += f"-{options.bytes_ratio:g}-times"
    path = options.output / f"{file_stem(f'convergence-{name}', content)}.json"
    known = {key(run): run for run in reusable(options, content)}
    lock = threading.Lock()
    search_seeds, compared_seeds = content["seeds"].values()

    def train(method: str, momentum: float, lr: float, seed: int) -> float:
        run = known.get((method, momentum, lr, seed))
        if run is None:
            run = pool.submit(logical_workers.train, method, momentum, lr, seed, options).result()
        with lock:
            content["results"].append(run)
            content["load"]["after"] = load()
            write_json(path, content)  # after each run: one cut short keeps what it has
            print(convergence_report.line(run), flush=True)
        return float("inf") if run["loss"] is None else run["loss"]

    def find(method: str) -> None:
        finalists: list[tuple[float, float]]
        finalists = [options.points[method]] if options.points else searched(method)
        means = {point: mean(train(method, *point, seed) for seed in compared_seeds)
                 for point in finalists}  # fmt: skip
        momentum, lr = min(means, key=means.__getitem__)
        content["best"][method] = {"momentum": momentum, "lr": lr}

    def searched(method: str) -> list[tuple[float, float]]:
        rule = rule_of(method)
        momentum, scaled = rule.starts[options.task]
        momenta = rule.momenta or options.momentum or ladder.MOMENTA
        start = min(momenta, key=lambda m: abs(m - momentum))
        if options.lr:
            scaled = options.lr / (1 - start)

        def loss(momentum: float, lr: float) -> float:
            return mean(train(method, momentum, lr, seed) for seed in search_seeds)

        return ladder.search(loss, start, scaled, momenta, options.fixed, options.finalists)

    # A thread for each method, which waits for its runs; the runs have processes of one thread.
    with (
        ProcessPoolExecutor(options.processes, get_context("forkserver"),
                            logical_workers.prepare, (options,)) as pool,
        ThreadPoolExecutor(len(options.methods)) as threads,
    ):  # fmt: skip
        list(threads.map(find, options.methods))
    content["best"] = {method: content["best"][method] for method in options.methods}
    content["complete"] = True
    write_json(path, content)
    convergence_report.show(content)
    print(f"numbers: {path}")
    convergence_report.draw(path.with_suffix(".png"), content)


def key(run: dict) -> tuple:
    return run["method"], run["momentum"], run["lr"], run["seed"]


def reusable(options: argparse.Namespace, content: dict) -> list[dict]:
    """The runs of --reuse FILE, with the processor that made them; refused where they were made in
    another way."""
    if options.reuse is None:
        return []
    found = json.loads(options.reuse.read_text())
    free = {"methods", "momentum", "lr", "fixed", "points", "finalists", "seeds", "search_seeds"}
    for part in ("options", "task"):
        for name, value in content[part].items():
            other = found[part].get(name)
            if name not in free and other != value:
                raise SystemExit(
                    f"--reuse {options.reuse}: {name} is {other!r} there, {value!r} here"
                )
    return [{"processor": found["hardware"]["processor"], **run} for run in found["results"]]


def given_point(text: str) -> tuple[str, tuple[float, float]]:
    name, _, numbers = text.partition("=")
    momentum, _, lr = numbers.partition(":")
    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"{name} is not a method")
    return name, (arguments.below_one(momentum), arguments.positive_float(lr))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="methods: " + "; ".join(f"{name}: {rule.said}" for name, rule in RULES.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", choices=list(TASKS), help="(default: text, digits, and digits --non-iid)")
    add("--non-iid", action="store_true", help="few classes, or its own files, on each worker")
    add("--methods", nargs="+", choices=NAMES, default=METHODS, metavar="METHOD",
        help=f"{', '.join(WHOLE)}, or {', '.join(r for r in RULES if r not in WHOLE)} with "
        f":{', :'.join(DTYPES)}, then :reduce_scatter for two-sided compression, and last "
        ":warmup for a density that falls to its value in the first tenth of the steps "
        f"(default: {' '.join(METHODS)})")  # fmt: skip
    add("--bytes-ratio", type=arguments.positive_float, default=BYTES_RATIO,
        help="times fewer bytes on a link than with a ring all-reduce (default "
        f"{BYTES_RATIO:g})")  # fmt: skip
    add("--density", type=arguments.density, help="instead of --bytes-ratio")
    add("--momentum", nargs="+", type=arguments.below_one,
        help=f"that may be tried (default: {' '.join(map(str, ladder.MOMENTA))})")  # fmt: skip
    add("--lr", type=arguments.positive_float, help="where to start, for every method")
    add("--fixed", action="store_true", help="no search: train at the start")
    add("--points", nargs="+", type=given_point, metavar="METHOD=MOMENTUM:LR",
        help="no search, and no --methods: train these, with seeds from 0 on")  # fmt: skip
    add("--width", type=arguments.positive_int,
        help=f"of text's model, a multiple of {text.HEADS} (default {text.WIDTH})")  # fmt: skip
    add("--steps", type=arguments.positive_int, help="(default: text 600, digits 100)")
    add("--global-batch", type=arguments.positive_int,
        help="of all workers together (default: text 16, digits 64)")  # fmt: skip
    add("--workers", type=arguments.positive_int, default=4, help="(default 4)")
    add("--search-seeds", type=arguments.positive_int, help="(default: text 1, digits 3)")
    add("--seeds", type=arguments.positive_int, help="others, compared (default: text 3, digits 6)")
    add("--finalists", type=arguments.positive_int, default=ladder.FINALISTS,
        help="of a search, trained with the seeds that are compared (default 4)")  # fmt: skip
    add("--clip", type=arguments.non_negative_float, default=1.0,
        help="largest norm of a worker's gradient, 0 for none (default 1)")  # fmt: skip
    add("--warmup", type=arguments.below_one, default=0.1, help="share of steps (default 0.1)")
    add("--processes", type=arguments.positive_int, default=torch.get_num_threads(),
        help="runs at the same time, one thread each (default: a run for each core)")  # fmt: skip
    add("--reuse", type=Path, metavar="FILE", help="of this benchmark: its runs are not made again")
    add_output(parser)
    options = parser.parse_args()
    if options.points:
        options.points = dict(options.points)
        options.methods, options.search_seeds = list(options.points), 0
    if (options.non_iid or options.reuse) and not options.task:
        parser.error("--non-iid and --reuse need --task")
    if options.width and options.task != "text":
        parser.error("--width needs --task text")
    if options.width and options.width % text.HEADS:
        parser.error(f"--width {options.width} is not a multiple of {text.HEADS}")
    if options.global_batch and options.global_batch % options.workers:
        parser.error(f"--global-batch {options.global_batch} is not a multiple of --workers "
                     f"{options.workers}")  # fmt: skip
    return options


if __name__ == "__main__":
    main()
