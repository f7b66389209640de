"""`python -m gmc_cuda.info`."""

import subprocess
import sys

import torch

import gmc_cuda
from gmc_cuda import info


def test_command_reports_and_passes():
    command = [sys.executable, "-m", "gmc_cuda.info"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
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


def test_a_device_that_the_binary_does_not_run_on_fails(monkeypatch, capsys):
    def no_image(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    class Card:
        name, major, minor, multi_processor_count, L2_cache_size = "Card", 9, 0, 132, 50 << 20

    step = info.check_step
    monkeypatch.setattr(info, "build_config", {**info.build_config, "with_cuda": True, "cuda": ""})
    monkeypatch.setattr(info, "check_step", lambda to: step(to) if to == "cpu" else no_image())
    for name, value in {
        "init": None, "is_available": True, "device_count": 1, "get_device_properties": Card
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert info.main() == 1
    printed = capsys.readouterr().out
    assert "cuda:0 Card, capability 9.0, 132 multiprocessors, 50 MiB L2\n" in printed
    assert "cuda:0 against its closed form: failed: RuntimeError: CUDA error: no kernel" in printed


def test_why_there_is_no_device_is_said(monkeypatch):
    def missing():
        raise RuntimeError("Found no NVIDIA driver on your system. Please\nmore")

    monkeypatch.setattr(info, "build_config", {**info.build_config, "with_cuda": True})
    monkeypatch.setattr(torch.cuda, "init", missing)
    expected = ["no device: Found no NVIDIA driver on your system. Please"]
    assert info.describe_devices() == expected
