"""The parts of ``benchmarks.bench_queue``: payloads, throughput, codecs, and what a killed consumer costs."""
