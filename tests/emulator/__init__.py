"""CUDA kernels on the CPU; README.md says how."""
