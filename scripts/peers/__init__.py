"""A race between this package and what users would try instead; see scripts/compare_peers."""
