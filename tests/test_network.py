"""benchmarks/training/network.py: what it measures adds up, and nothing of it stays."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.training import namespaces, network, time_to_loss
from gmc_cuda import advise
from support import scripts

ROOT = Path(__file__).parent.parent

ROW = {"method": "DDP", "rate_mbit": 100, "estimated": False, "step": {"median": 7.0},
       "compute_alone": 0.25, "link_bytes": 60_000_000}  # fmt: skip


def why_not():
    """Why this machine cannot make a namespace, empty if it can."""
    problem = namespaces.missing()
    if problem:
        return problem
    try:
        with namespaces.Star(1) as star:
            star.limit(100)
    except RuntimeError as error:
        return str(error)
    return ""


def left_behind():
    """Namespaces of runs that have ended; another run may be in the middle of its own."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    owners = {name: name[3:].partition("-")[0] for name in done.stdout.split() if name[:3] == "gmc"}
    return {name for name, pid in owners.items() if not Path("/proc", pid).exists()}


@pytest.mark.slow
def test_two_workers(tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    before, methods = left_behind(), ("GMC", "LocalUpdates", "DDP bf16")
    program = ["-m", "benchmarks.training.network", "--workers", "2", "--model", "text",
               "--rates", "100", "10", "--methods", *methods, "--seconds", "1",
               "--output", str(tmp_path)]  # fmt: skip
    done = scripts.run(*program, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("network-*.json")
    rows = json.loads(path.read_text())["results"]
    found = {(row["method"], row["rate_mbit"]): row for row in rows}
    assert set(found) == {(method, rate) for method in methods for rate in (100, 10)}
    sparse, local, dense = (found[method, 100] for method in methods)
    # With two workers each sends its payload once, or half of a gradient twice; and headers.
    assert 1 < sparse["link_bytes"] / sparse["payload_bytes"] < 1.3
    assert 1 < dense["link_bytes"] / (2 * 470_528) < 1.2
    # The link was as slow as it was said to be.
    least = 8 * dense["link_bytes"] / 100e6
    assert 0.9 * least < dense["step"]["median"]
    # 2 % of the entries once in 20 steps; what a collective sends besides counts for more there.
    assert local["payload_bytes"] == pytest.approx(sparse["payload_bytes"] / 10, rel=0.1)
    assert 1 < local["link_bytes"] / local["payload_bytes"] < 2
    assert [row["estimated"] for row in rows] == [False] * 5 + [True]
    # Cut short after the first rate, it goes on with the second.
    content = json.loads(path.read_text())
    assert content["complete"]
    path.write_text(json.dumps(content | {"complete": False, "results": rows[:3]}))
    again = scripts.run(*program, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert "100 Mbit/s" not in again.stdout.partition("ms a step")[0]
    content = json.loads(path.read_text())
    assert content["complete"]
    assert content["results"][:3] == rows[:3]
    assert [row["rate_mbit"] for row in content["results"][3:]] == [10, 10, 10]
    assert left_behind() <= before


ECHO = """
import socket, sys, time
peer = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
if sys.argv[1] == "echo":
    peer.bind((sys.argv[2], 29500))
    peer.listen()
    print("listening", flush=True)
    peer, _ = peer.accept()
    while True:
        peer.sendall(peer.recv(100_000) or sys.exit())
peer.connect((sys.argv[2], 29500))
trips = []
for _ in range(10):
    started = time.perf_counter()
    peer.sendall(b"x")
    peer.recv(1)
    trips.append(time.perf_counter() - started)
peer.sendall(bytes(1_000_000))
left = 1_000_000
while left:
    left -= len(peer.recv(left))
print(min(trips))
"""


@pytest.mark.slow
def test_a_packet_takes_the_delay_and_a_large_frame_arrives():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with namespaces.Star(3) as star:
        star.delay(15)
        star.limit(1_000)
        first, second, _ = (["ip", "netns", "exec", name, "python3", "-c", ECHO]
                            for name in star.workers)  # fmt: skip
        address = star.address(1)
        listen = [*second, "echo", address]
        with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as echo:
            assert echo.stdout.readline() == "listening\n"
            done = subprocess.run(
                [*first, "ask", address], capture_output=True, text=True, timeout=60
            )
            echo.kill()
        assert done.returncode == 0, done.stderr
        assert 0.030 <= float(done.stdout) < 0.045


@pytest.mark.slow
def test_time_to_loss(tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    before = left_behind()
    done = scripts.run(
        "-m", "benchmarks.training.time_to_loss", "--workers", "2", "--rates",
        "100", "--methods", "GMC float4", "DDP", "--seconds", "0.5", "--steps", "30", "--target",
        "4", "--output", str(tmp_path), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("time-to-loss-*.json")
    content = json.loads(path.read_text())
    assert path.with_suffix(".png").exists()
    for run, step, time in zip(*(content[key] for key in ("training", "steps", "seconds"))):
        assert run["method"] == step["method"] == time["method"]
        assert len(run["losses"]) == 4
        assert run["losses"][3] < 4 < run["losses"][0]
        assert time["seconds"] == pytest.approx(time["steps"] * step["step"]["median"])
    assert left_behind() <= before


def test_steps_to_a_loss():
    assert time_to_loss.steps_to(2.0, [5.0, 3.0, 2.0, 2.5]) == 20
    assert time_to_loss.steps_to(1.0, [5.0, 3.0]) is None


def test_estimate():
    found = network.estimate([ROW], "DDP", 10)
    assert found["step"]["median"] == pytest.approx(0.25 + 48)
    assert found["estimated"]
    assert found["rate_mbit"] == 10
    with pytest.raises(SystemExit, match="PowerSGD at 10 Mbit/s is estimated from a higher rate"):
        network.estimate([ROW], "PowerSGD", 10)


def test_without_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="^network namespaces need root: sudo make network$"):
        namespaces.require()


def test_a_star_that_cannot_be_made_leaves_nothing(monkeypatch):
    calls = []

    def run(*command):
        if "veth" in command:
            raise RuntimeError("no veth here")

    monkeypatch.setattr(namespaces, "_run", run)
    monkeypatch.setattr(namespaces.subprocess, "run", lambda command, **_: calls.append(command))
    star = namespaces.Star(2)
    with pytest.raises(RuntimeError, match="no veth here"):
        star.__enter__()
    assert [command[:3] for command in calls] == 3 * [["ip", "netns", "delete"]]
    assert {command[3] for command in calls} == {star.switch, *star.workers}


@pytest.mark.slow
def test_advice_beside_the_steps_that_it_speaks_of(tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    done = scripts.run(
        "-m", "benchmarks.training.advice", "--set-ups", "2:1000", "--seconds", "4",
        "--output", str(tmp_path), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("advice-*.json")
    rows = json.loads(path.read_text())["results"]
    assert [row["method"] for row in rows] == ["compute alone", "DDP", *advise.CANDIDATES]
    assert all(row["said"] > 0 and row["took"] > 0 for row in rows)
    for wrong in ("4", "x:10", "4:17"):
        done = scripts.run("-m", "benchmarks.training.advice", "--set-ups", wrong, cwd=ROOT)
        assert done.returncode == 2
        assert f"got {wrong!r}, must be WORKERS:MBIT" in done.stderr
