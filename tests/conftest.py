"""For all tests: Ray's processes get as much of a CPU as others beside them, and the longest files come first."""

import os

import pytest

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 leaves them a thirtieth of what the others get

LONG_FILES = ("test_ray_zero3.py", "test_sanitizers.py", "test_cuda_compiles.py", "test_bench_engine.py")
"""Minutes each: begun last, one of them would keep a single processor busy while the others have nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others in their order."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))
