"""Benchmark of the training engine: its cost, DeepSpeed, workers, gradients, memory; `scripts/bench_engine` runs it."""
