"""The picture: time against the bytes that must move, with the line of a copy."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart by colour-blind readers.
COLOURS = {"compress": "#D55E00", "own": "#F0E442", "merge": "#0072B2", "apply": "#009E73",
           "step": "#D55E00"}  # fmt: skip
PEER_COLOURS = ["#000000", "#CC79A7", "#56B4E9", "#E69F00"]
MARKERS = ["x", "+", "1", "2"]


def save(path: Path, title: str, records: list[dict]) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 5.2))
    copy = max(record["copy_gb_per_s"] for record in records)
    sizes = [record["bytes"] for record in records]
    ends = [min(sizes), max(sizes)]
    axes.plot(ends, [1e3 * size / copy / 1e9 for size in ends], color="#888888", linewidth=1.2,
              label=f"copy, {copy:.3g} GB/s")  # fmt: skip
    for op in dict.fromkeys(record["op"] for record in records):
        mine = [record for record in records if record["op"] == op]
        axes.plot([r["bytes"] for r in mine], [_ms(r["time"]) for r in mine], "o", markersize=5,
                  color=COLOURS[op], label=op)  # fmt: skip
    others: dict[str, list] = {}
    for record in records:
        for peer in record["peers"]:
            if "time" in peer:
                size = peer.get("bytes", record["bytes"])
                name = f"{peer['name']} (for {record['op']})"
                others.setdefault(name, []).append((size, _ms(peer["time"])))
    for i, (name, points) in enumerate(others.items()):
        axes.plot(*zip(*points), MARKERS[i % 4], color=PEER_COLOURS[i % 4], label=name)
    axes.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="ms", title=title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _ms(time: dict) -> float:
    return 1e3 * time["median_seconds"]
