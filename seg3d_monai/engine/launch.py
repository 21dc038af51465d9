"""Where a bundle's training runs: in this process, or in several that are started for it, here or on a cluster.

A bundle names a `Launcher` in its lists: `setup` builds what the training needs, `run` trains. With one worker both
are evaluated where they stand. With more, the process that was started builds nothing: `run` sends the merged config,
as plain data, to the workers, and each of them runs it from its `initialize` list on. Processes that something else
started together (torchrun) are such workers too. How they are started is ray_launch.py's; this file knows neither
models nor data nor Ray.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.bundle import ConfigParser
from monai.bundle.utils import ID_SEP_KEY

from seg3d_monai.engine.config import ENTRY_POINTS, live_parser, live_workflow

__all__ = ["Launcher", "evaluate", "join_processes", "portable_config"]

_PATH_KEY = re.compile(r"(^|_)(dir|root|file|path|weights|checkpoint|db)s?$")


class Launcher:
    """Run the lists of a bundle's config in this process or in workers, as plain values of the config say.

    Args:
        output_dir: folder of the run, on a file system that all workers share.
        train_workers: processes that train together, >= 1; with 1 it is this one.
        gpus_per_worker: GPUs of each; a part of one shares it. None takes 1 where the cluster has GPUs, else 0.
        cpus_per_worker: CPUs and torch threads of each. None shares out this machine's CPUs; in a cluster it takes 1.
        address: "" starts Ray on this machine for as long as the training takes; "auto" or "host:port" joins a cluster.
        max_failures: how often all workers are started again, from the last checkpoint, after one or its machine died.
        resource_timeout_s: seconds to wait for CPUs and GPUs of a cluster, at each start.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        output_dir: str | Path,
        train_workers: int = 1,
        gpus_per_worker: float | None = None,
        cpus_per_worker: int | None = None,
        address: str | None = "",
        max_failures: int = 3,
        resource_timeout_s: float = 600.0,
    ) -> None:
        _require(_is_count(train_workers, 1), "train_workers", train_workers, "an integer >= 1")
        _require(
            gpus_per_worker is None or _is_number(gpus_per_worker, 0), "gpus_per_worker", gpus_per_worker, "0 or more"
        )
        _require(
            cpus_per_worker is None or _is_count(cpus_per_worker, 1),
            "cpus_per_worker",
            cpus_per_worker,
            "an integer >= 1",
        )
        _require(_is_count(max_failures, 0), "max_failures", max_failures, "an integer >= 0")
        _require(_is_number(resource_timeout_s, 1), "resource_timeout_s", resource_timeout_s, "seconds >= 1")
        self.output_dir = Path(output_dir)
        self.train_workers = train_workers
        self.gpus_per_worker = gpus_per_worker
        self.cpus_per_worker = cpus_per_worker
        self.address = address or None
        self.max_failures = max_failures
        self.resource_timeout_s = resource_timeout_s

    @property
    def trains_elsewhere(self) -> bool:
        """Whether this process only starts the workers."""
        return self.train_workers > 1 and not dist.is_initialized()

    def setup(self, id: str) -> None:
        """Evaluate a list of the config where the training runs, in the first worker before the others.

        So what it writes, the index of crops for instance, is written once and then found; nothing in the list may
        wait for other workers.

        Args:
            id: of the list.

        Raises:
            ValueError: if the workers do not see the same output_dir.
        """
        if self.trains_elsewhere:
            return
        if not dist.is_initialized():
            evaluate(live_parser(), id)
            return
        check_shared(self.output_dir)
        for is_turn in (dist.get_rank() == 0, dist.get_rank() != 0):
            if is_turn:
                evaluate(live_parser(), id)
            dist.barrier()

    def run(self, id: str) -> None:
        """Evaluate a list of the config in this process, or start the workers, each of which runs the whole config.

        Args:
            id: of the list.

        Raises:
            TypeError: if the config has to be sent and holds more than plain data.
            SystemExit: if the training ended early by a signal, with 128 + its number.

        What goes wrong in a worker is raised as `ray_launch.run_group` describes it.
        """
        parser = live_parser()
        if not self.trains_elsewhere:
            evaluate(parser, id)
            return
        from seg3d_monai.engine.ray_launch import run_group

        config = portable_config(parser.get())
        if (workflow := live_workflow()) is not None:  # the workers know no other names
            for given, name in ((workflow.init_id, "initialize"), (workflow.run_id, "run")):
                config[name] = config.get(given, [])
                if given not in ENTRY_POINTS:
                    config.pop(given, None)
        run_group(
            config,
            num_workers=self.train_workers,
            gpus_per_worker=self.gpus_per_worker,
            cpus_per_worker=self.cpus_per_worker,
            address=self.address,
            max_failures=self.max_failures,
            resource_timeout_s=self.resource_timeout_s,
        )


def join_processes() -> None:
    """Join the processes that torchrun started with this one, through nccl where each has a GPU, else through gloo.

    Without torchrun, or where they are joined already, nothing happens. Call it first in a bundle's `initialize` list.

    Raises:
        ValueError: if there are fewer GPUs on this machine than processes, but some.
    """
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    if torch.cuda.is_available():
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise ValueError(f"process {local} of this machine finds {found} GPUs; start as many processes as GPUs")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)


def evaluate(parser: ConfigParser, id: str) -> None:
    """Evaluate a list of a config entry by entry, as MONAI's ConfigWorkflow does; nothing if there is no such id."""
    if id not in parser:
        return
    is_list = isinstance(parser[id], list)
    for entry in [f"{id}{ID_SEP_KEY}{i}" for i in range(len(parser[id]))] if is_list else [id]:
        parser.get_parsed_content(entry)
        parser.ref_resolver.remove_resolved_content(entry)


def portable_config(config: Any, key: str = "") -> Any:
    """Copy a config so that it means the same in another folder and on another machine that has the same files.

    A plain string becomes an absolute path where its key ends with the word dir, root, file, path, weights, checkpoint
    or db, or where it has a slash and exists. Keys that begin with "_" and expressions stay as they are: what is made
    of paths in an expression begins with one of these.

    Args:
        config: dictionaries, lists, strings, numbers, paths.
        key: id of this part, for messages.

    Raises:
        TypeError: for anything else, with its id.
    """
    if isinstance(config, dict):
        return {
            name: value if str(name).startswith("_") else portable_config(value, f"{key}#{name}" if key else str(name))
            for name, value in config.items()
        }
    if isinstance(config, list | tuple):
        values = [portable_config(value, f"{key}#{i}") for i, value in enumerate(config)]
        return tuple(values) if isinstance(config, tuple) else values
    if isinstance(config, os.PathLike):
        return os.path.abspath(config)
    if isinstance(config, str):
        return os.path.abspath(config) if _is_path(key, config) else config
    if config is None or isinstance(config, bool | int | float):
        return config
    raise TypeError(
        f"{key} is a {type(config).__name__}, which cannot be sent to other processes; "
        "write it as plain data (_target_), or train with train_workers=1"
    )


def check_shared(folder: Path) -> None:
    """See that all processes of a group mean the same folder; all of them call it.

    Raises:
        ValueError: if the first process cannot write there or another does not find what it wrote.
    """
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        name = f".shared-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
            told = [name, None]
        except OSError as error:
            told = [None, f"output_dir={str(folder)!r} cannot be written ({error}); choose another folder"]
    dist.broadcast_object_list(told)
    name, fault = told
    if fault is not None:
        raise ValueError(fault)
    file = folder / name
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (file.is_file() and file.read_text() == name, socket.gethostname(), str(folder)))
    if dist.get_rank() == 0:
        file.unlink()
    lost = [f"worker {i} on {host} ({path})" for i, (sees, host, path) in enumerate(found) if not sees]
    if lost:
        _, host, path = found[0]
        raise ValueError(
            f"output_dir is not shared: what worker 0 on {host} writes to {path} is not seen by {', '.join(lost)}; "
            "choose a folder on a file system that all nodes mount at the same place"
        )


def _is_path(key: str, text: str) -> bool:
    if not text or text.startswith(("$", "@", "%", "~")) or "://" in text:
        return False
    words = [word for word in key.split("#") if not word.isdigit()]
    return bool(words and _PATH_KEY.search(words[-1])) or ("/" in text and os.path.exists(text))


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= least


def _require(condition: bool, name: str, value: Any, mend: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} cannot be used; give {mend}")
