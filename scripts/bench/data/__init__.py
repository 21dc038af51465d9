"""Benchmarks of the data layer; see scripts/bench_data."""
