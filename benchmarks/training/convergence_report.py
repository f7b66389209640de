"""What benchmarks/training/convergence.py prints and draws."""

from pathlib import Path
from statistics import mean, stdev

from benchmarks import report


def line(run: dict) -> str:
    return (
        f"{run['method']:<26} momentum {run['momentum']:<4g}  lr {run['lr']:<7g} "
        f"seed {run['seed']}  loss {spread([run['loss']], 3)}  {run['seconds']:.0f} s"
    )


def show(content: dict) -> None:
    rows = []
    for method in content["best"]:
        points: dict[tuple, list] = {}
        for run in content["results"]:
            if run["method"] == method and run["seed"] in content["seeds"]["search"]:
                points.setdefault((run["momentum"], run["lr"]), []).append(run["loss"])
        tried = [f"{m:g}/{lr:g}: {spread(found, 3)}" for (m, lr), found in sorted(points.items())]
        rows.append([method, ", ".join(tried)])
    if content["seeds"]["search"]:
        title = f"looked for with seeds {content['seeds']['search']}: momentum/lr: loss"
        report.print_table(title, ["method", "tried"], rows)
    rows, dense = [], compared(content, "dense")
    for method, point in content["best"].items():
        runs = compared(content, method)
        beyond = mean(losses(runs)) - mean(losses(dense)) if dense and finite(runs) else None
        rows.append([
            method, f"{point['momentum']:g}", f"{point['lr']:g}", spread(losses(runs), 3),
            "" if beyond is None or method == "dense" else f"{beyond:+.3f}",
            spread([100 * run["accuracy"] for run in runs], 1),
            f"1/{runs[0]['bytes_ratio']:.4g}", f"{100 * runs[0]['density']:.3g} %",
        ])  # fmt: skip
    options = content["options"]
    title = (
        f"{options['task']}{', non-IID' * options['non_iid']}: {options['workers']} workers, "
        f"{options['steps']} steps, seeds {content['seeds']['compared']}; mean ± standard deviation"
    )
    headings = ["method", "momentum", "lr", "loss", "to dense", "accuracy, %", "bytes", "density"]
    report.print_table(title, headings, rows)


def compared(content: dict, method: str) -> list[dict]:
    """The runs of a method at its best point, one for each seed that is compared."""
    point = content["best"].get(method)
    return [
        run
        for run in content["results"]
        if run["method"] == method
        and run["seed"] in content["seeds"]["compared"]
        and point == {"momentum": run["momentum"], "lr": run["lr"]}
    ]


def losses(runs: list[dict]) -> list:
    return [run["loss"] for run in runs]


def finite(runs: list[dict]) -> bool:
    return None not in losses(runs)


def spread(values: list, digits: int) -> str:
    if None in values:
        return "diverged"
    after = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{after}"


def draw(path: Path, content: dict) -> None:
    plt = report.pyplot()
    if plt is None:
        return

    figure, axes = plt.subplots(figsize=(7, 0.45 * len(content["best"]) + 1.3))
    dense = compared(content, "dense")
    if dense and finite(dense):
        low, high = min(losses(dense)), max(losses(dense))
        axes.axvspan(low, high, color="#E69F00", alpha=0.25, linewidth=0, label="dense, its seeds")
    rows = [method for method in content["best"] if finite(compared(content, method))]
    for row, method in enumerate(rows):
        values = losses(compared(content, method))
        axes.plot(values, [row] * len(values), "o", color="#0072B2", alpha=0.5, markersize=5)
        axes.plot(mean(values), row, "|", color="black", markersize=14)
    labels = []
    for method in rows:
        point, run = content["best"][method], compared(content, method)[0]
        sent = "" if method == "dense" else f"1/{run['bytes_ratio']:.3g} of the bytes, "
        labels.append(f"{method}\n{sent}momentum {point['momentum']:g}, lr {point['lr']:g}")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    options = content["options"]
    axes.set(xlabel="held-out loss, nats (a dot for each seed, a line for their mean)")
    axes.set_title(
        f"{content['task']['title']}{', non-IID' * options['non_iid']}\n{options['workers']} "
        f"workers, {options['steps']} steps, each method at its best momentum and lr",
        fontsize=9,
    )
    if dense:
        axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    report.save_picture(plt, figure, path)
