"""Several processes that train one model together, started and watched by Ray Train.

Each `TorchTrainer.fit` is one life of the group: Ray reserves the resources, starts the workers, initialises
`torch.distributed` and ends all of them when one ends badly. What ended it decides what follows. A mistake in the
config or a defect ends the training with the worker's own message; Ray Train alone would try it again like a failure.
When a worker, its machine or the way to it was lost, the group lives again and goes on from the last checkpoint.

The driver and the workers talk through a small actor, the desk: output of the first worker one way, the signal to stop
the other. Ray is imported in functions only. This file knows MONAI's config language and the names `output_dir`,
`resume`, `last.pt` and `train#trainer`, but no trainer.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.bundle import ConfigParser

from seg3d_monai.engine.launch import evaluate
from seg3d_monai.inference.ray_workers import connect, import_ray
from seg3d_monai.user_errors import one_line, user_error

__all__ = ["Job", "run_group", "run_in_worker"]

TRAINER = "train::trainer"  # where MONAI's bundles have it
POLL_S = 0.2
LOSS_PATIENCE_S = 3  # for Ray to see what a broken connection comes from
COLLECTIVE_TIMEOUT_S = 2 * 3600  # the others wait as long as the first worker validates
RAY_TRAIN = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean in the driver
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # output goes through the desk
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a machine that is taken away is a loss like another
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "45",  # a process that is alive but does not answer; Ray's own: 600
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # what is left of a broken group; Ray's own: 30
}
"""Settings that Ray Train takes from the environment only; a user's own are kept."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a worker gets, as plain data.

    Attributes:
        config: merged, with absolute paths; its lists `initialize` and `run` are evaluated.
        num_threads: of torch.
        log_level: of the root logger.
        log_format: formatter of the root logger; None where the driver's has no handler.
    """

    config: dict[str, Any]
    num_threads: int
    log_level: int
    log_format: logging.Formatter | None


def run_group(
    config: dict[str, Any],
    *,
    num_workers: int,
    gpus_per_worker: float | None,
    cpus_per_worker: int | None,
    address: str | None,
    max_failures: int,
    resource_timeout_s: float,
) -> None:
    """Run the lists `initialize` and `run` of a config in several processes until they are done.

    Output of the first worker appears on this process' stdout and stderr. SIGTERM and Ctrl-C are passed on to the
    trainer, as `trainer.stop(number)` in the first worker, and end at once what is not training; a second one acts
    here.

    Args:
        config: as `portable_config` returns it.
        num_workers: processes, >= 2.
        gpus_per_worker: as for `Launcher`, like the following.
        cpus_per_worker: CPUs and torch threads.
        address: None, "auto" or "host:port".
        max_failures: restarts.
        resource_timeout_s: seconds.

    Raises:
        ImportError: if Ray or a part of it is not installed.
        ValueError: if no cluster answers at the address, or it has no room for the workers.
        ChildProcessError: if workers died more often than max_failures.
        SystemExit: if the training ended early by a signal, with 128 + its number.

        A user's mistake in a worker is raised as the built-in exception that it is; everything else as a RuntimeError
        with the worker's traceback.
    """
    ray = import_ray()
    with ExitStack() as stack:
        stop = stack.enter_context(_FirstSignal())
        timeout = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(resource_timeout_s)}
        stack.enter_context(_environment({**RAY_TRAIN, **os.environ} | timeout))
        is_own = not ray.is_initialized()
        is_local = is_own and address is None
        cpus = cpus_per_worker or (max(1, (os.cpu_count() or 1) // num_workers) if is_local else 1)
        if is_own:
            stack.callback(ray.shutdown)
            connect(ray, address, num_cpus=num_workers * cpus)
            stop.listen()  # Ray has taken SIGTERM for itself
        gpus = float(ray.cluster_resources().get("GPU", 0) >= 1) if gpus_per_worker is None else gpus_per_worker
        room = _Room(ray, num_workers, cpus, gpus, resource_timeout_s)
        if is_local:
            room.check()
        storage = stack.enter_context(tempfile.TemporaryDirectory(prefix="seg3d-ray-"))
        desk = _make_desk(ray)
        root = logging.getLogger()
        job = Job(
            config=config,
            num_threads=cpus,
            log_level=root.level,
            log_format=next((handler.formatter for handler in root.handlers), None),
        )
        for failures in range(max_failures + 1):
            loss = _live(room, desk, job, stop, storage)
            if loss is None:
                return
            logger.warning("%s; loss %d, of which max_failures=%d are made good", loss, failures + 1, max_failures)
    raise ChildProcessError(
        f"{loss}; this was loss {max_failures + 1} of workers and max_failures={max_failures}; "
        "mend the cause or allow more, and go on with resume=true"
    )


def _live(room: _Room, desk: Any, job: Job, stop: _FirstSignal, storage: str) -> str | None:
    """Run one group to its end; returns what it was lost by, or None if the training is done."""
    ray = room.ray
    desk.open.remote()
    fit = _start(room.trainer(_work_function(ray, job, desk), storage).fit)
    while not fit.done():
        wait([fit], timeout=POLL_S)
        _print_output(ray, desk)
        if stop.number and not ray.get(desk.stop.remote(stop.number)):
            raise SystemExit(128 + stop.number)  # no worker has begun
    _print_output(ray, desk)
    code = ray.get(desk.exit_code.remote())
    if code is not None:
        raise SystemExit(code)
    error = fit.exception()
    loss = None if error is None else room.loss(error)
    if stop.number:
        raise SystemExit(128 + stop.number)
    return loss


class _Room:
    """The resources of a group on a cluster, and how it ends."""

    def __init__(self, ray: Any, num_workers: int, cpus: int, gpus: float, timeout_s: float) -> None:
        self.ray = ray
        self.num_workers = num_workers
        self.cpus = cpus
        self.gpus = gpus
        self.timeout_s = timeout_s

    def check(self) -> None:
        """See that a Ray of this machine alone, which cannot grow, has the GPUs."""
        if self.num_workers * self.gpus > self.ray.cluster_resources().get("GPU", 0):
            raise ValueError(self._lack(waited=False))

    def trainer(self, work: Any, storage: str) -> Any:
        """Ray Train's description of a group that runs a function in each worker."""
        try:
            from ray import train
            from ray.train.torch import TorchConfig, TorchTrainer
        except ImportError as error:
            raise ImportError(
                f'training in several processes needs Ray Train ({error}); pip install "seg3d_monai[cluster]"',
                name="ray.train",
            ) from error
        api: Any = train  # whose types are those of its first version
        switches = {name: value for name, value in os.environ.items() if name.startswith("SEG3D_")}
        return TorchTrainer(
            work,
            torch_config=TorchConfig(
                backend="nccl" if self.gpus >= 1 else "gloo",  # nccl does not share a GPU
                timeout_s=COLLECTIVE_TIMEOUT_S,
            ),
            scaling_config=api.ScalingConfig(
                num_workers=self.num_workers,
                use_gpu=self.gpus > 0,
                resources_per_worker={"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})},
            ),
            run_config=api.RunConfig(
                name="group",
                storage_path=storage,
                failure_config=api.FailureConfig(max_failures=0, controller_failure_limit=0),
                worker_runtime_env={"env_vars": switches},
            ),
        )

    def loss(self, error: BaseException) -> str:
        """What a group was lost by; raises what is no loss but a mistake, a defect or a lack of room."""
        from ray.exceptions import RayError
        from ray.train.v2._internal.exceptions import RayTrainError, WorkerGroupStartupTimeoutError
        from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

        if isinstance(error, ControllerError):
            if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                raise ValueError(self._lack()) from None
            return f"the workers could not be started ({_first_line(error.controller_failure)})"
        if not isinstance(error, WorkerGroupError):
            raise error
        failures = sorted(error.worker_failures.items())
        for rank, failure in failures:
            if isinstance(failure, RayError | RayTrainError):
                return f"worker {rank} was lost ({_death(failure)})"
        for _, failure in failures:
            if not isinstance(failure, ConnectionError):
                raise failure from None
        return _first_line(failures[0][1])

    def _lack(self, waited: bool = True) -> str:
        has, free = self.ray.cluster_resources(), self.ray.available_resources()
        nodes = sum(node["Alive"] for node in self.ray.nodes())
        after = f" after resource_timeout_s={self.timeout_s:g}" if waited else ""
        return (
            f"train_workers={self.num_workers}, cpus_per_worker={self.cpus}, gpus_per_worker={self.gpus:g} ask for "
            f"{self.num_workers * self.cpus} CPUs and {self.num_workers * self.gpus:g} GPUs; Ray has "
            f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs on {nodes} nodes, of which "
            f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free{after}; ask for less or enlarge the cluster"
        )


class _FirstSignal:
    """The number of the first SIGTERM or SIGINT since it was entered, else 0; a second one acts as before."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _FirstSignal:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    def listen(self) -> None:
        """Take both signals."""
        self._set(dict.fromkeys(self._before, self._remember))

    def _remember(self, number: int, frame: Any) -> None:
        self.number = number
        logger.warning("%s: stopping the workers", signal.Signals(number).name)
        signal.signal(number, self._before[number])

    def _set(self, handlers: Mapping[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are another's affair
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: before[name] for name in values.keys() & before.keys()})


def _start(call: Any) -> Future[Any]:
    """Call a function in a thread that does not keep this process alive: `fit` does not return for a signal."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="ray-train").start()
    return future


def _print_output(ray: Any, desk: Any) -> None:
    for name, text in ray.get(desk.take_output.remote()):
        stream = getattr(sys, name)
        stream.write(text)
        stream.flush()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _death(error: BaseException) -> str:
    """The telling lines of Ray's report of a dead or silent process, in one."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [
        line for line in lines if re.match(r"The actor is dead because|The node|A worker health check has", line)
    ]
    return " ".join(telling) or _first_line(error)


def _make_desk(ray: Any) -> Any:
    """The actor between driver and workers, on the driver's machine: it lives as long as the driver."""

    class Desk:  # defined in a function, so that Ray ships it by value
        def __init__(self) -> None:
            import asyncio

            self.output: list[tuple[str, str]] = []
            self.has_begun = False
            self.code: int | None = None
            self.first_checkpoint: Any = ()
            self.signal = 0
            self.signalled = asyncio.Event()

        async def open(self) -> None:
            self.has_begun, self.code = False, None

        async def begin(self) -> int:
            self.has_begun = True
            return self.signal

        async def write(self, name: str, text: str) -> None:
            self.output.append((name, text))

        async def take_output(self) -> list[tuple[str, str]]:
            output, self.output = self.output, []
            return output

        async def stop(self, number: int) -> bool:
            self.signal = number
            self.signalled.set()
            return self.has_begun

        async def wait_for_signal(self) -> int:
            await self.signalled.wait()
            return self.signal

        async def finish(self, code: int | None) -> None:
            self.code = code

        async def exit_code(self) -> int | None:
            return self.code

        async def checkpoint_before(self, found: Any) -> Any:
            if self.first_checkpoint == ():
                self.first_checkpoint = found
            return self.first_checkpoint

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote()


def _work_function(ray: Any, job: Job, desk: Any) -> Any:
    """What a worker runs, by value: the package may be importable there only with the driver's paths."""
    paths, folder = [os.path.abspath(path) for path in sys.path], os.getcwd()
    pickled = ray.cloudpickle.dumps(job)

    def work() -> None:
        import os
        import sys

        sys.path.extend(path for path in paths if path not in sys.path)
        if os.path.isdir(folder):
            os.chdir(folder)
        from ray import cloudpickle

        from seg3d_monai.engine.ray_launch import run_in_worker

        run_in_worker(cloudpickle.loads(pickled), desk)

    return work


class _DeskStream(io.TextIOBase):
    """Standard output or error of the first worker, shown by the driver."""

    def __init__(self, desk: Any, name: str) -> None:
        self._desk = desk
        self._name = name

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text:
            self._desk.write.remote(self._name, text)
        return len(text)


def run_in_worker(job: Job, desk: Any) -> None:
    """Run a job in a process whose `torch.distributed` is initialised.

    Raises:
        ConnectionError: if another worker was lost.
        Exception: a built-in one, for what goes wrong in the config.
    """
    ray = import_ray()
    is_first = dist.get_rank() == 0
    torch.set_num_threads(job.num_threads)
    with ExitStack() as stack:
        if is_first:
            stack.enter_context(redirect_stdout(_DeskStream(desk, "stdout")))
            stack.enter_context(redirect_stderr(_DeskStream(desk, "stderr")))
        _set_up_logging(job)
        code = None
        try:
            number = ray.get(desk.begin.remote())
            if number:
                raise SystemExit(128 + number)
            parser = ConfigParser(job.config)
            _resume(parser, desk)
            if is_first:
                stack.enter_context(_listening(parser, desk))
            evaluate(parser, "initialize")
            evaluate(parser, "run")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception as error:
            told = _portable(error)
            if isinstance(told, ConnectionError):
                time.sleep(LOSS_PATIENCE_S)
            elif dist.get_backend() == "gloo":
                dist.destroy_process_group()  # so that nobody waits for this one
            raise told from None
        if is_first:
            ray.get(desk.finish.remote(code))  # after all its output


def _set_up_logging(job: Job) -> None:
    """The driver's level and format, on what is now standard error."""
    root = logging.getLogger()
    root.setLevel(job.log_level)
    if job.log_format is not None:
        handler = logging.StreamHandler()
        handler.setFormatter(job.log_format)
        root.handlers = [handler]


def _resume(parser: ConfigParser, desk: Any) -> None:
    """Go on from the last checkpoint if a group before this one wrote it, not an older run."""
    ray = import_ray()
    box = [False]
    if dist.get_rank() == 0:
        try:
            status = (Path(parser.get_parsed_content("output_dir")) / "last.pt").stat()
            found: Any = (status.st_ino, status.st_mtime_ns, status.st_size)
        except OSError:
            found = None
        before = ray.get(desk.checkpoint_before.remote(found))  # of the first group what it has found itself
        box = [found not in (None, before)]
    dist.broadcast_object_list(box)
    if box[0]:
        logger.info("going on from the last checkpoint")
        parser["resume"] = True


@contextmanager
def _listening(parser: ConfigParser, desk: Any) -> Iterator[None]:
    """Pass a signal of the driver on to the trainer; end this process, and so the group, where none is running."""
    ray = import_ray()
    done = threading.Event()

    def listen() -> None:
        number = ray.get(desk.wait_for_signal.remote())
        trainer: Any = parser.ref_resolver.resolved_content.get(TRAINER)
        if not done.is_set() and (trainer is None or not trainer.stop(number)):
            os._exit(128 + number)

    threading.Thread(target=listen, daemon=True, name="signals").start()
    try:
        yield
    finally:
        done.set()


def _portable(error: Exception) -> Exception:
    """A built-in exception that says the same: the driver need not know any other, and causes are not sent."""
    where = f"worker {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}"
    chain = list(_causes(error))
    for cause in chain:
        if _is_loss(cause):
            return ConnectionError(f"{where} lost touch with another ({_first_line(cause)[:200]})")
    told = user_error(error) or next((cause for cause in chain if isinstance(cause, FloatingPointError)), None)
    if told is None:
        return RuntimeError(f"{where} failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
    text = one_line(told) if dist.get_rank() == 0 else f"{one_line(told)} ({where})"
    for kind in type(told).__mro__:
        if kind.__module__ == "builtins":
            try:
                return kind(text)
            except TypeError:  # UnicodeError's kinds take more than a text
                continue
    raise AssertionError(f"{type(told).__name__} has no built-in base")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_loss(error: BaseException) -> bool:
    """Whether an exception is how a lost worker, network or GPU shows itself to the others."""
    if isinstance(error, ConnectionError | dist.DistError | torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and re.search(r"\b(gloo|nccl)\b", str(error), re.IGNORECASE) is not None
