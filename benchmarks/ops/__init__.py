"""What an op, a step and the host cost. benchmarks/README.md lists the files."""
