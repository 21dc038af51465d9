"""The object table, counted by hand and against scikit-image."""

import numpy as np
import pandas as pd
import pytest
from skimage.measure import regionprops

from seg3d_monai.inference import table as table_module
from seg3d_monai.inference.blocks import BlockPlan, roi_slices
from seg3d_monai.inference.table import ObjectTotals, count_objects, seen_whole, write_table

COLUMNS = ["id", "score", "class", *(f"{a}1" for a in "zyx"), *(f"{a}2" for a in "zyx")]
COLUMNS += [*(f"centroid_{a}" for a in "zyx"), *(f"centroid_{a}_um" for a in "zyx")]
COLUMNS += ["volume_voxels", "volume_um3", "touches_border", "seen_whole"]


def table_of(plan, labels, *, scores, classes, spacing_um, order=1, times=None):
    """The table of labels [Z, Y, X], or [T, Z, Y, X] of a series, as one frame."""
    totals = ObjectTotals(plan, len(scores))
    for block in list(plan)[::order]:
        part = (labels if times is None else labels[block.time])[roi_slices(block.owned)]
        ids, slots = np.unique(np.append(part, 0), return_inverse=True)
        totals.add(block.index, count_objects(slots[:-1].reshape(part.shape).astype(np.int32), ids, block.owned))
    return pd.concat(totals.tables(scores=scores, classes=classes, spacing_um=spacing_um, times=times))


def test_by_hand():
    plan = BlockPlan.make(shape=(4, 5, 6), block_size=(3, 5, 6), halo=(1, 0, 0))
    labels = np.zeros((4, 5, 6), int)
    labels[1, 2, 2:4] = 2
    labels[2, 2, 3] = labels[3, 2, 3] = 1
    table = table_of(plan, labels, scores=np.array([0.5, 0.75]), classes=np.array([1, 0]), spacing_um=(4, 2, 1))
    assert list(table.columns) == COLUMNS
    first, second = table.to_dict("records")
    assert [first[c] for c in COLUMNS] == [1, 0.5, 1, 2, 2, 3, 4, 3, 4, 2.5, 2, 3, 10, 4, 3, 2, 16, True, True]
    assert [second[c] for c in COLUMNS] == [2, 0.75, 0, 1, 2, 2, 2, 3, 4, 1, 2, 2.5, 4, 4, 2.5, 2, 16, False, True]


def test_a_series_names_the_time_point():
    plan = BlockPlan.make(shape=(1, 2, 4), block_size=(1, 2, 2), halo=(0, 0, 1), times=2)
    labels = np.array([[[[1, 1, 2, 0], [0, 0, 2, 0]]], [[[0, 3, 3, 3], [0, 0, 0, 0]]]])
    table = table_of(plan, labels, scores=np.ones(3), classes=np.zeros(3), spacing_um=None, times=[4, 7])
    assert table["time"].tolist() == [4, 4, 7]
    assert table["volume_voxels"].tolist() == [2, 2, 3]


@pytest.mark.parametrize("rows", [3, 100])
def test_blocks_in_any_order_agree_with_regionprops(monkeypatch, rows):
    monkeypatch.setattr(table_module, "_ROWS", rows)
    labels = np.random.default_rng(0).integers(0, 9, (6, 10, 7))
    plan = BlockPlan.make(shape=labels.shape, block_size=(3, 5, 7), halo=1)
    options = {"scores": np.ones(8), "classes": np.zeros(8), "spacing_um": None}
    tables = [table_of(plan, labels, **options, order=order) for order in (1, -1)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0]["id"].tolist() == list(range(1, 9))
    for (_, row), props in zip(tables[0].iterrows(), regionprops(labels), strict=True):
        assert row["volume_voxels"] == props.area
        assert tuple(row[c] for c in COLUMNS[3:9]) == props.bbox
        assert [row[c] for c in COLUMNS[9:12]] == pytest.approx(list(props.centroid))
        assert np.isnan(row["volume_um3"])
        assert np.isnan(row["centroid_z_um"])


@pytest.mark.parametrize("grid", [((3, 4, 5), 2), ((2, 9, 3), (3, 1, 1)), ((4, 2, 30), (1, 4, 0))])
@pytest.mark.parametrize("roi", [None, (1, 2, 3, 9, 12, 10)])
def test_seen_whole_matches_a_search_of_all_blocks(grid, roi):
    plan = BlockPlan.make(shape=(9, 13, 11), block_size=grid[0], halo=grid[1], roi=roi)
    rng = np.random.default_rng(0)
    low, high = np.array(plan.region[:3]), np.array(plan.region[3:])
    lower = rng.integers(low, high, (200, 3))
    upper = np.minimum(lower + rng.integers(1, 8, (200, 3)), high)
    reads = np.array([block.read for block in plan])
    expected = [((reads[:, :3] <= a) & (reads[:, 3:] >= b)).all(1).any() for a, b in zip(lower, upper, strict=True)]
    assert 0 < sum(expected) < 200
    assert seen_whole(plan, lower, upper).tolist() == expected


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_files_are_whole_and_repeat_byte_for_byte(tmp_path, suffix):
    plan = BlockPlan.make(shape=(1, 1, 4), block_size=4, halo=0)
    for count in (0, 3):
        labels = np.arange(4).reshape(1, 1, 4) * (count > 0)
        table = table_of(plan, labels, scores=np.full(count, 0.1), classes=np.zeros(count), spacing_um=(2, 1, 1))
        written = []
        for name in ("a", "b"):
            write_table([table[:1], table[1:]], tmp_path / f"{name}{suffix}")
            written.append((tmp_path / f"{name}{suffix}").read_bytes())
        assert written[0] == written[1]
        read = pd.read_parquet if suffix == ".parquet" else pd.read_csv
        assert list(read(tmp_path / f"a{suffix}").columns) == COLUMNS
        assert len(read(tmp_path / f"a{suffix}")) == count
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]
