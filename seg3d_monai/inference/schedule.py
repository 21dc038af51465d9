"""Calls of workers: handed out one by one as workers become free, stopped in good order.

This file knows neither blocks nor the journal.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

_log = logging.getLogger(__name__)


class Workers(Protocol):
    """Threads or processes that hold a worker object each."""

    @property
    def capacity(self) -> int:
        """Calls worth having in flight."""
        ...

    def submit(self, method: str, *args: Any) -> Future[Any]:
        """Call a method of a worker object."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class Terminated(SystemExit):
    """The run was asked to end by SIGTERM and has done so; exit code 143."""

    def __init__(self) -> None:
        super().__init__(143)

    def __str__(self) -> str:
        return "ended by SIGTERM after the blocks in hand; the same command goes on from here"


@dataclass(frozen=True)
class Call:
    """A call that waits for a worker.

    Attributes:
        method: method of the worker object.
        key: what the caller knows the call by.
        arguments: makes the arguments when the call is handed out.
    """

    method: str
    key: Any
    arguments: Callable[[], tuple[Any, ...]]


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM, as a queue sends it at its time limit, only sets a mark: yields a function that reads it."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread can receive signals
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def run_calls(
    workers: Workers, queue: deque[Call], is_stopping: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Call, Any]]:
    """Hand calls out in order and yield (call, result) in any order of completion.

    The caller may add to the queue between two results. After a failure, and when the run is stopping, nothing more is
    handed out, but what is in flight is still yielded.

    Raises:
        Terminated: if the run stopped before the queue was empty.
        Exception: what a call raised, the first one.
    """
    running: dict[Future[Any], Call] = {}
    failure: BaseException | None = None
    while True:
        while queue and len(running) < workers.capacity and failure is None and not is_stopping():
            call = queue.popleft()
            running[workers.submit(call.method, *call.arguments())] = call
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            call = running.pop(future)
            error = future.exception()
            if error is None:
                yield call, future.result()
            else:
                failure = failure or error
    if failure is not None:
        raise failure
    if queue:
        _log.warning("%s", Terminated())
        raise Terminated
