"""Workers on Ray: calls come back as if made directly, whatever happens to the processes that make them."""

import importlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from process_table import descendants, is_alive

from seg3d_monai.inference.ray_workers import MAX_DEATHS, RayWorkers
from seg3d_monai.inference.workers import UnreadableBlockError

NUM_WORKERS = 2
WAIT = 120  # seconds; far more than a call takes, for a busy machine


class Recorder:
    """A worker that notes in a folder what happens to it, a line an event."""

    def __init__(self, folder):
        self.folder = folder
        note(folder / "made", os.getpid())

    def scale(self, array, factor):
        array *= factor  # in place: the worker owns what it gets
        return array

    def hold(self, name):
        note(self.folder / name, os.getpid())
        wait_until((self.folder / f"{name}.go").exists)
        return name

    def die(self, name):
        note(self.folder / name, os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self, name, error):
        note(self.folder / name, os.getpid())
        raise error

    def num_threads(self):
        return torch.get_num_threads()

    def unpicklable(self):
        return threading.Lock()


def note(path, value):
    with path.open("a") as file:
        file.write(f"{value}\n")


def notes(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_until(holds, seconds=WAIT):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def hold_all(workers, folder, prefix):
    """Calls in flight in each process while as many are under way as there may be."""
    names = [f"{prefix}{number}" for number in range(workers.capacity)]
    calls = [workers.submit("hold", name) for name in names]
    wait_until(lambda: all(notes(folder / name) for name in names))  # and none has ended
    for name in names:
        (folder / f"{name}.go").touch()
    assert [call.result(WAIT) for call in calls] == names
    return Counter(process for name in names for process in notes(folder / name))


def free_cpus():
    return ray.available_resources().get("CPU", 0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", r"no Ray cluster answers at address '127\.0\.0\.1:9': .*refused"),
        ("ray://head:10001", r"address is 'ray://head:10001'; pass \"auto\", \"host:port\" or None"),
        ("head", "address is 'head'"),
    ],
)
def test_no_cluster_at_the_address(address, message):
    assert not ray.is_initialized()
    with pytest.raises(ValueError, match=message):
        RayWorkers(dict, num_workers=1, num_threads=1, address=address)


@pytest.fixture(scope="module")
def local_ray():
    context = ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=2**28, log_to_driver=False
    )
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # so that workers need not import it and all that it imports
    yield context.address_info["gcs_address"]
    ray.cloudpickle.unregister_pickle_by_value(module)
    ray.shutdown()


@pytest.fixture(scope="module")
def shared(local_ray, tmp_path_factory):
    """(two workers, their folder)."""
    folder = tmp_path_factory.mktemp("shared")
    with RayWorkers(partial(Recorder, folder), num_workers=NUM_WORKERS, num_threads=1) as workers:
        yield workers, folder
    assert ray.is_initialized()  # this connection is not theirs to end


def test_each_process_makes_one_worker_and_runs_two_calls_at_a_time(shared):
    workers, folder = shared
    assert workers.capacity == 4
    processes = hold_all(workers, folder, "first")
    assert sorted(processes.values()) == [2, 2]
    assert sorted(notes(folder / "made")) == sorted(processes)


def test_results_equal_direct_calls(shared):
    workers, _ = shared
    arrays = [np.arange(3 * 50 * 70 * n, dtype=np.float32).reshape(n, 3, 50, 70) for n in (0, 1, 20)]
    calls = {factor: workers.submit("scale", arrays[factor % 3], factor) for factor in range(12)}
    for factor in reversed(calls):
        found = calls[factor].result(WAIT)
        np.testing.assert_array_equal(found, arrays[factor % 3] * factor)
        assert found.flags.writeable


def test_no_call_waits_behind_a_slow_one(shared):
    workers, folder = shared
    slow = workers.submit("hold", "slow")
    quick = [workers.submit("scale", np.ones(1), n) for n in range(3 * workers.capacity)]
    assert [float(call.result(WAIT)[0]) for call in quick] == list(range(12))
    assert not slow.done()
    (folder / "slow.go").touch()
    assert slow.result(WAIT) == "slow"


@pytest.mark.parametrize(
    "error", [ValueError("halo is -1"), KeyError("a"), UnreadableBlockError(7, "torn"), torch.OutOfMemoryError("full")]
)
def test_exceptions_of_a_method_arrive_as_they_are_and_once(shared, error):
    workers, folder = shared
    name = type(error).__name__
    found = workers.submit("fail", name, error).exception(WAIT)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
    assert len(notes(folder / name)) == 1
    assert "in fail" in str(found.__cause__)  # where it happened in the other process


@pytest.mark.parametrize(
    ("method", "args", "kind", "message"),
    [
        ("unpicklable", (), TypeError, "cannot pickle"),
        ("scale", (threading.Lock(), 1), TypeError, "cannot pickle"),
        ("no_such_method", (), AttributeError, "no_such_method"),
    ],
)
def test_calls_that_cannot_be_made_fail_alone(shared, method, args, kind, message):
    workers, _ = shared
    with pytest.raises(kind, match=message):
        workers.submit(method, *args).result(WAIT)
    assert float(workers.submit("scale", np.ones(1), 3).result(WAIT)[0]) == 3


def test_a_killed_process_is_replaced_and_its_calls_done_again(shared):
    workers, folder = shared
    num_made = len(notes(folder / "made"))
    calls = [workers.submit("hold", name) for name in "abcd"]
    wait_until(lambda: all(notes(folder / name) for name in "abcd"))
    before = {name: notes(folder / name)[0] for name in "abcd"}
    os.kill(int(before["b"]), signal.SIGKILL)
    for name in "abcd":
        (folder / f"{name}.go").touch()
    assert [call.result(WAIT) for call in calls] == list("abcd")
    for name in "abcd":
        again = notes(folder / name)[1:]
        assert len(again) == (before[name] == before["b"])
        assert before["b"] not in again
    wait_until(lambda: len(notes(folder / "made")) == num_made + 1)


def test_a_call_that_kills_every_process_fails_alone(shared):
    workers, folder = shared
    factors = itertools.count()
    others = [workers.submit("scale", np.ones(1), next(factors)) for _ in range(3)]
    deadly = workers.submit("die", "deadly")
    others += [workers.submit("scale", np.ones(1), next(factors)) for _ in range(8)]
    with pytest.raises(RuntimeError, match=r"^die\('deadly'\) has ended its worker process 3 times .*fewer workers"):
        deadly.result(WAIT)
    assert [float(call.result(WAIT)[0]) for call in others] == list(range(11))
    assert len(set(notes(folder / "deadly"))) == MAX_DEATHS
    wait_until(lambda: sum(worker.is_ready for worker in workers._workers) == NUM_WORKERS)
    assert len(hold_all(workers, folder, "last")) == NUM_WORKERS


def test_thread_count_and_end(local_ray, tmp_path):
    free = free_cpus()
    workers = RayWorkers(partial(Recorder, tmp_path), num_workers=1, num_threads=2, calls_per_worker=1)
    assert workers.submit("num_threads").result(WAIT) == 2
    running = workers.submit("hold", "running")
    waiting, unwanted = workers.submit("die", "waiting"), workers.submit("die", "unwanted")
    wait_until(lambda: notes(tmp_path / "running"))
    assert free_cpus() == free - 2
    assert unwanted.cancel()
    workers.close()
    with pytest.raises(RuntimeError, match=r"hold\('running'\) was given up"):
        running.result(0)
    assert waiting.cancelled()
    assert not notes(tmp_path / "waiting")
    with pytest.raises(RuntimeError, match="closed"):
        workers.submit("num_threads")
    workers.close()
    pid = int(notes(tmp_path / "made")[0])
    wait_until(lambda: not is_alive(pid) and free_cpus() == free)


def test_workers_import_what_the_driver_can(local_ray, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("class Adder:\n    def add(self, a, b):\n        return a + b\n")
    monkeypatch.syspath_prepend(tmp_path)
    adder = importlib.import_module("only_here").Adder
    with RayWorkers(adder, num_workers=1, num_threads=1) as workers:
        assert workers.submit("add", 2, 3).result(WAIT) == 5


def refuse(folder):
    note(folder / "tried", os.getpid())
    raise FileNotFoundError("no weights at model.pt")


def test_what_make_worker_raises_is_raised(local_ray, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no weights at model\.pt$"):
        RayWorkers(partial(refuse, tmp_path), num_workers=1, num_threads=1)
    assert len(notes(tmp_path / "tried")) == 1


def test_a_worker_that_always_dies_while_made(local_ray, tmp_path):
    def deadly():
        note(tmp_path / "tried", os.getpid())
        os._exit(1)

    with pytest.raises(RuntimeError, match="3 worker processes died while they made their worker"):
        RayWorkers(deadly, num_workers=1, num_threads=1)
    assert len(set(notes(tmp_path / "tried"))) == MAX_DEATHS


def make_once(folder):
    if notes(folder / "made"):
        raise FileNotFoundError("the weights are gone")
    return Recorder(folder)


def test_the_last_worker_cannot_be_started_anew(local_ray, tmp_path):
    make_worker = partial(make_once, tmp_path)
    with RayWorkers(make_worker, num_workers=1, num_threads=1, calls_per_worker=1) as workers:
        for call in [workers.submit("die", "dead"), workers.submit("num_threads")]:
            with pytest.raises(FileNotFoundError, match="the weights are gone"):
                call.result(WAIT)
        with pytest.raises(RuntimeError, match="no worker is left: the weights are gone"):
            workers.submit("num_threads")


def test_more_than_ray_has_is_an_error(local_ray):
    with pytest.raises(ValueError, match="ask for 64 CPUs and 0 GPUs; Ray has 4 CPUs and 0 GPUs"):
        RayWorkers(dict, num_workers=2, num_threads=32, start_timeout=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0"),
        ({"num_threads": 1.5}, "num_threads is 1.5"),
        ({"calls_per_worker": True}, "calls_per_worker is True"),
        ({"gpus_per_worker": -1}, "gpus_per_worker is -1"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RayWorkers(dict, **{"num_workers": 1, "num_threads": 1} | options)


def test_a_worker_that_cannot_be_shipped():
    with pytest.raises(TypeError, match=r"make_worker .* cannot be pickled"):
        RayWorkers(threading.Lock().acquire, num_workers=1, num_threads=1)


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "seg3d_monai\[cluster\]"'):
        RayWorkers(dict, num_workers=1, num_threads=1)


DRIVER = """
import sys, time
import ray
from seg3d_monai.inference.ray_workers import RayWorkers

class Adder:
    def add(self, a, b):
        return a + b

for address in sys.argv[1:]:
    with RayWorkers(Adder, num_workers=1, num_threads=1, address=address or None) as workers:
        print(workers.submit("add", 1, 2).result(), flush=True)
        sys.stdin.readline()
    print(ray.is_initialized(), flush=True)
"""


def test_a_cluster_is_left_alone_and_ray_of_ones_own_ends_with_its_driver(local_ray):
    free = free_cpus()
    command = [sys.executable, "-c", DRIVER, local_ray, "", ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def close():
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "False\n"

        assert process.stdout.readline() == "3\n"
        assert free_cpus() == free - 1
        close()
        wait_until(lambda: free_cpus() == free)

        assert process.stdout.readline() == "3\n"
        assert free_cpus() == free
        closed = descendants(process.pid)
        assert len(closed) >= 3  # the worker and what Ray itself runs
        close()
        wait_until(lambda: not any(map(is_alive, closed)), 20)

        assert process.stdout.readline() == "3\n"
        # Two small agents of Ray try for a minute to reach the dead control process before they end by themselves.
        orphaned = {pid for pid in descendants(process.pid) if "Agent" not in Path(f"/proc/{pid}/cmdline").read_text()}
        assert len(orphaned) >= 3
        process.kill()
        wait_until(lambda: not any(map(is_alive, orphaned)), 20)
