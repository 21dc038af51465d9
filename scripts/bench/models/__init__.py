"""Benchmark of the models' training: time of a step, peak memory; `scripts/bench_models` runs it."""
