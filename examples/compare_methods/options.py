"""The command line. Imports no torch, so that a mistake is reported at once."""

import argparse
import os

from compare_methods import NAME
from compare_methods.arguments import (
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

# lr is the same for all methods: what a table compares is the method, not the tuning.
TASK_DEFAULTS = {
    "text": {"steps": 600, "seeds": 1, "batch": 4, "lr": 0.08},
    "digits": {"steps": 500, "seeds": 3, "batch": 16, "lr": 0.05},
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options with the task's defaults filled in; exits with a message on a mistake."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in TASK_DEFAULTS[options.task].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.methods = list(dict.fromkeys(options.methods))
    if options.schedule is None:
        options.schedule = [options.steps * 3 // 4, options.steps * 9 // 10]
    _set_workers(parser, options)
    if any(a >= b for a, b in zip(options.schedule, options.schedule[1:])):
        parser.error(f"argument --schedule: steps must increase, got {options.schedule}")
    if options.warmup > options.steps:
        parser.error(f"argument --warmup: {options.warmup} is more than --steps {options.steps}")
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
    add(
        "--density",
        type=density,
        default=0.01,
        metavar="D",
        help="share of entries sent by the sparse methods, 0 < D <= 1 (default 0.01)",
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
    add("--lr", type=positive_float, help=_by_task("learning rate, of all methods", "lr"))
    add(
        "--momentum",
        type=below_one,
        default=0.9,
        metavar="BETA",
        help="0 <= BETA < 1 (default 0.9)",
    )
    add("--weight-decay", type=non_negative_float, default=0.0, metavar="W", help="(default 0)")
    add(
        "--schedule",
        type=positive_int,
        nargs="*",
        metavar="STEP",
        help="stagewise learning rate: multiply it by --gamma at these steps (default: at 75 and "
        "90 percent of the steps; no number: constant)",
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
        choices=["bfloat16", "float16", "float32", "float8_e4m3fn", "float4_e2m1fn_x2"],
        default="bfloat16",
        help="type of the values sent by the sparse methods (default bfloat16)",
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
