"""The step model against benchmarks/training/network.py's measurements.

What a method costs beside the link is taken from its row at the highest rate; its rows at lower
rates are then predicted from the bytes that the model says are sent. Four workers on two cores
share their computing, so all is in units of compute alone in the same run.
"""

from benchmarks.training import step_model
from benchmarks.training.step_model import Local, Network

# Of network.py's methods those that the model knows, by what it takes to be sent.
GATHERED = ("GMC", "DGC", "eager")
LATENCY = 1e-3  # seconds a message over gloo on busy cores


def errors(content: dict) -> list[dict]:
    """method, rate_mbit, predicted and measured times of compute alone, and the relative error."""
    rows = [row for row in content["results"]
            if not row["estimated"] and row["method"] != "LocalUpdates"]  # fmt: skip
    first: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: -row["rate_mbit"]):
        first.setdefault(row["method"], row)
    found = []
    for row in rows:
        base = first[row["method"]]
        if row is base:
            continue
        alone = row["compute_alone"]
        beside = base["step"]["median"] / base["compute_alone"] * alone - link(content, base, alone)
        predicted = (beside + link(content, row, alone)) / alone
        measured = row["times_compute_alone"]["median"]
        found.append({"method": row["method"], "rate_mbit": row["rate_mbit"],
                      "predicted": predicted, "measured": measured,
                      "error": abs(predicted / measured - 1)})  # fmt: skip
    return found


def link(content: dict, row: dict, alone: float) -> float:
    """Seconds of a step that go to the link and are not hidden."""
    network = Network(content["workers"], 1e6 * row["rate_mbit"])
    numel = content["model"]["parameters"]
    if "two-sided" in row["method"]:  # a payload for each range, and the owner's
        one = row["payload_bytes"] / (network.workers + 1)
        exchange = 2 * step_model.all_gather(one, network, LATENCY)
        overlapped = step_model.TOWARDS_OWNERS * row["method"].endswith("overlap")
    elif row["method"].startswith(GATHERED):
        exchange = step_model.all_gather(row["payload_bytes"], network, LATENCY)
        overlapped = row["method"].endswith("overlap")
    else:
        itemsize = 2 if row["method"] == "DDP bf16" else 4
        sent = itemsize * numel
        if row["method"].startswith("PowerSGD"):
            sent = row["link_bytes"] / (2 * (network.workers - 1) / network.workers)
        exchange = step_model.all_reduce(sent, network, LATENCY)
        overlapped = not row["method"].startswith("PowerSGD")  # there in one bucket
    return step_model.step(Local(alone, 0.0), exchange, overlapped) - alone
