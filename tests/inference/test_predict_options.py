"""Regions, series, batches, foreground, formats and estimates of `predict_volume`."""

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from inference_toys import (
    Logging,
    Perfect,
    blank,
    labels_of,
    same_partition,
    tissue_seeds,
    to_instances,
    tree_digest,
    voronoi,
)

from seg3d_monai.data.volume import ArrayVolume, open_volume
from seg3d_monai.inference import label_tiff, predict_labels, predict_volume
from seg3d_monai.inference.blocks import BlockPlan, roi_slices
from seg3d_monai.inference.journal import Journal

SHAPE = (14, 40, 36)
TRUTH = voronoi(tissue_seeds(SHAPE, (7, 14, 12), seed=2), (0, 0, 0, *SHAPE))
GRID = {"block_size": (6, 18, 20), "halo": (2, 4, 3), "progress": False}
PLAN = BlockPlan.make(shape=SHAPE, block_size=GRID["block_size"], halo=GRID["halo"])


@pytest.mark.parametrize(
    "roi", [(0, 0, 0, 14, 40, 36), (3, 5, 7, 9, 33, 30), (6, 18, 20, 12, 36, 36), (2, 2, 2, 3, 3, 3)]
)
def test_a_region_is_predicted_in_the_frame_of_the_volume(tmp_path, roi):
    predictor = Logging(TRUTH, tmp_path / "log")
    done = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", roi=roi, **GRID)
    plan = BlockPlan.make(shape=SHAPE, block_size=GRID["block_size"], halo=GRID["halo"], roi=roi)
    assert len(predictor.calls()) == len(plan)
    assert open_volume(done.output).shape[1:] == SHAPE
    labels = labels_of(done.output)
    inside = np.zeros(SHAPE, bool)
    inside[roi_slices(roi)] = True
    assert same_partition(labels, np.where(inside, TRUTH, 0))
    table = pd.read_parquet(done.table)
    assert table["z1"].min() == roi[0]
    assert table["x2"].max() == roi[5]
    in_memory, its_table = predict_labels(blank(SHAPE), Perfect(TRUTH), GRID["block_size"], GRID["halo"], roi=roi)
    assert (in_memory == labels[roi_slices(roi)]).all()
    pd.testing.assert_frame_equal(its_table, table, check_dtype=False)


@pytest.mark.parametrize("roi", [(0, 0, 0, 14, 40), (3, 5, 7, 3, 33, 30), (0, 0, 0, 15, 40, 36), (-1, 0, 0, 3, 3, 3)])
def test_a_wrong_region_is_refused(tmp_path, roi):
    with pytest.raises(ValueError, match="roi"):
        predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", roi=roi, **GRID)
    assert list(tmp_path.iterdir()) == []


def test_the_grid_may_be_moved():
    for offset in (0, (3, 0, 10), (5, 17, 19), 40):
        labels, table = predict_labels(blank(SHAPE), Perfect(TRUTH), GRID["block_size"], GRID["halo"], offset=offset)
        assert same_partition(labels, TRUTH)
        assert table["seen_whole"].dtype == bool


TRUTHS = [voronoi(tissue_seeds(SHAPE, (7, 14, 12), seed=t), (0, 0, 0, *SHAPE)) for t in range(3)]


class OfTime:
    """Another truth at every time point, which is the grey value of its volume."""

    def __init__(self, time=None):
        self.time = time

    def for_volume(self, volume):
        return OfTime(int(volume.read((0, 0, 0, 1, 1, 1)).item()))

    def __call__(self, block, roi):
        assert (block == self.time).all()
        return to_instances(TRUTHS[self.time][roi_slices(roi)])


@pytest.mark.parametrize(("time", "points"), [("all", [0, 1, 2]), ([2, 0], [2, 0])])
def test_a_series_is_stitched_time_point_by_time_point(tmp_path, time, points):
    stack = np.broadcast_to(np.arange(3, dtype=np.uint8)[:, None, None, None], (3, *SHAPE))
    array = zarr.create_array(tmp_path / "in.zarr", data=stack, chunks=(1, 14, 20, 20))
    array.attrs["x"] = 1
    done = predict_volume(
        tmp_path / "in.zarr", OfTime(), tmp_path / "x.zarr", axes="TZYX", spacing=(2, 1, 1), time=time, **GRID
    )
    labels, table = labels_of(done.output), pd.read_parquet(done.table)
    assert labels.shape == (len(points), *SHAPE)
    ids: set[int] = set()
    for place, point in enumerate(points):
        assert same_partition(labels[place], TRUTHS[point])
        found = set(np.unique(labels[place]).tolist())
        assert found.isdisjoint(ids)
        ids |= found
        assert set(table["id"][table["time"] == point]) == found
    assert ids == set(range(1, done.num_objects + 1))
    axes = zarr.open_group(done.output / "labels/instances").attrs["ome"]["multiscales"][0]["axes"]
    assert [axis["name"] for axis in axes] == ["t", "z", "y", "x"]
    assert open_volume(done.output, time=1).shape == (1, *SHAPE)


class Batched(Perfect):
    """Perfect; notes the batches that it gets."""

    def __init__(self, truth, fail_at=None):
        super().__init__(truth)
        self.batches, self.fail_at = [], fail_at

    def identity(self):
        return {"name": "batched"}

    def predict_batch(self, blocks, rois):
        if len(self.batches) == self.fail_at:
            raise RuntimeError("out of memory")
        self.batches.append(list(rois))
        return [self(block, roi) for block, roi in zip(blocks, rois, strict=True)]


def test_batches_are_those_of_the_plan_whatever_was_done_before(tmp_path):
    plan = BlockPlan.make(shape=SHAPE, block_size=GRID["block_size"], halo=GRID["halo"])
    expected = [[plan[i].read for i in range(start, min(start + 4, 18))] for start in range(0, 18, 4)]
    predictor = Batched(TRUTH, fail_at=2)
    with pytest.raises(RuntimeError):
        predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", batch_size=4, **GRID)
    predictor.fail_at = None
    predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", batch_size=4, **GRID)
    assert sorted(predictor.batches) == sorted(expected)
    one = predict_volume(blank(SHAPE), Batched(TRUTH), tmp_path / "one.zarr", **GRID)
    assert tree_digest(one.output) == tree_digest(tmp_path / "x.zarr")


def test_blocks_without_foreground_are_not_predicted(tmp_path):
    mask = np.zeros((7, 20, 18), np.uint8)  # half the resolution
    mask[6, 19, 17] = 1
    stack = np.zeros(SHAPE, np.uint16)
    stack[13, 39, 35] = 9
    for number, options in enumerate(({"foreground": mask}, {"skip_empty": True}, {"skip_below": 8})):
        predictor = Logging(TRUTH, tmp_path / f"log{number}")
        output = tmp_path / f"{number}.zarr"
        volume = ArrayVolume(stack, (2.0, 1.0, 1.0))
        done = predict_volume(volume, predictor, output, **options, **GRID)
        reading = [block for block in PLAN if block.read[3:] == SHAPE]
        assert sorted(predictor.calls()) == sorted(str(block.read) for block in reading)
        assert done.num_predicted == len(reading) == 4
        with Journal(output.with_suffix(".journal.sqlite")) as journal:
            assert len(journal.blocks_in_state("empty")) == 14
            assert journal.starts() == {block.index: 1 for block in reading}
        labels = labels_of(output)
        assert same_partition(labels[12:, 36:, 20:], TRUTH[12:, 36:, 20:])
    done = predict_volume(
        ArrayVolume(np.zeros(SHAPE), (1, 1, 1)), Perfect(TRUTH), tmp_path / "none.zarr", skip_empty=True, **GRID
    )
    assert (done.num_objects, done.num_predicted) == (0, 0)
    assert not labels_of(done.output).any()
    assert len(pd.read_parquet(done.table)) == 0


def test_tables_and_tiff_hold_the_same(tmp_path, monkeypatch):
    done = predict_volume(
        blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", table="parquet,csv", label_tiff=True, **GRID
    )
    first, second = (pd.read_parquet(done.tables[0]), pd.read_csv(done.tables[1]))
    pd.testing.assert_frame_equal(first, second, check_dtype=False)
    with tifffile.TiffFile(tmp_path / "x.labels.tif") as file:
        assert file.series[0].axes == "ZYX"
        assert (file.asarray() == labels_of(done.output)).all()
        assert 'PhysicalSizeZ="2.0"' in file.ome_metadata
        assert "00000000-0000" not in file.ome_metadata
    assert open_volume(tmp_path / "x.labels.tif").spacing_um == (2.0, 1.0, 0.5)
    as_bytes = (tmp_path / "x.labels.tif").read_bytes()
    (tmp_path / "x.labels.tif").unlink()
    monkeypatch.setattr(label_tiff, "_READ_AT_A_TIME", 5 * 4 * SHAPE[1] * SHAPE[2])  # planes that no chunk begins with
    again = predict_volume(
        blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", table="parquet,csv", label_tiff=True, **GRID
    )
    assert (again.already_finished, again.num_predicted) == (False, 0)
    assert (tmp_path / "x.labels.tif").read_bytes() == as_bytes


def test_a_dry_run_says_what_the_run_takes(tmp_path):
    predictor = Logging(TRUTH, tmp_path / "log")
    planned = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", dry_run=True, **GRID)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert str(planned).startswith("dry run, nothing written: 18 blocks, about ")
    estimate = planned.estimate
    assert estimate.seconds > 0
    assert estimate.memory > 50e6
    done = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    assert 0.5 < estimate.num_instances / 50 < 5
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.1 < estimate.disk / size < 10
    assert done.num_objects == TRUTH.max()


def test_more_memory_than_allowed_is_refused(tmp_path):
    for options in ({"dry_run": True}, {}):
        with pytest.raises(ValueError, match=r"more than max_memory, 0\.0 GB; pass a smaller block_size"):
            predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", max_memory="1 MB", **options, **GRID)
    done = predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", max_memory="100GB", **GRID)
    assert done.num_objects == TRUTH.max()
    with pytest.raises(ValueError, match="max_memory is 'much'"):
        predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "y.zarr", max_memory="much", **GRID)
