"""Runs killed by SIGKILL at random moments: the same command goes on to the same bytes and repeats no finished block.

The moment is uniform over the time that an undisturbed run takes from the call of `predict_volume` to the end of its
process, so every phase is hit as often as it is long. Run as a module, this file is the command that is killed.
"""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.inference.bars import Row
from bench.inference.options import Options
from bench.inference.stacks import SPACING_UM, ThresholdPredictor, blob_tile, write_tiled
from seg3d_monai.inference import predict_volume
from seg3d_monai.inference.journal import Journal

KILLS = {1: 14, 2: 6}
QUICK_KILLS = {1: 1}
"""Number of workers -> runs that are killed."""
SHAPE, QUICK_SHAPE, TILE = (64, 192, 224), (32, 96, 112), (64, 96, 112)
PITCH, CHUNKS = (16, 24, 28), (32, 48, 56)
GRID: dict[str, Any] = {"block_size": (16, 50, 60), "halo": (5, 10, 12)}
PAUSE_S = 0.05
METHOD = (
    "Kills: a run's process gets SIGKILL at a moment drawn uniformly over an undisturbed run's duration, then the same "
    "command runs to its end. Different: a file of OUTPUT or the table differs from the undisturbed run's. Repeated: a "
    "block that was finished, or that was not in flight, at the kill was handed out again."
)


@dataclass(frozen=True)
class Progress:
    """What a run's journal says.

    Attributes:
        done: blocks that are finished.
        starts: how many times each block was handed out.
    """

    done: frozenset[int]
    starts: dict[int, int]

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Read a copy of the journal: to open the journal itself would repair it, which is the next run's task."""
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in folder.glob("x.journal.sqlite*"):
            shutil.copy(file, copy)
        with Journal(copy / "x.journal.sqlite") as journal:
            return cls(frozenset(journal.blocks_in_state("done")), journal.starts())


def num_repeated(killed: Progress, resumed: Progress) -> int:
    """Blocks that were handed out oftener than they had to be.

    A block that was handed out but not finished at the kill was in flight and may be handed out once more; a finished
    one may not, and one that had not been handed out is handed out once.
    """
    return sum(
        count > killed.starts.get(block, 0) + (block not in killed.done) for block, count in resumed.starts.items()
    )


def measure(options: Options) -> list[Row]:
    """One row for each number of workers."""
    folder, is_quick = options.folder, options.is_quick
    shape = QUICK_SHAPE if is_quick else SHAPE
    stack = write_tiled(folder / "kills_stack.zarr", blob_tile(TILE, PITCH), shape, CHUNKS)
    return [
        measure_killed(folder, stack, num_workers, num_kills)
        for num_workers, num_kills in (QUICK_KILLS if is_quick else KILLS).items()
    ]


def measure_killed(folder: Path, stack: Path, num_workers: int, num_kills: int) -> Row:
    """Runs with some number of workers, each of them killed once."""
    whole = folder / f"kills_{num_workers}"
    duration = run_command(stack, whole, num_workers)
    expected, blocks = digests(whole), Progress.read(whole).done
    rng = np.random.default_rng([0, num_workers])
    different = repeated = in_flight = 0
    moments: list[float] = []
    phases: Counter[str] = Counter()
    for number in range(num_kills):
        killed_folder = folder / f"kills_{num_workers}_{number}"
        moments.append(float(rng.uniform(0, duration)))
        run_command(stack, killed_folder, num_workers, kill_after_s=moments[-1])
        killed = Progress.read(killed_folder)
        run_command(stack, killed_folder, num_workers)
        different += digests(killed_folder) != expected
        repeated += num_repeated(killed, Progress.read(killed_folder))
        in_flight += sum(count > 0 and block not in killed.done for block, count in killed.starts.items())
        phases[phase_of(killed, len(blocks))] += 1
        shutil.rmtree(killed_folder)
    return {
        "num_workers": num_workers,
        "num_kills": num_kills,
        "num_blocks": len(blocks),
        "undisturbed_s": duration,
        "moments_s": moments,
        "phases": dict(phases),
        "num_in_flight": in_flight,
        "num_different": different,
        "num_repeated": repeated,
    }


def phase_of(killed: Progress, num_blocks: int) -> str:
    """Where a run was when it was killed."""
    if not killed.done:
        return "before the first block was done"
    return "predicting" if len(killed.done) < num_blocks else "stitching and painting"


def run_command(stack: Path, folder: Path, num_workers: int, kill_after_s: float | None = None) -> float:
    """Run the command to its end or to its kill; seconds since it has called `predict_volume`.

    Args:
        stack: the input.
        folder: of the output; made if it is not there.
        num_workers: processes that predict.
        kill_after_s: when SIGKILL is sent; None lets the command end.

    Raises:
        RuntimeError: if the command fails by itself.
    """
    folder.mkdir(exist_ok=True)
    words = [str(stack), str(folder / "x.zarr"), str(num_workers)]
    command = [sys.executable, "-P", "-m", "bench.inference.kills", *words]
    with (
        (folder / "stderr").open("w+") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()  # it is about to call
        start = time.perf_counter()
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        seconds = time.perf_counter() - start
        if process.wait() not in (0, -signal.SIGKILL):
            stderr.seek(0)
            raise RuntimeError(f"the command failed: {stderr.read()[-2000:]}")
    return seconds


def digests(folder: Path) -> dict[str, str]:
    """Every file of OUTPUT and the table, with the digest of its bytes."""
    files = [*folder.glob("x.instances.*"), *(folder / "x.zarr").rglob("*")]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }


def main() -> None:
    """The command: input, output, number of workers."""
    stack, output, num_workers = sys.argv[1:]
    torch.set_num_threads(1)
    print("calls predict_volume", flush=True)
    predictor = ThresholdPredictor(PAUSE_S)
    predict_volume(stack, predictor, output, num_workers=int(num_workers), spacing=SPACING_UM, progress=False, **GRID)


if __name__ == "__main__":
    main()
