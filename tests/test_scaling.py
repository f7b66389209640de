"""training/scaling.py: the model's closed forms, and that its check can tell right from wrong."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.training import measured_steps, step_model
from benchmarks.training.step_model import METHODS, MODELS, Local, Machine, Network
from gmc_cuda import ops
from support import scripts

ROOT = Path(__file__).parent.parent

MACHINE = Machine(flops=1e14, memory=1e12, latency=0.0)
N = 10_000_000


def test_models():
    sizes = {model.name: model.numel for model in MODELS}
    assert sizes["ResNet-50"] == 25_557_032
    assert sizes["GPT-2 (124 M)"] == 124_439_808
    assert MODELS[0].low_rank(4) < MODELS[0].numel / 40
    assert MODELS[0].low_rank(10**6) == MODELS[0].numel


def test_rings():
    network = Network(workers=4, rate=8e6)
    assert step_model.all_reduce(1e6, network, 0.0) == pytest.approx(1.5)
    assert step_model.all_gather(1e6, network, 0.5) == pytest.approx(4.5)


def test_overlap_hides_what_fits_under_the_backward_pass():
    local = Local(compute=3.0, update=0.5)
    assert step_model.step(local, 1.0, overlapped=0) == 4.5
    assert step_model.step(local, 1.0, overlapped=1) == pytest.approx(3.75)
    assert step_model.step(local, 100.0, overlapped=1) == pytest.approx(3.5 + 100 - 1.5)
    assert step_model.step(local, 2.0, overlapped=0.5) == pytest.approx(5.5 - 0.75)


def test_gmc_goes_dense_where_the_optimizer_does():
    model = MODELS[0]
    gmc = METHODS["GMC"]
    few, many = (gmc.exchange(model, Network(p, 1e9), 0.0) for p in (4, 1024))
    k = -(-model.numel // 100)
    assert few == pytest.approx(3 * 8 * ops.payload_nbytes(model.numel, k, torch.bfloat16) / 1e9)
    assert many == pytest.approx(METHODS["DDP"].exchange(model, Network(1024, 1e9), 0.0))


def row(method, rate_mbit, ratio, payload=None):
    return {"method": method, "rate_mbit": rate_mbit, "estimated": False, "compute_alone": 0.5,
            "step": {"median": 0.5 * ratio}, "times_compute_alone": {"median": ratio},
            "payload_bytes": payload, "link_bytes": 0}  # fmt: skip


def measured(gmc, ddp):
    """A file as network.py writes it: four workers; beside the link GMC costs 0.05 s, DDP 0.1."""
    base = 0.5 + 3 * (8e-4 + measured_steps.LATENCY)
    exchange = 1.5 * 8 * 4 * N / 1e9 + 4 * measured_steps.LATENCY
    hidden = 0.75 * 0.5 * step_model.BACKWARD
    return {
        "workers": 4, "model": {"parameters": N},
        "results": [
            row("GMC", 1000, (base + 0.05) / 0.5, 100_000), row("GMC", 100, gmc, 100_000),
            row("DDP", 1000, (0.6 + exchange - hidden) / 0.5), row("DDP", 100, ddp),
            row("DDP", 10, 500.0) | {"estimated": True},
        ],
    }  # fmt: skip


def test_check_against_measurements():
    sparse = (0.55 + 3 * (8e-3 + measured_steps.LATENCY)) / 0.5
    exchange = 1.5 * 8 * 4 * N / 1e8 + 4 * measured_steps.LATENCY
    dense = (0.6 + exchange - 0.75 * 0.5 * step_model.BACKWARD) / 0.5
    rows = measured_steps.errors(measured(sparse, 2 * dense))
    found = {(found["method"], found["rate_mbit"]): found["error"] for found in rows}
    assert set(found) == {("GMC", 100), ("DDP", 100)}
    assert found["GMC", 100] == pytest.approx(0, abs=1e-9)
    assert found["DDP", 100] == pytest.approx(0.5)


def test_script(tmp_path):
    (tmp_path / "network-somewhere-2026-01-01.json").write_text(json.dumps(measured(1.2, 20.0)))
    done = scripts.run("-m", "benchmarks.training.scaling", "--output", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("scaling-*.json")
    content = json.loads(path.read_text())
    everything = content["count"]["all"]
    assert everything["set_ups"] == len(content["results"]) == 280
    assert sum(everything["fastest"].values()) == 280
    assert len(content["check"]["rows"]) == 2
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "predicted and measured" in done.stdout
