"""What a method does to training: its loss and its time. benchmarks/README.md lists the files."""
