"""Benchmark of crowded and anisotropic volumes: found against true nuclei; `scripts/bench_stress` runs it."""
