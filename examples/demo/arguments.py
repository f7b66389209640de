"""Numbers on a command line: argparse types that say what a number must be."""

import argparse
from collections.abc import Callable
from typing import Any


def number(convert: Callable, accept: Callable, wanted: str) -> Callable:
    """An argparse type: `convert` reads the text, `accept` tells whether the value will do."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


_INF = float("inf")
positive_int = number(int, lambda v: v > 0, "a whole number above 0")
non_negative_int = number(int, lambda v: v >= 0, "a whole number, 0 or more")
positive_float = number(float, lambda v: 0 < v < _INF, "a number above 0")
non_negative_float = number(float, lambda v: 0 <= v < _INF, "a number, 0 or more")
below_one = number(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")
density = number(float, lambda v: 0 < v <= 1, "a number above 0, at most 1")
