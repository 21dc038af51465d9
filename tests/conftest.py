"""For all tests: Ray's processes get as much of a CPU as others beside them, the longest files come first, and no test
leaves another one its handlers of logging.
"""

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 leaves them a thirtieth of what the others get

LONG_FILES = ("test_ray_zero3.py", "test_sanitizers.py", "test_cuda_compiles.py", "test_bench_engine.py")
"""Minutes each: begun last, one of them would keep a single processor busy while the others have nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others in their order."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


@pytest.fixture(autouse=True)
def handlers_of_logging() -> Iterator[None]:
    """Take away what a test adds, such as a bundle's logging.conf: its stream is the test's, and closed after it."""
    before = set(_handlers())
    yield
    for logger, handler in set(_handlers()) - before:
        if not type(handler).__module__.startswith("_pytest"):
            logger.removeHandler(handler)


def _handlers() -> Iterator[tuple[logging.Logger, logging.Handler]]:
    known = (one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger))
    for logger in (logging.root, *known):
        for handler in logger.handlers:
            yield logger, handler
