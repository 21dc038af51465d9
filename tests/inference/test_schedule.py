"""Calls are handed out in order, as many as fit, and none after a failure or a stop."""

import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from seg3d_monai.inference.schedule import Call, Terminated, run_calls, stop_on_sigterm


class ByHand:
    """Workers whose calls end when the test says so."""

    capacity = 3

    def __init__(self):
        self.submitted, self.open = [], {}

    def submit(self, method, *args):
        future = Future()
        self.submitted.append((method, *args))
        self.open[args[0]] = future
        return future


def calls(*numbers):
    return deque(Call("square", n, lambda n=n: (n,)) for n in numbers)


def test_no_more_than_the_capacity_is_in_flight_and_results_come_as_they_end():
    workers = ByHand()
    results = run_calls(workers, calls(1, 2, 3, 4, 5))
    with ThreadPoolExecutor(1) as reader:
        first = reader.submit(next, results)
        while len(workers.open) < 3:
            pass
        assert workers.submitted == [("square", 1), ("square", 2), ("square", 3)]
        workers.open.pop(2).set_result("two")
        call, result = first.result(10)
        assert (call.key, result) == (2, "two")
        second = reader.submit(next, results)
        while 4 not in workers.open:
            pass
        assert workers.submitted[3:] == [("square", 4)]
        workers.open.pop(1).set_result("one")
        assert second.result(10)[1] == "one"
        rest = reader.submit(lambda: sorted(result for _, result in results))
        for number in (3, 4, 5):
            while number not in workers.open:
                pass
            workers.open.pop(number).set_result(str(number))
        assert rest.result(10) == ["3", "4", "5"]


class Threads:
    """Workers in threads."""

    def __init__(self, capacity, function):
        self.capacity, self.function = capacity, function
        self.pool = ThreadPoolExecutor(capacity)

    def submit(self, method, *args):
        return self.pool.submit(self.function, *args)


def test_the_caller_may_add_calls_between_results():
    queue = calls(1)
    found = []
    for call, result in run_calls(Threads(2, lambda n: n * n), queue):
        found.append(result)
        if call.key < 4:
            queue.extend(calls(call.key + 1))
    assert found == [1, 4, 9, 16]


def test_nothing_begins_after_a_failure_and_what_runs_is_still_yielded():
    started, gate = [], threading.Event()

    def work(n):
        started.append(n)
        if n == 1:
            raise ValueError("one is bad")
        gate.wait(10)
        return n

    results = run_calls(Threads(2, work), calls(1, 2, 3, 4))
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    found = []
    with pytest.raises(ValueError, match="one is bad"):
        found.extend(result for _, result in results)
    assert sorted(started) == [1, 2]
    assert found in ([], [2])


def test_a_stop_is_an_error_only_if_something_is_left():
    found = []
    results = run_calls(Threads(1, lambda n: n), calls(1, 2, 3), lambda: bool(found))
    with pytest.raises(Terminated):
        found.extend(result for _, result in results)
    assert found == [1]
    assert list(run_calls(Threads(1, lambda n: n), deque(), lambda: True)) == []


def test_sigterm_sets_a_mark_and_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as is_stopping:
        assert not is_stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_stopping()
    assert signal.getsignal(signal.SIGTERM) is before
