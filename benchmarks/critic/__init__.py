"""The parts of ``benchmarks.bench_critic``: servers in processes, lean clients, and one module per measurement."""
