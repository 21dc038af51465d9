"""Benchmark of whole-stack inference: seams, time, memory, workers, kills; `scripts/bench_inference` runs it."""
