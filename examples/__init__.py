"""Examples; the demo among them is a package, whose parts the benchmarks use too."""
