"""What goes wrong in the middle: unreadable chunks, a full disk, a changing input, SIGTERM."""

import errno
import os
import signal
import threading
import time

import numpy as np
import pytest
import zarr
from inference_toys import Logging, Perfect, blank, labels_of, same_partition, tissue_seeds, tree_digest, voronoi

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import predict_volume
from seg3d_monai.inference.blocks import BlockPlan, roi_slices
from seg3d_monai.inference.journal import Journal
from seg3d_monai.inference.schedule import Terminated
from seg3d_monai.inference.writer import LabelWriter

SHAPE = (14, 40, 36)
TRUTH = voronoi(tissue_seeds(SHAPE, (7, 14, 12), seed=2), (0, 0, 0, *SHAPE))
GRID = {"block_size": (6, 18, 20), "halo": (2, 4, 3), "progress": False}
PLAN = BlockPlan.make(shape=SHAPE, block_size=GRID["block_size"], halo=GRID["halo"])


def written_stack(folder):
    data = np.random.default_rng(0).integers(1, 9, SHAPE, np.uint16)
    zarr.create_array(folder / "in.zarr", data=data, chunks=(4, 10, 12))
    return folder / "in.zarr", folder / "in.zarr/c/3/3/2"


def test_skip_bad_leaves_a_listed_hole_and_repair_fills_it(tmp_path):
    stack, chunk = written_stack(tmp_path)
    whole = predict_volume(stack, Perfect(TRUTH), tmp_path / "whole.zarr", spacing=(2, 1, 1), skip_bad=True, **GRID)
    good = chunk.read_bytes()
    chunk.write_bytes(b"damaged")
    predictor = Logging(TRUTH, tmp_path / "log")
    options = {"spacing": (2, 1, 1), "skip_bad": True, **GRID}
    done = predict_volume(stack, predictor, tmp_path / "x.zarr", **options)
    bad = [b for b in PLAN if all(r > c for r, c in zip(b.read[3:], (12, 30, 24), strict=True))]
    assert 1 <= len(bad) < len(PLAN)
    assert len(done.holes) == len(bad)
    assert f"{len(bad)} blocks could not be read" in str(done)
    listed = zarr.open_group(done.output).attrs["seg3d_monai"]["holes"]
    assert [hole["owned"] for hole in listed] == [list(b.owned) for b in bad]
    holes = np.zeros(SHAPE, bool)
    for block in bad:
        holes[roi_slices(block.owned)] = True
    labels = labels_of(done.output)
    assert (labels[~holes] > 0).all()
    assert (labels[holes] == 0).any()  # cells of the blocks beside it reach into it, no others
    again = predict_volume(stack, predictor, tmp_path / "x.zarr", **options)
    assert again.already_finished
    assert again.holes == done.holes
    chunk.write_bytes(good)
    repaired = predict_volume(stack, predictor, tmp_path / "x.zarr", **options)
    assert (repaired.num_predicted, repaired.holes) == (len(bad), ())
    assert len(predictor.calls()) == len(set(predictor.calls())) == len(PLAN)
    assert tree_digest(repaired.output) == tree_digest(whole.output)


def test_without_skip_bad_the_run_stops_with_the_coordinates(tmp_path):
    stack, chunk = written_stack(tmp_path)
    chunk.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"block \d+ \(roi \[.*\]\) cannot be read: .*--skip_bad"):
        predict_volume(stack, Perfect(TRUTH), tmp_path / "x.zarr", spacing=(2, 1, 1), **GRID)
    assert not (tmp_path / "x.zarr").exists()


def test_nan_is_a_hole_too(tmp_path):
    stack = np.ones(SHAPE, np.float32)
    stack[13, 39, 35] = np.nan
    volume = ArrayVolume(stack, (2.0, 1.0, 1.0))
    done = predict_volume(volume, Perfect(TRUTH), tmp_path / "x.zarr", skip_bad=True, **GRID)
    assert len(done.holes) == sum(block.read[3:] == SHAPE for block in PLAN) > 1
    assert all("x 35) is nan" in hole for hole in done.holes)


@pytest.mark.parametrize("where", ["labels", "journal"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, where):
    predictor = Logging(TRUTH, tmp_path / "log")
    with monkeypatch.context() as patch:
        if where == "labels":
            patch.setattr(LabelWriter, "write", fail_with_full_disk)
        else:
            original = Journal.__init__

            def small(self, path):
                original(self, path)
                self._db.execute("PRAGMA max_page_count = 24")

            patch.setattr(Journal, "__init__", small)
        with pytest.raises(OSError, match="No space left on device") as error:
            predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
        assert error.value.errno == errno.ENOSPC
    finished = len(predictor.calls())
    done = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    assert same_partition(labels_of(done.output), TRUTH)
    if where == "labels":
        assert len(predictor.calls()) == finished == len(PLAN)
    else:
        assert len(PLAN) <= len(predictor.calls()) <= len(PLAN) + 2  # those in flight


def fail_with_full_disk(self, block, labels):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


class Touching(Perfect):
    """Perfect; rewrites the input while it predicts."""

    def __init__(self, truth, path):
        super().__init__(truth)
        self.path = path

    def identity(self):
        return {}

    def __call__(self, block, roi):
        os.utime(self.path / "zarr.json", (1, time.time() + 100))
        return super().__call__(block, roi)


def test_an_input_that_changes_in_the_middle_is_refused(tmp_path):
    stack, _ = written_stack(tmp_path)
    with pytest.raises(ValueError, match=r"changed while it was predicted \(input\.modified: "):
        predict_volume(stack, Touching(TRUTH, stack), tmp_path / "x.zarr", spacing=(2, 1, 1), **GRID)
    with pytest.raises(ValueError, match=r"begun with another plan \(input\.modified: "):
        predict_volume(stack, Touching(TRUTH, stack), tmp_path / "x.zarr", spacing=(2, 1, 1), **GRID)
    assert not (tmp_path / "x.zarr").exists()
    done = predict_volume(
        stack, Touching.__mro__[1](TRUTH), tmp_path / "x.zarr", spacing=(2, 1, 1), restart=True, **GRID
    )
    assert same_partition(labels_of(done.output), TRUTH)


class Signalling(Logging):
    """Logging; sends its process SIGTERM while it predicts one block."""

    def __init__(self, truth, log, at):
        super().__init__(truth, log)
        self.at = at

    def __call__(self, block, roi):
        if len(self.calls()) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(block, roi)


def test_sigterm_finishes_the_blocks_in_hand(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    predictor = Signalling(TRUTH, tmp_path / "log", at=4)
    with pytest.raises(Terminated) as stopped:
        predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    begun = len(predictor.calls())
    assert 5 <= begun <= 6
    predictor.at = None
    done = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    assert len(predictor.calls()) == len(set(predictor.calls())) == len(PLAN)  # none was lost, none done twice
    assert same_partition(labels_of(done.output), TRUTH)


def test_a_run_outside_the_main_thread_ignores_signals(tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", **GRID))
    )
    thread.start()
    thread.join()
    assert found[0].num_objects == TRUTH.max()


def test_skip_bad_may_be_added_to_a_run_that_stopped(tmp_path):
    stack, chunk = written_stack(tmp_path)
    chunk.write_bytes(b"damaged")
    predictor = Logging(TRUTH, tmp_path / "log")
    with pytest.raises(ValueError, match="--skip_bad"):
        predict_volume(stack, predictor, tmp_path / "x.zarr", spacing=(2, 1, 1), **GRID)
    done = predict_volume(stack, predictor, tmp_path / "x.zarr", spacing=(2, 1, 1), skip_bad=True, **GRID)
    assert len(done.holes) > 0
    assert len(predictor.calls()) == len(set(predictor.calls())) == len(PLAN) - len(done.holes)


def test_a_journal_without_a_finished_block_gives_way_to_another_plan(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_volume(blank(SHAPE), Logging(TRUTH, tmp_path / "log", fail_at=0), tmp_path / "x.zarr", **GRID)
    done = predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", (5, 20, 20), (2, 4, 3), progress=False)
    assert done.num_objects == TRUTH.max()


class Measuring(Logging):
    """Logging; `for_volume` measures the volume, `rebind` takes what was measured."""

    def __init__(self, truth, log, fail_at=None, measured=None):
        super().__init__(truth, log, fail_at)
        self.measured = measured

    def for_volume(self, volume):
        with (self.log.parent / "measured").open("a") as file:
            file.write("once\n")
        return Measuring(self.truth, self.log, self.fail_at, {"peak": 7})

    def binding(self):
        return self.measured

    def rebind(self, volume, binding):
        return Measuring(self.truth, self.log, self.fail_at, binding)

    def __call__(self, block, roi):
        assert self.measured == {"peak": 7}
        return super().__call__(block, roi)


def test_what_was_measured_of_the_volume_is_kept_for_the_blocks_that_are_left(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_volume(blank(SHAPE), Measuring(TRUTH, tmp_path / "log", 5), tmp_path / "x.zarr", **GRID)
    predict_volume(blank(SHAPE), Measuring(TRUTH, tmp_path / "log"), tmp_path / "x.zarr", **GRID)
    assert (tmp_path / "measured").read_text() == "once\n"
