"""What every benchmark writes and prints: the JSON file and its name, a table, the load."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

WIDTH = 100


def print_table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print(title)
        for row in [headings, *rows]:
            print("  " + " | ".join(row))
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, vertical="top")
    for row in rows:
        table.add_row(*row)
    Console(width=WIDTH, highlight=False).print(table)


def pyplot() -> Any:
    """matplotlib.pyplot for pictures in files; None, with a line that says so, where it is not."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("left out: the picture: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(plt: Any, figure: Any, path: Path, dpi: int = 130) -> None:
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    print(f"picture: {path}")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option --output of a benchmark that writes files."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="FOLDER",
        help="of the files (default %(default)s)",
    )


def file_stem(what: str, facts: dict) -> str:
    """kernels-nvidia-h200-2026-01-31: the machine is its GPU, or its processor."""
    machine = facts["hardware"]["gpu"] or facts["hardware"]["processor"]
    machine = re.sub(r"\((r|tm)\)", "", machine.lower())
    machine = re.sub(r"[^a-z0-9]+", "-", machine).strip("-")
    return f"{what}-{machine}-{facts['date'][:10]}"


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def load() -> list[float]:
    """Processes that wanted to run: means over the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def earlier(path: Path, content: dict, *parts: str) -> dict:
    """What is in the file if it is of the same options, machine and versions; else nothing.

    parts: what must be the same besides.
    """
    if not path.exists():
        return {}
    found: dict = json.loads(path.read_text())
    same = ("options", "hardware", "versions", *parts)
    return found if all(found.get(part) == content[part] for part in same) else {}
