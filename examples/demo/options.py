"""The command line. Imports no torch, so that a mistake is reported at once."""

import argparse
import os
from itertools import pairwise

from examples.demo import NAME
from examples.demo.arguments import (
    below_one,
    density,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)

METHODS = {
    "dmsgd": "dense momentum SGD (GMC with density 1)",
    "gmc": "GMC: sparse, global momentum",
    "dgc": "DGC: sparse, local momentum with momentum factor masking",
    "memsgd": "memory SGD with local momentum (DGC without masking), as in the GMC paper",
}

TASK_DEFAULTS = {
    "text": {"steps": 600, "seeds": 1, "batch": 4},
    "digits": {"steps": 100, "seeds": 3, "batch": 16},
}
# (momentum, lr) that benchmarks/training/convergence.py found for these steps, 4 workers, the
# default exchange and a hundredth of the bytes on a link. Unsent entries are applied late, which
# has the effect of additional momentum, so sparse methods want less of it, at about the same
# lr / (1 - momentum). Digits were searched with all classes only, and memory SGD there for the
# all-gather with payloads of 1/100.
BEST = {
    "text": {"dmsgd": (0.8, 0.512), "gmc": (0.3, 1.792), "dgc": (0.8, 1.44815),
             "memsgd": (0.5, 1.28)},
    "digits": {"dmsgd": (0.5, 0.64), "gmc": (0.5, 0.64), "dgc": (0.6, 0.724077),
               "memsgd": (0.3, 0.896)},
}  # fmt: skip
EXCHANGES = ["reduce_scatter", "all_gather"]
WIRE_DTYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float4_e2m1fn_x2"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options with the task's defaults filled in; exits with a message on a mistake."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in TASK_DEFAULTS[options.task].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.methods = list(dict.fromkeys(options.methods))
    options.tuned = {
        method: {
            "momentum": momentum if options.momentum is None else options.momentum,
            "lr": lr if options.lr is None else options.lr,
        }
        for method, (momentum, lr) in BEST[options.task].items()
        if method in options.methods
    }
    _set_workers(parser, options)
    stages = options.schedule or []
    if any(a >= b for a, b in pairwise(stages)):
        parser.error(f"argument --schedule: steps must increase, got {stages}")
    if options.warmup > options.steps:
        parser.error(f"argument --warmup: {options.warmup} is more than --steps {options.steps}")
    if options.density is None and options.bytes_ratio is None:
        options.bytes_ratio = 100.0
    if options.warmup and options.density is None:
        parser.error("argument --warmup: needs --density, which it lowers to")
    return options


def _set_workers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        options.workers = options.workers or 4
        return
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        parser.error(
            f"RANK is set in the environment but {' and '.join(missing)} is not: start with "
            "torchrun, or unset RANK"
        )
    world = int(os.environ["WORLD_SIZE"])
    if options.workers not in (None, world):
        parser.error(
            f"argument --workers: {options.workers} but the launcher started {world} workers; "
            "leave --workers out"
        )
    options.workers = world


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Train one model with several methods of distributed momentum SGD and compare "
        "loss, accuracy and bytes sent.",
        epilog="methods: " + "; ".join(f"{name} = {text}" for name, text in METHODS.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--task",
        choices=list(TASK_DEFAULTS),
        default="text",
        help="text: byte-level transformer on the Python standard library's sources (default); "
        "digits: small convolutional network on scikit-learn's digits",
    )
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"any of {', '.join(METHODS)} (default: all)",
    )
    add(
        "--workers",
        type=positive_int,
        default=None,
        metavar="N",
        help="workers to start on this machine (default 4); under torchrun, its world size",
    )
    sent = parser.add_mutually_exclusive_group()
    sent.add_argument(
        "--bytes-ratio",
        type=positive_float,
        metavar="R",
        help="a link carries R times fewer bytes than with dense gradients (default 100)",
    )
    sent.add_argument(
        "--density",
        type=density,
        metavar="D",
        help="share of entries sent by the sparse methods in place of that, 0 < D <= 1",
    )
    add(
        "--exchange",
        choices=EXCHANGES,
        default=EXCHANGES[0],
        help="how the sparse methods' payloads travel: to the owners of ranges and from there to "
        "all (default), or from every worker to every worker",
    )
    add(
        "--non-iid",
        action="store_true",
        help="digits: each worker gets few classes; text: each worker gets its own files",
    )
    add("--steps", type=positive_int, metavar="N", help=_by_task("steps per run", "steps"))
    add(
        "--seeds",
        type=positive_int,
        metavar="N",
        help=_by_task(
            "runs per method, with seeds 0 to N-1; the table shows mean and standard deviation",
            "seeds",
        ),
    )
    add("--batch", type=positive_int, metavar="N", help=_by_task("examples per worker", "batch"))
    add("--lr", type=positive_float, help="for all methods (default: each its best)")
    add(
        "--momentum",
        type=below_one,
        metavar="BETA",
        help="for all methods, 0 <= BETA < 1 (default: each its best)",
    )
    add(
        "--clip",
        type=non_negative_float,
        default=1.0,
        metavar="NORM",
        help="largest norm of a worker's gradient, 0 for none (default 1)",
    )
    add("--weight-decay", type=non_negative_float, default=0.0, metavar="W", help="(default 0)")
    add(
        "--schedule",
        type=positive_int,
        nargs="*",
        metavar="STEP",
        help="stagewise learning rate: multiply it by --gamma at these steps; no number: constant "
        "(default: up linearly over a tenth of the steps, then down as a cosine)",
    )
    add("--gamma", type=positive_float, default=0.1, help="factor of --schedule (default 0.1)")
    add(
        "--warmup",
        type=non_negative_int,
        default=0,
        metavar="STEPS",
        help="lower the density of the sparse methods from 0.25 to --density over this many steps, "
        "in four stages as in DGC (default 0: none)",
    )
    add(
        "--wire-dtype",
        choices=WIRE_DTYPES,
        default="float4_e2m1fn_x2",
        help="type of the values sent by the sparse methods (default float4_e2m1fn_x2)",
    )
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="cpu uses gloo, cuda uses NCCL; auto (default) is cuda if there is a GPU per worker "
        "and gmc_cuda has CUDA kernels",
    )
    add(
        "--output",
        default="demo-output",
        metavar="FOLDER",
        help="where the PNG and the JSON file go (default ./demo-output)",
    )
    return parser


def _by_task(text: str, name: str) -> str:
    values = ", ".join(f"{task} {defaults[name]}" for task, defaults in TASK_DEFAULTS.items())
    return f"{text} (default: {values})"
