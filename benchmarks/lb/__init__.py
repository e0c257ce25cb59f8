"""The parts of ``benchmarks.bench_lb``: a stack of its own, lean clients, and one module per measurement."""
