"""Work in fresh processes: one for itself, or several that meet in `torch.distributed` over gloo, on this machine."""

import multiprocessing
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=3)
"""How long a process waits for another one."""


def in_processes(size: int, threads: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns in each of several fresh processes, in the order of their ranks.

    They come from a fork server, which has imported everything and computed nothing.

    Args:
        size: number of processes; one alone does not initialise `torch.distributed`.
        threads: CPU threads of torch in each.
        folder: where they meet.
        function: importable by name; called with the arguments, and returning plain data or arrays.
        arguments: plain data.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.engine.turns"])
    meeting = folder / f"meeting_{uuid.uuid4().hex}"
    with ProcessPoolExecutor(size, mp_context=context) as pool:
        jobs = [pool.submit(_work, rank, size, threads, meeting, function, arguments) for rank in range(size)]
        for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
            job.result()  # raises what ended the first of them
        return [job.result() for job in jobs]


def _work(
    rank: int, size: int, threads: int, meeting: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about names that DeepSpeed uses
    torch.set_num_threads(threads)
    if size == 1:
        return function(*arguments)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()  # so that nobody waits for one that failed
