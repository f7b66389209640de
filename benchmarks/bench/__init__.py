"""The parts of benchmarks/kernels.py and benchmarks/step.py.

options     the command line
cases       what is measured: one factor varied at a time
data        gradients by distribution, windows of a pool
problem     one case's tensors, and the three ops as stages of a round
budget      bytes that each op must move
timing      rounds in which everything takes its turn
peers       what a user would pick instead
cub_topk    the peer made of cub::DeviceTopK (cub_topk.cu)
launches    kernels launched, counted by the profiler
goals       the numbers to reach, next to what was measured
report      a line for each case, the table, the JSON file
roofline    the picture
session     one run, from the command line to the files
sanitizers  compute-sanitizer's four tools over the GPU tests, for benchmarks/gpu.py
logical_workers  training with p workers in one process, for benchmarks/convergence.py
"""

import sys
from pathlib import Path

# Where compare_methods (argument types, provenance) and build_toolkit are.
_ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(_ROOT / "examples"), str(_ROOT / "tools")]
