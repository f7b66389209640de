"""Waits that csrc/cuda needs between its kernels: where one comes too late, compress is wrong."""

import numpy as np
import pytest
import torch

from emulator.compilation import BUILD, CUDA_SOURCES, HERE, build
from emulator.kernel_ops import SMALL, Kernels
from emulator.program import KernelFault, Program
from gmc_cuda import ops
from support.cases import assert_same_bytes

WAIT = "  wait_for_previous();\n"
OUTCOME = "  const Outcome outcome = control->outcome;\n"
CLEAR = """\
#pragma unroll 1
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < kClearedWords;
       i += gridDim.x * kThreads)
    workspace.pass_bins[i] = 0;
"""
COUNT = "  clear_bins<kFields>(shared.fields);\n"
# What the kernels of csrc/cuda/select.cu say, and what is planted there.
PLANTED = {
    "refine reads too early": [(WAIT + OUTCOME, OUTCOME + WAIT)],
    "emit writes too early": [
        (CLEAR, ""),
        (WAIT + "  int scale", CLEAR + WAIT + "  int scale"),
    ],
    "count does not wait": [(COUNT + WAIT, COUNT)],
}


def program(flavour, planted=None):
    sources = sorted((CUDA_SOURCES / "cuda").glob("*.cu"))
    if planted is not None:
        original = CUDA_SOURCES / "cuda" / "select.cu"
        text = original.read_text()
        for old, new in PLANTED[planted]:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        for name in ("block.cuh", "compress.h", "launch.h", "tile.cuh"):
            text = text.replace(f'#include "{name}"', f'#include "cuda/{name}"')
        changed = BUILD / planted.replace(" ", "_") / original.name
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text("// clang-format off\n" + text)
        sources[sources.index(original)] = changed
    defines = [f"{name}={value}" for name, value in SMALL.items()]
    sources.append(HERE / "kernel_cases.cpp")
    return Program(build(sources, flavour, defines=defines, include=[CUDA_SOURCES]))


def check(running, seed):
    """Three calls of compress_; the last has no state, so that its workspace begins as junk."""
    numel, k = 3000, 40
    rng = np.random.default_rng(seed)
    kernels = Kernels(running, seed)
    mine, theirs = torch.zeros(numel), torch.zeros(numel)
    kept, other = kernels.select_state(numel, k), ops.select_state(numel, k, "cpu")
    for states in ((kept, other), (kept, other), (None, None)):
        grad = torch.from_numpy(rng.standard_normal(numel).astype(np.float32))
        payload = kernels.compress_(mine, [grad], k, state=states[0])
        expected = ops.compress_(theirs, [grad], k, state=states[1])
        assert_same_bytes(payload, expected, "payload")
        assert_same_bytes(mine, theirs, "memory")


def red(planted, flavour, seeds):
    """How many of the seeds end with a wrong result or a fault, and the last fault's report."""
    count, report = 0, ""
    with program(flavour, planted) as running:
        for seed in seeds:
            try:
                check(running, seed)
            except AssertionError:
                count += 1
            except KernelFault as fault:
                count, report = count + 1, str(fault)
    return count, report


@pytest.mark.parametrize("planted", PLANTED)
def test_some_orders_show_a_wait_that_comes_too_late(planted):
    assert red(planted, "plain", range(1, 31))[0] >= 3


@pytest.mark.parametrize("planted", PLANTED)
def test_the_thread_sanitizer_sees_a_wait_that_comes_too_late(planted):
    count, report = red(planted, "thread", range(2))
    assert count == 2
    assert "data race" in report or planted == "count does not wait"


def test_a_launch_that_never_waits_is_reported():
    with program("plain", "count does not wait") as running:
        for seed in range(3):
            with pytest.raises(KernelFault, match=r"never called .*\n +kernel .*count_kernel"):
                check(running, seed)
