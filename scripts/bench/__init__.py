"""Benchmark of the operators: what is compared with what stands in cases.py; `scripts/bench_ops` runs it."""
