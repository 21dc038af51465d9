"""How long two workers take from the command to the end of their first iteration, as it appears in train.csv."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.engine.bars import Row
from bench.engine.bundle import MODEL, Options
from bench.models.training import BUNDLES, QUICK, QUICK_NETWORK

NUM_WORKERS, NUM_STARTS = 2, 2
POLL_S, PATIENCE_S = 0.02, 240.0
METHOD = (
    f"Start: python -m monai.bundle run training with --train_workers {NUM_WORKERS}, from the start of the command to "
    f"the first row of train.csv, written after each iteration here; an output_dir of its own, the data are there. "
    f"{NUM_STARTS} starts, of which the last counts: those before it warm the caches."
)


def measure(options: Options) -> list[Row]:
    """One row: seconds of each start."""
    workers, starts = (1, 1) if options.is_quick else (NUM_WORKERS, NUM_STARTS)
    runs = [start_once(options, options.folder / f"start_{number}", workers) for number in range(starts)]
    return [{"workers": workers, "runs_s": runs, "seconds": runs[-1]}]


def start_once(options: Options, folder: Path, workers: int) -> float:
    """Seconds until the first iteration of a training has ended; then it is stopped.

    Raises:
        RuntimeError: if it ends before, or does not get there.
    """
    folder.mkdir()
    config = BUNDLES / MODEL / "configs" / "train.json"
    changes = write_changes(options, config, folder / "run")
    changed = folder / "changes.json"
    changed.write_text(json.dumps(changes))
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--train_workers", str(workers)]
    command += ["--config_file", str([str(config), str(changed)])]
    with (folder / "output.txt").open("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not has_row(folder / "run" / "train.csv"):
                seconds = time.perf_counter() - start
                if process.poll() is not None or seconds > PATIENCE_S:
                    output.seek(0)
                    told = output.read()[-2000:]
                    raise RuntimeError(f"no iteration after {seconds:.0f} s, exit code {process.returncode}:\n{told}")
                time.sleep(POLL_S)
            return time.perf_counter() - start
        finally:
            end(process)


def write_changes(options: Options, config: Path, output_dir: Path) -> dict[str, Any]:
    """The changed ids: where things are, and a row of train.csv an iteration."""
    handlers = json.loads(config.read_text())["train"]["handlers"]
    (log,) = (n for n, handler in enumerate(handlers) if handler["_target_"].endswith(".CsvLog"))
    fixed = {"dataset_dir": str(options.data), "output_dir": str(output_dir), f"train#handlers#{log}#interval": 1}
    return fixed | (QUICK | QUICK_NETWORK[MODEL] if options.is_quick else {})


def has_row(path: Path) -> bool:
    """Whether a CSV file is there and has a line below its head."""
    return path.exists() and path.read_bytes().count(b"\n") >= 2


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a training as a user would, and its whole group if it does not listen."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
