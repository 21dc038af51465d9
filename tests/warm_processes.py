"""Fresh processes that find torch, MONAI and the package imported: forks of one process that imports them once.

Each has a folder, environment, output and exit code of its own, as a command of the shell has, and begins at once
instead of after many seconds of imports. Not for tests of what happens before: the order of imports, variables that
libraries read when they are loaded, the time of a start.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

START_METHOD = "forkserver"
PROCESSES = multiprocessing.get_context(START_METHOD)
PACKAGE = "seg3d_monai"
ROOMS = ("backbones", "data", "engine", "heads", "inference", "layers", "losses", "matching", "models", "ops", "report")
PROCESSES.set_forkserver_preload(["monai.bundle", "monai.engines", *(f"{PACKAGE}.{room}" for room in ROOMS)])


def run_module(name: str, *arguments: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Do as `python -m name arguments...` in a folder.

    Raises:
        subprocess.TimeoutExpired: if it does not end within so many seconds; it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / stream for stream in ("stdout", "stderr")]
        process = PROCESSES.Process(target=_run, args=(name, arguments, cwd, dict(os.environ), outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([name, *arguments], timeout, *(path.read_bytes() for path in outputs))
        return subprocess.CompletedProcess(
            [name, *arguments], process.exitcode, *(path.read_text() for path in outputs)
        )


def _run(name: str, arguments: tuple[str, ...], folder: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())  # multiprocessing would print a traceback whatever the hook
        raise SystemExit(1) from None
