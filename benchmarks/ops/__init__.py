"""What an op, a step and the host cost.

kernels     one op at a time: compress, merge, apply, and what a user would pick instead
step        the whole local step next to fused SGD
host        what the host spends on a step of many small tensors
gpu         everything that needs a GPU, in one command

options     the command line of kernels and step
cases       what is measured: one factor varied at a time
data        gradients by distribution, windows of a pool
problem     one case's tensors, and the three ops as stages of a round
budget      bytes that each op must move
timing      rounds in which everything takes its turn
peers       what a user would pick instead
cub_topk    the peer made of cub::DeviceTopK (cub_topk.cu)
launches    kernels launched, counted by the profiler
goals       the numbers to reach, next to what was measured
report      a line for each case, the goals, what was left out
roofline    the picture
session     one run of kernels or step, from the command line to the files
sanitizers  compute-sanitizer's four tools over the GPU tests, for gpu
"""
