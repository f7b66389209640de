"""`python -m gmc_cuda.info`."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import gmc_cuda
from gmc_cuda import info


def test_command_reports_and_passes():
    command = [sys.executable, "-m", "gmc_cuda.info"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "ok"
    for title in ("gmc_cuda", "torch", "distributed", "CUDA", "self-check"):
        assert any(line.startswith(title) for line in lines)
    assert f"{torch.__version__}, " in done.stdout
    assert "closed form: ok" in done.stdout


def test_a_step_that_is_wrong_fails(monkeypatch, capsys):
    class Dense(torch.optim.SGD):
        def __init__(self, params, lr, momentum, density):
            super().__init__(params, lr)
            for p in self.param_groups[0]["params"]:
                self.state[p]["memory"] = torch.zeros_like(p)

    monkeypatch.setattr(gmc_cuda, "GMC", Dense)
    assert info.main() == 1
    printed = capsys.readouterr().out
    assert "failed: the parameters are not w - lr * sent; the memory is not" in printed
    assert printed.endswith("failed\n")


def test_an_exception_is_reported_not_raised(monkeypatch, capsys):
    monkeypatch.setattr(gmc_cuda, "GMC", lambda *_, **__: 1 / 0)
    assert info.main() == 1
    assert "failed: ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_missing_kernels_are_said_and_no_failure(monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("gmc_cuda has no CUDA kernels yet\nmore")

    monkeypatch.setattr(gmc_cuda, "GMC", missing)
    line, passed = info.check("cpu")
    assert passed
    assert line.endswith("not available: gmc_cuda has no CUDA kernels yet")


@pytest.mark.parametrize("error", ["", "no kernel image is available for execution on the device"])
def test_a_device_that_the_binary_does_not_run_on_fails(monkeypatch, error):
    device = {
        "name": "Card",
        "capability": (9, 0),
        "multiprocessors": 132,
        "l2_bytes": 50 << 20,
        "error": error,
    }
    found = {"runtime": 13020, "error": "", "devices": [device]}
    monkeypatch.setattr(info, "extension", SimpleNamespace(devices=lambda: found))
    monkeypatch.setattr(info, "build_config", {**info.build_config, "with_cuda": True})
    lines, healthy = info.describe_devices()
    assert healthy == (not error)
    assert lines[1].startswith("cuda:0 Card, capability 9.0, 132 multiprocessors, 50 MiB L2")
    assert error in lines[1]


@pytest.mark.gpu
def test_probe_kernel_runs_on_every_device():
    found = info.extension.devices()
    assert len(found["devices"]) == torch.cuda.device_count()
    for index, device in enumerate(found["devices"]):
        assert device["error"] == ""
        assert device["capability"] == torch.cuda.get_device_capability(index)
