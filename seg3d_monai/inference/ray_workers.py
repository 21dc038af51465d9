"""Worker processes on Ray, on this machine or on a cluster, that each hold one worker object.

A call that loses its process (killed, out of memory, node gone) is done again elsewhere, which is sound only for calls
that may be repeated; predicting a block is one. The driver keeps the queue, so no call waits behind a slow one. Ray is
imported here and nowhere else (Moritz et al. 2018, "Ray: A Distributed Framework for Emerging AI Applications"). This
file knows neither blocks nor predictors.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

MAX_DEATHS = 3  # of the processes that run one call, or that make one worker
CONNECT_TIMEOUT = 10  # seconds
OBJECT_STORE_BYTES = 256 * 2**20  # arguments and results on their way; a container's shared memory is often small

_log = logging.getLogger(__name__)


class RayWorkers:
    """Processes, local or on a cluster, that each hold one worker object.

    A process that dies is started anew and its calls are done again, on another process if one is free. Whoever was
    in flight when a process died may have killed it, so such a call then has a process to itself: after three deaths
    the culprit is certain.

    Args:
        make_worker: makes the worker object; called once in each process. Pickled by value where it or its class is
            defined in the driver's script; else the module must be found there on the driver's `sys.path`.
        num_workers: processes.
        address: None starts Ray on this machine and ends it on `close`; "auto" or "host:port" joins a running cluster,
            which has the package installed. Where the process is connected to Ray already, that connection is used.
        num_threads: torch threads and CPUs of each worker; results depend on it bit by bit.
        gpus_per_worker: GPUs of each worker, which sees no others; fractions share one.
        calls_per_worker: calls that run in one process at a time, in threads: the worker object takes its own locks.
        start_timeout: seconds to wait for the CPUs and GPUs of a worker.

    Raises:
        ImportError: if Ray is not installed.
        TypeError: if make_worker cannot be pickled.
        ValueError: if a number is out of range, no cluster answers at the address, or it has no room for the workers.
        RuntimeError: if a process dies repeatedly while its worker is made.

        What make_worker raises is raised as it is.
    """

    def __init__(
        self,
        make_worker: Callable[[], Any],
        *,
        num_workers: int,
        address: str | None = None,
        num_threads: int,
        gpus_per_worker: float = 0,
        calls_per_worker: int = 2,
        start_timeout: float = 120,
    ) -> None:
        for name, count in (
            ("num_workers", num_workers),
            ("num_threads", num_threads),
            ("calls_per_worker", calls_per_worker),
        ):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count!r}; pass an integer of at least 1")
        if gpus_per_worker < 0:
            raise ValueError(f"gpus_per_worker is {gpus_per_worker}; pass 0 or more")
        self.num_workers = num_workers
        self.num_threads = num_threads
        self.gpus_per_worker = gpus_per_worker
        self.calls_per_worker = calls_per_worker
        self.start_timeout = start_timeout
        self._ray = import_ray()
        try:
            pickled = self._ray.cloudpickle.dumps(make_worker)
        except Exception as error:
            raise TypeError(f"make_worker {make_worker!r} cannot be pickled: {error}; pass a picklable one") from error
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._waiting: deque[_Call] = deque()
        self._closed = False
        self._failure: BaseException | None = None
        self._threads = ThreadPoolExecutor(self.capacity, thread_name_prefix="ray-workers")
        self._is_own_connection = not self._ray.is_initialized()
        try:
            if self._is_own_connection:
                connect(self._ray, address, num_cpus=num_workers * num_threads)
            paths = [os.path.abspath(path) for path in sys.path]
            self._setup = self._ray.put((paths, num_threads, pickled))
            self._actor_class = self._ray.remote(_actor_class()).options(
                num_cpus=num_threads, num_gpus=gpus_per_worker, max_concurrency=calls_per_worker
            )
            for start in as_completed([self._threads.submit(self._start_worker) for _ in range(num_workers)]):
                start.result()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        """Calls worth having in flight."""
        return self.num_workers * self.calls_per_worker

    def submit(self, method: str, *args: Any) -> Future[Any]:
        """Run `getattr(worker, method)(*args)` in the process that has the fewest calls in flight.

        Args:
            method: name of a method of the worker object.
            args: its arguments; like the result they are pickled, so each side owns its arrays.

        Returns:
            A future of the result. It fails with what the method raised, or with a RuntimeError if the call took three
            processes with it, the workers were closed, or none could be started anew.

        Raises:
            RuntimeError: if the workers were closed or none is left.
        """
        call = _Call(method, args)
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers are closed; make new ones")
            if self._failure is not None:
                raise RuntimeError(f"no worker is left: {self._failure}") from self._failure
            self._waiting.append(call)
            self._hand_out()
        return call.future

    def close(self) -> None:
        """End the processes; calls that wait are cancelled, calls in flight fail with a RuntimeError."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            workers, self._workers = self._workers, []
        for call in waiting:
            if not call.future.cancel():
                call.future.set_exception(RuntimeError(f"{call} was given up: the workers were closed"))
        for worker in workers:
            self._kill(worker)
        self._threads.shutdown()
        if self._is_own_connection:
            self._ray.shutdown()

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_out(self) -> None:
        """Give the waiting calls in their order to workers with room. The lock is held."""
        while self._waiting:
            call = self._waiting[0]
            share = self.calls_per_worker if call.deaths else 1
            worker = min((w for w in self._workers if w.is_ready), key=lambda w: w.load, default=None)
            if worker is None or worker.load + share > self.calls_per_worker:
                return
            self._waiting.popleft()
            if call.begin():
                worker.load += share
                self._threads.submit(self._run, worker, call, share)

    def _run(self, worker: _Worker, call: _Call, share: int) -> None:
        """See one call through, in a thread of its own."""
        pickle, errors = self._ray.cloudpickle, self._ray.exceptions
        try:
            self._check_connected()
            # Pickled here, not by Ray: its arrays are read-only and stay in the object store for as long as they live.
            result = pickle.loads(self._ray.get(worker.actor.call.remote(call.method, pickle.dumps(call.args))))
        except errors.RayTaskError as error:
            call.future.set_exception(_cause(error))
        except errors.RayError as error:
            self._recover(worker, call, error)
        except BaseException as error:  # such as arguments that cannot be pickled
            call.future.set_exception(error)
        else:
            call.future.set_result(result)
        finally:
            with self._lock:
                worker.load -= share
                self._hand_out()

    def _recover(self, worker: _Worker, call: _Call, error: BaseException) -> None:
        """Put a call that lost its process back in front, and replace the process if no other call did."""
        if self._remove(worker):
            _log.warning("a worker process died and is started anew: %s", str(error).splitlines()[0])
            self._threads.submit(self._replace_worker)
        call.deaths += 1
        with self._lock:
            if call.deaths < MAX_DEATHS and not self._closed and self._failure is None:
                self._waiting.appendleft(call)
                return
            if self._closed:
                message = f"{call} was given up: the workers were closed"
            elif call.deaths < MAX_DEATHS:
                message = f"{call} lost its worker process and no other is left: {self._failure}"
            else:
                message = (
                    f"{call} has ended its worker process {MAX_DEATHS} times (out of memory is the usual cause); "
                    "try again with fewer workers or smaller blocks"
                )
        failure = RuntimeError(message)
        failure.__cause__ = error
        call.future.set_exception(failure)

    def _start_worker(self) -> None:
        """Start a process, and once more if it dies while it makes its worker."""
        ray = self._ray
        for attempt in range(MAX_DEATHS):
            with self._lock:
                if self._closed:
                    return
                self._check_connected()
                worker = _Worker(self._actor_class.remote())
                self._workers.append(worker)
            try:
                if not ray.wait([worker.actor.is_placed.remote()], timeout=self.start_timeout)[0]:
                    raise ValueError(self._describe_lack())
                ray.get(worker.actor.make.remote(self._setup))
            except BaseException as error:
                self._remove(worker)
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise error.cause from error
                if not isinstance(error, ray.exceptions.RayError):
                    raise
                if attempt == MAX_DEATHS - 1:
                    raise RuntimeError(
                        f"{MAX_DEATHS} worker processes died while they made their worker (out of memory is the usual "
                        "cause); try again with fewer workers"
                    ) from error
            else:
                with self._lock:
                    worker.is_ready = True
                    self._hand_out()
                return

    def _replace_worker(self) -> None:
        try:
            self._start_worker()
        except Exception as error:
            with self._lock:
                num_left = len(self._workers)
                if num_left == 0:
                    self._failure = error
                    lost, self._waiting = self._waiting, deque()
            if num_left > 0:
                _log.warning("a worker could not be started anew; going on with %d: %s", num_left, error)
                return
            for call in lost:
                if call.begin():
                    call.future.set_exception(error)

    def _remove(self, worker: _Worker) -> bool:
        """End a process; False if that was done already."""
        with self._lock:
            if worker not in self._workers:
                return False
            self._workers.remove(worker)
        self._kill(worker)  # it may be out of reach rather than dead
        return True

    def _kill(self, worker: _Worker) -> None:
        if self._ray.is_initialized():
            self._ray.kill(worker.actor)

    def _check_connected(self) -> None:
        # Without this, Ray would start a new local instance on its own at the next call.
        if not self._ray.is_initialized():
            raise RuntimeError("Ray was shut down while its workers were in use; close them first")

    def _describe_lack(self) -> str:
        has, free = self._ray.cluster_resources(), self._ray.available_resources()
        return (
            f"num_workers={self.num_workers}, num_threads={self.num_threads}, gpus_per_worker={self.gpus_per_worker:g} "
            f"ask for {self.num_workers * self.num_threads} CPUs and {self.num_workers * self.gpus_per_worker:g} GPUs; "
            f"Ray has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs, of which {free.get('CPU', 0):g} and "
            f"{free.get('GPU', 0):g} are free after {self.start_timeout:g} s; ask for less or enlarge the cluster"
        )


@dataclass(eq=False)
class _Worker:
    """One process, from its start to its death; `load` counts its calls."""

    actor: Any
    load: int = 0
    is_ready: bool = False


@dataclass(eq=False)
class _Call:
    """One call; `deaths` counts the processes that it was in when they died."""

    method: str
    args: tuple[Any, ...]
    deaths: int = 0
    future: Future[Any] = field(default_factory=Future)

    def begin(self) -> bool:
        """Whether its result is still wanted; from then on it cannot be cancelled."""
        return self.deaths > 0 or self.future.set_running_or_notify_cancel()

    def __str__(self) -> str:
        arguments = ", ".join(map(repr, self.args))
        return f"{self.method}({arguments if len(arguments) <= 200 else arguments[:200] + '...'})"


def _actor_class() -> type:
    # Defined in a function, so that Ray ships it by value: nothing of this package can be imported before `make` has
    # given the process the driver's sys.path, and a process is placed before it has loaded torch.
    class WorkerProcess:
        def is_placed(self) -> bool:
            return True

        def make(self, setup: tuple[list[str], int, bytes]) -> None:
            import sys

            paths, num_threads, make_worker = setup
            sys.path.extend(path for path in paths if path not in sys.path)

            import torch
            from ray import cloudpickle

            torch.set_num_threads(num_threads)
            self.worker = cloudpickle.loads(make_worker)()

        def call(self, method: str, args: bytes) -> bytes:
            from ray import cloudpickle

            return cloudpickle.dumps(getattr(self.worker, method)(*cloudpickle.loads(args)))

    return WorkerProcess


def _cause(error: Any) -> BaseException:
    """What a method raised, out of Ray's envelope, which stays its cause for the traceback in the other process."""
    cause: BaseException = error.cause
    cause.__cause__ = error
    return cause


def import_ray() -> Any:
    """The module `ray`.

    Raises:
        ImportError: if it is not installed, with the extra that brings it.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('workers on Ray need ray; pip install "seg3d_monai[cluster]"', name="ray") from error
    return ray


def connect(ray: Any, address: str | None, *, num_cpus: int) -> None:
    """Start Ray on this machine, where it ends with the driver even if that is killed, or join a cluster."""
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unless its user says so
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # else an idle process for each CPU asked for
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # one heap for all threads of a worker: data/freed_memory.py
        ray.init(
            address="local",  # None would join a cluster named by RAY_ADDRESS
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
        return
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdigit() and "/" not in host):
        raise ValueError(f'address is {address!r}; pass "auto", "host:port" or None')
    try:
        if host:  # Ray itself would try for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no Ray cluster answers at address {address!r}: {error}; start one with `ray start --head`, or pass None"
        ) from error
