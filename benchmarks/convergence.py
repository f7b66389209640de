#!/usr/bin/env python3
"""Held-out loss of dense momentum SGD, GMC and DGC at equal bytes, each at its best of a grid.

    python benchmarks/convergence.py                               text, 100 times fewer bytes
    python benchmarks/convergence.py --task digits --non-iid --momentum 0 0.5 0.9 --lr 0.1 0.2 0.4

All workers live in one process. Each clips its gradient; the learning rate rises linearly, then
falls as a cosine. The JSON file is written anew after each run, so that a run cut short keeps what
it has; seeds are the outer loop.
"""

import argparse
import math
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch

from bench.logical_workers import DTYPES, RULES, train
from bench.report import file_stem, load, print_table, write_json
from compare_methods import arguments, digits, text
from compare_methods.provenance import provenance

TASKS = {"text": text, "digits": digits}
SIZES = {"text": {"steps": 600, "batch": 4}, "digits": {"steps": 100, "batch": 16}}
# Momentum and learning rate: dense and gmc on digits from the grids in results/, the others from
# trials. What waits in memory acts like momentum, so a sparse method can want less, and more lr.
DEFAULTS = {
    "text": {"dense": (0.9, 0.32), "gmc": (0.5, 1.28), "dgc": (0.9, 0.64), "memsgd": (0.5, 1.28)},
    "digits": {"dense": (0.5, 0.4), "gmc": (0.5, 0.8), "dgc": (0.5, 0.8), "memsgd": (0.5, 0.8)},
}


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    module, workers = TASKS[options.task], options.workers
    tasks = [module.load(rank, workers, options.non_iid) for rank in range(workers)]
    task = options.task + ("-non-iid" if options.non_iid else "")
    content = {
        "benchmark": "convergence",
        **provenance(torch.device("cpu")),
        "load": {"before": load()},
        "threads": torch.get_num_threads(),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "task": {"title": tasks[0].title, "data": tasks[0].data},
        "units": {
            "bytes": "payload of one worker and step",
            "loss": "cross-entropy in nats on held-out data",
            "accuracy": "0 to 1, on held-out data",
        },
        "planned_runs": 0,
        "results": [],
    }
    path = options.output / f"{file_stem(f'convergence-{task}', content)}.json"
    plan = []
    for seed, method in product(range(options.seeds), options.methods):
        momentum, lr = DEFAULTS[options.task][method.split(":")[0]]
        grid = product(options.momentum or [momentum], options.lr or [lr])
        plan += [(method, *point, seed) for point in grid]
    content["planned_runs"] = len(plan)
    for number, point in enumerate(plan, 1):
        run = train(tasks, *point, options)
        print(f"{number}/{len(plan)}  {run['method']}  momentum {run['momentum']:g}  "
              f"lr {run['lr']:g}  seed {run['seed']}  loss {spread([run['loss']], 3)}  "
              f"{run['seconds']:.0f} s", flush=True)  # fmt: skip
        content["results"].append(run)
        content["load"]["after"] = load()
        write_json(path, content)
    title = f"{task}: {workers} workers, {options.steps} steps; mean ± standard deviation"
    print_table(title, HEADINGS, table(content["results"]))
    print(f"numbers: {path}")


HEADINGS = ["method", "momentum", "lr", "loss", "accuracy, %", "seeds", "bytes", "density", ""]


def table(runs: list[dict]) -> list[list[str]]:
    """A row for each point of the grids; the last column says which is a method's best."""
    points: dict[tuple, list[dict]] = {}
    for run in runs:
        points.setdefault((run["method"], run["momentum"], run["lr"]), []).append(run)
    loss = {
        point: mean(math.inf if run["loss"] is None else run["loss"] for run in found)
        for point, found in points.items()
    }
    rows = []
    for point, found in points.items():
        grid = [other for other in points if other[0] == point[0]]
        best = point == min(grid, key=loss.__getitem__)
        rows.append([
            point[0], f"{point[1]:g}", f"{point[2]:g}", spread([run["loss"] for run in found], 3),
            spread([100 * run["accuracy"] for run in found], 1), str(len(found)),
            f"1/{found[0]['bytes_ratio']:.4g}", f"{100 * found[0]['density']:.3g} %",
            verdict(point, grid) if best else "",
        ])  # fmt: skip
    return rows


def verdict(best: tuple, grid: list[tuple]) -> str:
    """What there is to say of a method's best point: at an edge it might not be the best."""
    edges = []
    for place, name in ((1, "momentum"), (2, "lr")):
        tried = {point[place] for point in grid}
        at_edge = best[place] in (min(tried), max(tried)) and best[place] != 0  # none lies below 0
        if len(tried) > 1 and at_edge:
            edges.append(name)
    if edges:
        return f"EDGE: {', '.join(edges)}"
    return "best" if len(grid) > 1 else ""


def spread(values: list, digits: int) -> str:
    if None in values:
        return "diverged"
    after = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{after}"


def parse() -> argparse.Namespace:
    names = ["dense", *(f"{rule}:{dtype}" for rule in RULES if rule != "dense" for dtype in DTYPES)]
    default = ["dense", "gmc:bfloat16", "gmc:float8", "gmc:float4"]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="methods: " + "; ".join(f"{rule}: {said}" for rule, said in RULES.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="text")
    add("--non-iid", action="store_true", help="few classes, or its own files, on each worker")
    add("--methods", nargs="+", choices=names, default=default, metavar="METHOD",
        help=f"dense, or gmc, dgc or memsgd with :{', :'.join(DTYPES)} "
        f"(default: {' '.join(default)})")  # fmt: skip
    add("--bytes-ratio", type=arguments.positive_float, default=100.0, help="(default 100)")
    add("--density", type=arguments.density, help="instead of --bytes-ratio")
    add("--momentum", nargs="+", type=arguments.below_one, help="a grid, for every method")
    add("--lr", nargs="+", type=arguments.positive_float, help="a grid, for every method")
    add("--steps", type=arguments.positive_int, help="(default: text 600, digits 100)")
    add("--batch", type=arguments.positive_int, help="of a worker (default: text 4, digits 16)")
    add("--workers", type=arguments.positive_int, default=4, help="(default 4)")
    add("--seeds", type=arguments.positive_int, default=3, help="0 to N-1 (default 3)")
    add("--clip", type=arguments.non_negative_float, default=1.0,
        help="largest norm of a worker's gradient, 0 for none (default 1)")  # fmt: skip
    add("--warmup", type=arguments.below_one, default=0.1, help="share of steps (default 0.1)")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    options = parser.parse_args()
    for name, value in SIZES[options.task].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
