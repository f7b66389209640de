"""A line for each case, the table, the JSON file."""

import json
import os
import re
from pathlib import Path

WIDTH = 100


def duration(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def case_line(record: dict) -> str:
    time = record["time"]
    parts = [
        f"{record['op']:<8} {record['numel']:>13,}  {100 * record['density']:g} %  "
        f"{record['grad_dtype']}  wire {record['wire']}  p={record['ranks']:<2} "
        f"{record['method']} {record['data']:<8}",
        f"{duration(time['median_seconds'])} "
        f"({duration(time['p25_seconds'])} to {duration(time['p75_seconds'])})",
        f"{record['gb_per_s']:.4g} GB/s, {record['fraction_of_copy']:.2f} of a copy's",
    ]
    reference = record.get("reference")
    if reference:
        ratio = reference["ratio"]
        parts.append(
            f"{ratio['median']:.2f}x {reference['name']} "
            f"({ratio['of_shortest']:.2f}x of the shortest)"
        )
    for peer in record["peers"]:
        if "skipped" in peer:
            continue
        times = peer["times_slower"]["median"]
        parts.append(
            f"{peer['name']} {times:.3g}x slower"
            if times >= 1
            else f"{peer['name']} FASTER, {times:.2f} of our time"
        )
    if record.get("repair_rate"):
        parts.append(f"repaired {100 * record['repair_rate']:.0f} % of the rounds")
    if record.get("launches"):
        launches = record["launches"]
        parts.append(f"{launches['kernels']}+{launches['fills_and_copies']} launches")
    return "  |  ".join(parts)


def print_goals(rows: list[dict]) -> None:
    print()
    print_table("numbers to reach", ["what", "goal", "measured", "outcome"],
                [list(row.values()) for row in rows])  # fmt: skip


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


def print_left_out(left_out: dict[str, str]) -> None:
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")


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
