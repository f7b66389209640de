"""Benchmarks, started from the root of the repository (python -m benchmarks.ops.kernels).

README.md says what each measures.
"""
