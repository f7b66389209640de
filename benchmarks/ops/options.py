"""The command line."""

import argparse

from examples.demo.arguments import density, number, positive_float, positive_int

NUMELS = {"cuda": [10**6, 25_600_000, 124_000_000, 355_000_000, 10**9], "cpu": [10**6, 25_000_000]}
DENSITIES = [0.01, 0.003, 0.001]
DTYPES = ["fp32", "bf16"]
WIRES = ["bf16", "fp8", "fp4", "fp16", "fp32"]
RANKS = [8, 1, 32]
METHODS = ["gmc", "dgc"]
EXCHANGES = ["all_gather", "reduce_scatter"]
FACTORS = ("density", "grad_dtype", "wire", "ranks", "method", "exchange", "data")
DATA = ["gaussian", "laplace", "ties", "zero", "drift"]

_numel = number(lambda t: int(float(t)), lambda v: 0 < v < 2**31, "a number from 1 to 2**31 - 1")


def parse(program: str, description: str, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="The first value of each list is the centre; the others are varied one at a time, "
        "at the middle size with --quick, at all sizes without, in all combinations with --cross.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--numel", type=_numel, nargs="+", metavar="N", help="elements, such as 25.6e6")
    add("--density", type=density, nargs="+", default=DENSITIES, metavar="D")
    add("--grad-dtype", choices=DTYPES, nargs="+", default=DTYPES, help="parameters have it too")
    add("--wire", choices=WIRES, nargs="+", default=WIRES[:3], help="type of the values sent")
    add("--ranks", type=positive_int, nargs="+", default=RANKS, metavar="P")
    add("--method", choices=METHODS, nargs="+", default=METHODS)
    add("--exchange", choices=EXCHANGES, nargs="+", default=EXCHANGES)
    add("--data", choices=DATA, nargs="+", default=DATA)
    add("--tensors", type=positive_int, default=1, help="tensors in the bucket (default 1)")
    add("--no-peers", action="store_true", help="leave out everything that is not ours")
    add("--cross", action="store_true", help="all combinations of the lists")
    add("--quick", action="store_true", help="a few minutes at most: fewer cases, less time each")
    add(
        "--seconds",
        type=positive_float,
        metavar="S",
        help="time for one case (default 10, quick 3)",
    )
    add(
        "--limit",
        type=positive_float,
        metavar="S",
        help="start no further case after this many seconds",
    )
    add("--output", default="benchmarks/results", metavar="FOLDER")
    options = parser.parse_args(arguments)
    for name in ("numel", *FACTORS):
        values = getattr(options, name)
        if values is not None:
            setattr(options, name, list(dict.fromkeys(values)))
    if options.seconds is None:
        options.seconds = 3.0 if options.quick else 10.0
    return options
