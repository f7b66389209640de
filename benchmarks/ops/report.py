"""What kernels.py and step.py print: a line for each case, the goals, what was left out."""

from benchmarks.report import print_table


def duration(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def case_line(record: dict) -> str:
    time = record["time"]
    parts = [
        f"{record['op']:<8} {record['numel']:>13,}  {100 * record['density']:g} %  "
        f"{record['grad_dtype']}  wire {record['wire']}  p={record['ranks']:<2} "
        f"{record['method']} {record['exchange']:<14} {record['data']:<8}",
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


def print_left_out(left_out: dict[str, str]) -> None:
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")
