"""A run that is stopped anywhere goes on where it was, to the same bytes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from inference_toys import Logging, blank, tissue_seeds, tree_digest, voronoi

import seg3d_monai
from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import predict_volume
from seg3d_monai.inference.blocks import Block
from seg3d_monai.inference.journal import Journal
from seg3d_monai.inference.run import Run
from seg3d_monai.inference.writer import LabelWriter

SHAPE = (14, 40, 300)  # a pyramid of two levels
TRUTH = voronoi(tissue_seeds(SHAPE, (7, 14, 50), seed=2), (0, 0, 0, *SHAPE))
GRID = {"block_size": (6, 18, 150), "halo": (2, 4, 3), "progress": False}
NUM_BLOCKS = 18


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Digest and table of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    done = predict_volume(blank(SHAPE), Logging(TRUTH, folder / "log"), folder / "x.zarr", **GRID)
    return tree_digest(done.output), done.table.read_bytes()


def check_same(folder, whole):
    assert tree_digest(folder / "x.zarr") == whole[0]
    assert (folder / "x.instances.parquet").read_bytes() == whole[1]
    assert not (folder / "x.zarr.partial").exists()


@pytest.mark.parametrize(("fail_at", "num_workers"), [(0, 1), (1, 1), (11, 1), (11, 2)])
def test_a_failed_prediction_goes_on(tmp_path, whole, fail_at, num_workers):
    predictor = Logging(TRUTH, tmp_path / "log", fail_at=fail_at)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", num_workers=num_workers, **GRID)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "log") == ["x.journal.sqlite"]
    finished = len(predictor.calls())
    predictor.fail_at = None
    done = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    assert done.num_predicted == NUM_BLOCKS - finished
    assert len(predictor.calls()) == len(set(predictor.calls())) == NUM_BLOCKS
    check_same(tmp_path, whole)


STOPS = [
    (Run, "stitch", 0),
    (LabelWriter, "create", 0),
    (LabelWriter, "write", 0),
    (LabelWriter, "write", 7),
    (Journal, "store_painted", 5),
    (LabelWriter, "build_tile", 0),
    (Journal, "store_tiles", 0),
    (LabelWriter, "publish", 0),
    *((Journal, "set_fact", after) for after in range(3, 10)),  # the first three begin the run
]


@pytest.mark.parametrize(("owner", "name", "after"), STOPS)
def test_stopped_after_prediction(tmp_path, whole, monkeypatch, owner, name, after):
    original, calls = getattr(owner, name), []

    def stop(self, *args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    predictor = Logging(TRUTH, tmp_path / "log")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    done = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    assert done.num_predicted == 0
    assert len(predictor.calls()) == NUM_BLOCKS
    check_same(tmp_path, whole)
    assert predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID).already_finished


def test_painted_blocks_and_tiles_are_not_made_again(tmp_path, whole, monkeypatch):
    predictor = Logging(TRUTH, tmp_path / "log")
    written = []

    def note(name, limit):
        original = getattr(LabelWriter, name)

        def method(self, *args):
            if len(written) >= limit:
                raise KeyboardInterrupt
            written.append(
                (name, *(a.index if isinstance(a, Block) else a for a in args if not isinstance(a, np.ndarray)))
            )
            return original(self, *args)

        return method

    for limit in (5, 12, NUM_BLOCKS + 1, 1000):
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            for name in ("write", "build_tile"):
                patch.setattr(LabelWriter, name, note(name, limit))
            predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    check_same(tmp_path, whole)
    assert len(set(written)) > NUM_BLOCKS
    assert len(written) <= len(set(written)) + 3 * 2  # two calls may be in flight at a stop


RESULTS = ["x.zarr", "x.instances.parquet", "x.instances.csv", "x.labels.tif"]


@pytest.mark.parametrize("lost", [[name] for name in RESULTS] + [RESULTS[1:3], RESULTS])
def test_only_a_lost_result_is_made_again(tmp_path, lost):
    def predict():
        options = {"table": "parquet,csv", "label_tiff": True} | GRID
        return predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **options)

    def contents():
        return {path: digest for path, digest in tree_digest(tmp_path).items() if path.startswith(tuple(RESULTS))}

    def made():
        """Which file each result is: one that is written again is another."""
        return {name: ((tmp_path / name).stat().st_ino, (tmp_path / name).stat().st_mtime_ns) for name in RESULTS}

    predictor = Logging(TRUTH, tmp_path / "log")
    predict()
    before, first = contents(), made()
    (tmp_path / "elsewhere").mkdir()
    for name in lost:
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert not predict().already_finished
    assert contents() == before
    assert [name for name, file in made().items() if file != first[name]] == lost
    assert len(predictor.calls()) == NUM_BLOCKS
    assert predict().already_finished


RUN = """
import sys, time
import numpy as np
from inference_toys import Logging, blank
from seg3d_monai.inference import predict_volume

class Slow(Logging):
    def __call__(self, block, roi):
        found = super().__call__(block, roi)
        time.sleep(0.1)
        return found

    def identity(self):
        return {"name": "logging"}

if __name__ == "__main__":
    truth = np.load("truth.npy")
    predict_volume(blank(truth.shape), Slow(truth, "log"), "x.zarr", (6, 18, 150), (2, 4, 3), int(sys.argv[1]))
"""


def test_kill_9_and_resume(tmp_path, whole):
    num_workers = 2
    np.save(tmp_path / "truth.npy", TRUTH)
    (tmp_path / "run.py").write_text(RUN)
    paths = [Path(__file__).parent, Path(seg3d_monai.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "run.py", str(num_workers)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        log = Logging(TRUTH, tmp_path / "log")
        until = time.monotonic() + 120
        while len(log.calls()) < 5 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    begun = len(log.calls())
    assert 5 <= begun < NUM_BLOCKS
    assert not (tmp_path / "x.zarr").exists()
    time.sleep(0.5)  # workers end with their driver; the block in hand may still be noted
    done = predict_volume(blank(SHAPE), log, tmp_path / "x.zarr", **GRID)
    # only blocks in flight (two a worker) are predicted again
    assert NUM_BLOCKS - begun <= done.num_predicted <= NUM_BLOCKS - begun + 2 * num_workers
    check_same(tmp_path, whole)
    with Journal(tmp_path / "x.journal.sqlite") as journal:
        starts = journal.starts()
    assert len(starts) == NUM_BLOCKS
    assert sum(starts.values()) <= NUM_BLOCKS + 2 * num_workers


KILLED_WHILE_WRITING = """
import os, sys
from pathlib import Path
import numpy as np
from inference_toys import Logging, blank
from seg3d_monai.inference import predict_volume

left, replace = int(sys.argv[1]), Path.replace

def replace_or_die(self, target):  # how zarr ends the writing of a file
    global left
    if "c" in Path(target).parts:
        left -= 1
        if left < 0:
            os._exit(9)
    return replace(self, target)

truth = np.load("truth.npy")
Path.replace = replace_or_die
predict_volume(blank(truth.shape), Logging(truth, "log"), "x.zarr", (6, 18, 150), (2, 4, 3))
"""


@pytest.mark.parametrize("after", [5, NUM_BLOCKS])
def test_a_file_that_was_being_written_leaves_nothing(tmp_path, whole, after):
    """After all blocks it is a file of the coarser level."""
    np.save(tmp_path / "truth.npy", TRUTH)
    paths = [Path(__file__).parent, Path(seg3d_monai.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths)}
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(after)]
    assert subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL).returncode == 9
    assert list((tmp_path / "x.zarr.partial").rglob("*.partial"))
    predict_volume(blank(SHAPE), Logging(TRUTH, tmp_path / "log"), tmp_path / "x.zarr", **GRID)
    check_same(tmp_path, whole)


def test_without_shards_there_is_a_file_for_each_chunk(tmp_path, whole):
    predictor = Logging(TRUTH, tmp_path / "log")
    done = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", shards=False, **GRID)
    assert done.table.read_bytes() == whole[1]
    levels = zarr.open_group(done.output / "labels/instances", mode="r")
    assert (levels["0"].chunks, levels["0"].shards) == ((6, 18, 75), None)
    folder = "labels/instances/0/c"
    assert len(list((done.output / folder).glob("*/*/*"))) == 2 * NUM_BLOCKS
    assert len([name for name in whole[0] if name.startswith(folder)]) == NUM_BLOCKS
    with pytest.raises(ValueError, match=r"finished with another plan \(output\.shards: False -> True\)"):
        predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)


class Damaged(ArrayVolume):
    """A stack with a block that cannot be read while a file exists; repairing it changes its size on disk."""

    def __init__(self, flag):
        super().__init__(np.zeros(SHAPE, np.uint8), (2.0, 1.0, 0.5))
        self.flag = flag

    def identity(self):
        return {"num_bytes": 1 if self.flag.exists() else 2}

    def read(self, roi):
        if self.flag.exists() and roi[2] > 0 and roi[0] > 5:
            raise ValueError("chunk 1/1/1 is damaged")
        return super().read(roi)


def test_a_damaged_chunk_is_named_and_after_repair_the_run_goes_on(tmp_path, whole):
    flag = tmp_path / "damaged"
    flag.touch()
    predictor = Logging(TRUTH, tmp_path / "log")
    message = r"block \d+ \(roi \[10, 0, 147, 14, 22, 300\]\) cannot be read: chunk 1/1/1 is damaged"
    next_one = message.replace("10, 0, 147, 14, 22", "10, 14, 147, 14, 40")  # either worker may meet the chunk first
    with pytest.raises(ValueError, match=f"{message}|{next_one}"):
        predict_volume(Damaged(flag), predictor, tmp_path / "x.zarr", num_workers=2, **GRID)
    assert not (tmp_path / "x.zarr").exists()
    finished = len(predictor.calls())
    assert finished >= 13
    with pytest.raises(ValueError, match=message):
        predict_volume(Damaged(flag), predictor, tmp_path / "x.zarr", **GRID)
    flag.unlink()
    predict_volume(Damaged(flag), predictor, tmp_path / "x.zarr", **GRID)
    assert len(predictor.calls()) == len(set(predictor.calls())) == NUM_BLOCKS
    check_same(tmp_path, whole)
    flag.touch()  # once it is finished, a changed input is another input
    with pytest.raises(ValueError, match=r"finished with another plan \(input\.num_bytes: 2 -> 1\)"):
        predict_volume(Damaged(flag), predictor, tmp_path / "x.zarr", **GRID)


def test_an_input_that_changed_is_refused(tmp_path):
    predictor = Logging(TRUTH, tmp_path / "log", fail_at=3)
    with pytest.raises(RuntimeError):
        predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    with pytest.raises(ValueError, match=r"begun with another plan \(input\.digest"):
        predict_volume(ArrayVolume(np.ones(SHAPE, np.uint8), (2.0, 1.0, 0.5)), predictor, tmp_path / "x.zarr", **GRID)
