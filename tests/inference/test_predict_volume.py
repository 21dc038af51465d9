"""predict_volume: what it writes, what it refuses, and that it leaves nothing half-written."""

import os
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from inference_toys import Logging, Perfect, blank, same_partition, tissue_seeds, tree_digest, voronoi

from seg3d_monai.data.volume import ArrayVolume, open_volume
from seg3d_monai.inference import Instances, predict_labels, predict_volume
from seg3d_monai.inference.paint import Stitched

SHAPE = (14, 40, 36)
TRUTH = voronoi(tissue_seeds(SHAPE, (7, 14, 12), seed=2), (0, 0, 0, *SHAPE))
GRID = {"block_size": (6, 18, 20), "halo": (2, 4, 3), "progress": False}


def labels_of(output):
    volume = open_volume(output)
    return volume.read((0, 0, 0, *volume.shape[1:]))[0]


def test_the_whole_way(tmp_path):
    output = tmp_path / "x.zarr"
    done = predict_volume(blank(SHAPE), Perfect(TRUTH), output, **GRID)
    assert (done.num_blocks, done.num_predicted, done.num_objects) == (3 * 3 * 2, 18, TRUTH.max())
    assert not done.already_finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.instances.parquet", "x.journal.sqlite", "x.zarr"]
    assert same_partition(labels_of(output), TRUTH)
    assert open_volume(output).spacing_um == (2.0, 1.0, 0.5)
    table = pd.read_parquet(done.table)
    in_memory, same_table = predict_labels(blank(SHAPE), Perfect(TRUTH), (6, 18, 20), (2, 4, 3))
    assert (labels_of(output) == in_memory).all()
    pd.testing.assert_frame_equal(table, same_table)
    assert in_memory.dtype == np.uint32
    assert table["volume_um3"].sum() == pytest.approx(TRUTH.size)


def test_workers_and_place_leave_no_trace(tmp_path):
    (tmp_path / "other").mkdir()
    first = predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", **GRID)
    second = predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "other" / "y.zarr", num_workers=2, **GRID)
    assert tree_digest(first.output) == tree_digest(second.output)
    assert first.table.read_bytes() == second.table.read_bytes()


def test_a_finished_output_is_left_alone(tmp_path):
    predictor = Logging(TRUTH, tmp_path / "log")
    predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    before = tree_digest(tmp_path)
    again = predict_volume(blank(SHAPE), predictor, tmp_path / "x.zarr", **GRID)
    assert again.already_finished
    assert (again.num_predicted, again.num_objects) == (0, TRUTH.max())
    assert tree_digest(tmp_path) == before


def test_another_plan_is_refused_and_restart_starts_anew(tmp_path):
    predictor = Logging(TRUTH, tmp_path / "log")
    output = tmp_path / "x.zarr"
    predict_volume(blank(SHAPE), predictor, output, **GRID)
    before = tree_digest(tmp_path)
    for change, named in [
        ({"halo": (2, 4, 4)}, r"halo: \[2, 4, 3\] -> \[2, 4, 4\]"),
        ({"dtype": "uint16"}, "output.dtype"),
        ({"identity": {"name": "newer"}}, "predictor.name: 'logging' -> 'newer'"),
    ]:
        with pytest.raises(ValueError, match=named + ".*--restart"):
            predict_volume(blank(SHAPE), predictor, output, **(GRID | change))
    brighter = ArrayVolume(np.ones(SHAPE, np.uint8), (2.0, 1.0, 0.5))
    with pytest.raises(ValueError, match=r"input\.digest"):
        predict_volume(brighter, predictor, output, **GRID)
    assert tree_digest(tmp_path) == before
    done = predict_volume(brighter, predictor, output, restart=True, **(GRID | {"block_size": 20}))
    assert done.num_predicted == 4
    assert same_partition(labels_of(output), TRUTH)


def test_an_output_of_somebody_else_is_never_touched(tmp_path):
    zarr.open_group(tmp_path / "x.zarr", mode="w").create_array("0", data=np.ones((2, 3, 4)))
    before = tree_digest(tmp_path)
    for restart in (False, True):
        with pytest.raises(ValueError, match="choose another OUTPUT"):
            predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", restart=restart, **GRID)
    source = open_volume(tmp_path / "x.zarr", spacing=(1, 1, 1))
    for output in ("x.zarr", "x.zarr/y.zarr"):
        with pytest.raises(ValueError, match="overlap"):
            predict_volume(source, Perfect(TRUTH), tmp_path / output, restart=True, **GRID)
    assert tree_digest(tmp_path) == before


def test_options(tmp_path):
    image = ArrayVolume(np.arange(2 * TRUTH.size, dtype=np.uint16).reshape(2, *SHAPE), (1, 1, 1))
    done = predict_volume(
        image,
        Perfect(TRUTH),
        tmp_path / "x.zarr",
        dtype="uint16",
        table="csv",
        copy_image=True,
        ome_zarr_version="0.4",
        provenance={"bundle": "toy"},
        **GRID,
    )
    assert done.table.name == "x.instances.csv"
    assert len(pd.read_csv(done.table)) == TRUTH.max()
    root = zarr.open_group(done.output, mode="r")
    assert root.metadata.zarr_format == 2
    assert (root["0"][:] == image.array).all()
    assert root["labels/instances/0"].dtype == np.uint16
    assert root.attrs["seg3d_monai"]["provenance"] == {"bundle": "toy"}


def test_path_array_and_several_channels(tmp_path):
    stack = np.random.default_rng(0).integers(0, 9, (3, *SHAPE), np.uint16)
    zarr.create_array(tmp_path / "in.zarr", data=stack, chunks=(1, 8, 16, 16))
    seen = []

    def predictor(block, roi):
        z1, y1, x1, z2, y2, x2 = roi
        assert block.dtype == torch.float32
        assert (block.numpy() == stack[[2, 0], z1:z2, y1:y2, x1:x2]).all()
        seen.append(roi)
        return Instances.empty()

    options = {"axes": "CZYX", "channels": [2, 0], "spacing": (2, 1, 1), "identity": {}}
    done = predict_volume(str(tmp_path / "in.zarr"), predictor, tmp_path / "x.zarr", **options, **GRID)
    assert (done.num_objects, len(seen)) == (0, 18)
    assert len(pd.read_parquet(done.table)) == 0
    assert labels_of(done.output).max() == 0
    done = predict_volume(stack[0], Perfect(TRUTH), tmp_path / "y.zarr", spacing=(2, 1, 1), **GRID)
    assert same_partition(labels_of(done.output), TRUTH)
    with pytest.raises(ValueError, match="describe a file"):
        predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "z.zarr", spacing=(2, 1, 1), **GRID)


def test_unknown_spacing_warns_once_and_is_null(tmp_path):
    with pytest.warns(UserWarning, match="spacing is unknown") as caught:
        done = predict_volume(ArrayVolume(np.zeros(SHAPE)), Perfect(TRUTH), tmp_path / "x.zarr", **GRID)
    assert len(caught) == 1
    table = pd.read_parquet(done.table)
    assert table[["volume_um3", "centroid_z_um", "centroid_y_um", "centroid_x_um"]].isna().all(axis=None)
    assert table["volume_voxels"].sum() == TRUTH.size


def test_a_volume_smaller_than_a_block_and_one_object_that_fills_it(tmp_path):
    truth = np.ones((3, 5, 4), int)
    done = predict_volume(blank(truth.shape), Perfect(truth), tmp_path / "x.zarr", progress=False)
    assert (done.num_blocks, done.num_objects) == (1, 1)
    assert (labels_of(done.output) == 1).all()
    assert pd.read_parquet(done.table)["touches_border"].tolist() == [True]


def test_a_dry_run_writes_nothing(tmp_path):
    done = predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", dry_run=True, **GRID)
    assert (done.num_blocks, done.num_predicted, done.num_objects) == (18, 0, None)
    assert list(tmp_path.iterdir()) == []


def test_for_volume_is_called_once(tmp_path):
    calls = []

    class Unbound:
        def for_volume(self, volume):
            calls.append(volume.shape)
            return Perfect(TRUTH)

    predict_volume(blank(SHAPE), Unbound(), tmp_path / "x.zarr", **GRID)
    predict_labels(blank(SHAPE), Unbound())
    assert calls == [(1, *SHAPE)] * 2


def test_too_many_objects_for_uint16(tmp_path, monkeypatch):
    monkeypatch.setattr(Stitched, "num_objects", 65535)
    with pytest.raises(ValueError, match=r"65535 objects do not fit dtype uint16 \(65534 ids\)"):
        predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", dtype="uint16", **GRID)
    assert [p.name for p in tmp_path.iterdir()] == ["x.journal.sqlite"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"output": "x.tif"}, ValueError, "ends with .zarr"),
        ({"output": "missing/x.zarr"}, FileNotFoundError, "does not exist"),
        ({"num_workers": 0}, ValueError, "num_workers is 0"),
        ({"dtype": "int64"}, ValueError, "dtype is 'int64'"),
        ({"table": "xlsx"}, ValueError, "table is 'xlsx'"),
        ({"ome_zarr_version": "0.3"}, ValueError, "ome_zarr_version is '0.3'"),
        ({"ome_zarr_version": "0.4", "shards": True}, ValueError, "OME-Zarr 0.4 has none; pass ome_zarr_version 0.5"),
        ({"shards": 4}, ValueError, "shards is 4; pass True, False or None"),
        ({"halo": 0}, ValueError, "halo is 0 along z"),
        ({"image": "missing.tif"}, FileNotFoundError, "missing.tif"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, change, kind, message):
    arguments = {"image": blank(SHAPE), "predictor": Perfect(TRUTH), "output": "x.zarr", **GRID} | change
    arguments["output"] = tmp_path / arguments["output"]
    with pytest.raises(kind, match=message):
        predict_volume(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_write_permission(tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere: let the system call say what it says to others

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"x\.zarr cannot be written: Permission denied"):
        predict_volume(blank(SHAPE), Perfect(TRUTH), folder / "x.zarr", **GRID)
    assert list(folder.iterdir()) == []


def test_nan_voxels_are_refused(tmp_path):
    stack = np.zeros(SHAPE, np.float32)
    stack[3, 20, 30] = np.nan
    with pytest.raises(ValueError, match="30"):
        predict_volume(ArrayVolume(stack, (1, 1, 1)), Perfect(TRUTH), tmp_path / "x.zarr", **GRID)
    assert [path.name for path in tmp_path.iterdir()] == ["x.journal.sqlite"]
    with pytest.raises(ValueError, match="30"):
        predict_labels(ArrayVolume(stack), Perfect(TRUTH))


def test_a_corrupt_chunk_is_named(tmp_path):
    zarr.create_array(tmp_path / "in.zarr", data=np.random.default_rng(0).integers(0, 9, SHAPE), chunks=(8, 16, 16))
    chunk = tmp_path / "in.zarr" / "c" / "1" / "1" / "1"
    good = chunk.read_bytes()
    chunk.write_bytes(b"garbage")
    arguments = {"spacing": (1, 1, 1), **GRID}
    with pytest.raises(ValueError, match=r"in\.zarr"):
        predict_volume(tmp_path / "in.zarr", Perfect(TRUTH), tmp_path / "x.zarr", **arguments)
    assert not (tmp_path / "x.zarr").exists()
    chunk.write_bytes(good)
    done = predict_volume(tmp_path / "in.zarr", Perfect(TRUTH), tmp_path / "x.zarr", **arguments)
    assert same_partition(labels_of(done.output), TRUTH)


class Broken:
    """Returns something wrong for the blocks behind the first one."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, block, roi):
        if roi[:3] == (0, 0, 0):
            return Instances.empty()
        if self.kind == "shape":
            return Instances([[0.0, 0, 0, 2, 2, 2]], [0.5], [0], [np.ones((2, 2, 3), bool)])
        return {"boxes": []} if self.kind == "type" else 1 / 0


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("shape", ValueError, r"block \d+ \(roi \[.*mask of instance 0 has shape"),
        ("type", TypeError, r"block \d+ \(roi \[.*the predictor returned dict"),
        ("crash", ZeroDivisionError, "division by zero"),
    ],
)
def test_wrong_predictions_name_the_block(tmp_path, kind, error, message):
    with pytest.raises(error, match=message) as caught:
        predict_volume(blank(SHAPE), Broken(kind), tmp_path / "x.zarr", **GRID)
    if kind == "crash":
        assert "while predicting block" in caught.value.__notes__[0]
    assert [p.name for p in tmp_path.iterdir()] == ["x.journal.sqlite"]


def test_no_warning_when_all_is_known(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        predict_volume(blank(SHAPE), Perfect(TRUTH), tmp_path / "x.zarr", **GRID)
