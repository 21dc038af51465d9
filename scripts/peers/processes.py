"""Contestants as processes: each gets the threads that all get, and leaves what it said in a log."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
SHOWN = 4000


def keep_to(threads: int) -> None:
    """Let this process, and all that it starts from now on, use so many processors and no more."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def run(words: Sequence[str], *, threads: int, log: Path, python: Path | None = None) -> None:
    """Run `python -P WORDS` with the modules of the race importable.

    Args:
        words: what comes after `python -P`.
        threads: of every library that computes.
        log: file that all of its output is appended to.
        python: another interpreter than this one, which finds nothing else of this project.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    places = [str(SCRIPTS)]
    if python is None:
        places += [str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)} | dict.fromkeys(THREADS, str(threads))
    command = [str(python or sys.executable), "-P", *words]
    with log.open("ab") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")[-SHOWN:]
        raise RuntimeError(f"{' '.join(words[:3])} ended with exit code {done.returncode}:\n{said}")
