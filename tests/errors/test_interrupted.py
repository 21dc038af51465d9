"""Ctrl-C for every command that writes, and SIGTERM where it is documented (predict, train).

Real signals, sent in the middle: exit code 130 or 143, one line, no output that looks whole, and the same command gives
what it gives without them.

Elsewhere: SIGTERM without the command line and SIGKILL at every few files (tests/inference/test_predict_faults.py,
test_predict_resume.py, tests/data/test_convert_kill.py), an import that is killed (tests/annotation/test_import.py), a
training that is told to stop, alone and under Ray (tests/engine/test_checkpoint.py, test_ray_launch.py).
"""

import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import error_toys
import pytest
from error_toys import PREDICT, SPACING, TRAIN, changed, listing, with_changes
from full_disk import FullDisk
from test_full_disk import COMMANDS, is_allowed
from warm_processes import PROCESSES

from seg3d_monai.cli import main

Capsys = pytest.CaptureFixture[str]
SECONDS = 120


class Interruption(FullDisk):
    """Sends this process Ctrl-C at the first write, which is done all the same."""

    def take(self, size: int) -> None:
        self.failures += 1
        if self.failures == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train",)])
def test_ctrl_c_at_the_first_write(name: str, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    words, _, output, allowed = COMMANDS[name]
    before = listing(place)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        Interruption(patch, place)
        assert main(words) == 130
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1] == "seg3d: interrupted"
    assert "Traceback" not in shown
    left = {path for path in changed(before, listing(place)) if not is_allowed(path, allowed)}
    assert left <= {f"run/tuning{end}" for end in ("/config.json", "/environment.json")} | {"run/crops.sqlite"}
    assert not output or not (place / output).exists()
    assert main(words) == 0
    assert not output or (place / output).exists()
    assert [path for path in listing(place) if ".partial" in path and not path.startswith("half.zarr")] == []


def test_ctrl_c_while_an_index_is_built(place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from seg3d_monai.data import crop_index_build

    words = ["index", "data/manifest.csv", "x.sqlite", "--num_workers", "1"]
    before = listing(place)
    with monkeypatch.context() as patch:
        patch.setattr(crop_index_build, "_write_index", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "seg3d: interrupted"
    assert changed(before, listing(place)) == {"x.sqlite.building"}
    assert main(words) == 0
    assert changed(before, listing(place)) == {"x.sqlite"}


class Slow(error_toys.Toy):
    """A detector that notes each block and takes its time."""

    def forward(self, images):  # type: ignore[no-untyped-def]
        with Path("blocks.log").open("a") as file:
            file.write("block\n")
        time.sleep(0.2)
        return super().forward(images)


SLOW = with_changes(
    ["predict", "image.tif", "x.zarr", *PREDICT, "--spacing", SPACING],
    *("--network_def", '{"_target_": "test_interrupted.Slow", "backbone": "@backbone", "num_classes": "@num_classes"}'),
    *("--block_size", "[6,9,8]", "--halo", "[0,0,4]"),
)
NUM_BLOCKS = 9


def command(words: list[str], folder: str, log: str) -> None:
    """A process of its own."""
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(words))


def started(words: list[str], place: Path, log: Path) -> BaseProcess:
    process = PROCESSES.Process(target=command, args=(words, str(place), str(log)))
    process.start()
    return process


def wait_for(file: Path, process: BaseProcess, least: int = 1) -> None:
    """Until a file has so many lines."""
    end = time.monotonic() + SECONDS
    while not file.is_file() or len(file.read_bytes().splitlines()) < least:
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_prediction_that_is_told_to_stop_goes_on(number: int, code: int, place: Path, tmp_path: Path) -> None:
    process = started(SLOW, place, tmp_path / "log")
    wait_for(place / "blocks.log", process, least=2)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(SECONDS)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == code, said
    assert "Traceback" not in said
    assert not (place / "x.zarr").exists()
    assert not (place / "x.instances.parquet").exists()
    done = len((place / "blocks.log").read_text().splitlines())
    assert 2 <= done < NUM_BLOCKS
    assert main(SLOW) == 0
    seen = len((place / "blocks.log").read_text().splitlines())
    # Ctrl-C leaves the blocks in hand; SIGTERM finishes them.
    assert NUM_BLOCKS <= seen <= NUM_BLOCKS + (1 if number == signal.SIGTERM else 3)
    stopped = listing(place / "x.zarr")
    assert main([*with_changes(SLOW, "--num_workers", "1"), "--restart"]) == 0
    assert listing(place / "x.zarr") == stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_that_is_told_to_stop_goes_on(number: int, code: int, place: Path, tmp_path: Path) -> None:
    words = with_changes(TRAIN, "--train#trainer#max_epochs", "100000", "--val_interval", "1", "--max_minutes", "10")
    process = started(words, place, tmp_path / "log")
    wait_for(place / "new" / "validation.csv", process, least=2)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(SECONDS)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == code, said
    assert "Traceback" not in said
    assert (place / "new" / "last.pt").is_file()
    assert not (place / "new" / "metrics.json").exists()
    steps = len((place / "new" / "validation.csv").read_text().splitlines())
    more = with_changes(words, "--train#trainer#max_epochs", str(steps + 3), "--resume", "True")
    assert main(more) == 0
    assert (place / "new" / "metrics.json").is_file()
    assert len((place / "new" / "validation.csv").read_text().splitlines()) > steps
