"""The parts of ``benchmarks.bench_queue``: payloads, throughput, codecs, and the cost of a killed consumer."""
