"""The object table, counted by hand and against scikit-image."""

import numpy as np
import pandas as pd
import pytest
from skimage.measure import regionprops

from seg3d_monai.inference.table import ObjectCounter, write_table

COLUMNS = ["id", "score", "class", *(f"{a}1" for a in "zyx"), *(f"{a}2" for a in "zyx")]
COLUMNS += [*(f"centroid_{a}" for a in "zyx"), *(f"centroid_{a}_um" for a in "zyx")]
COLUMNS += ["volume_voxels", "volume_um3", "touches_border"]


def test_by_hand():
    counter = ObjectCounter(2)
    labels = np.zeros((2, 3, 4), np.uint32)
    labels[0, 1, 1:3] = 2
    labels[1, 1, 2] = 1
    counter.add(labels, (1, 1, 1, 3, 4, 5))
    more = np.zeros((1, 3, 4), np.uint32)
    more[0, 1, 2] = 1
    counter.add(more, (3, 1, 1, 4, 4, 5))
    table = counter.table(scores=np.array([0.5, 0.75]), classes=np.array([1, 0]), shape=(4, 5, 6), spacing_um=(4, 2, 1))
    assert list(table.columns) == COLUMNS
    first, second = table.to_dict("records")
    assert [first[c] for c in COLUMNS] == [1, 0.5, 1, 2, 2, 3, 4, 3, 4, 2.5, 2, 3, 10, 4, 3, 2, 16, True]
    assert [second[c] for c in COLUMNS] == [2, 0.75, 0, 1, 2, 2, 2, 3, 4, 1, 2, 2.5, 4, 4, 2.5, 2, 16, False]


def test_blocks_in_any_order_agree_with_regionprops():
    labels = np.random.default_rng(0).integers(0, 9, (6, 10, 7))
    rois = [(z, y, 0, z + 3, y + 5, 7) for z in (0, 3) for y in (0, 5)]
    tables = []
    for order in (rois, rois[::-1]):
        counter = ObjectCounter(8)
        for roi in order:
            counter.add(labels[roi[0] : roi[3], roi[1] : roi[4]], roi)
        tables.append(counter.table(scores=np.ones(8), classes=np.zeros(8), shape=labels.shape, spacing_um=None))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    for row, props in zip(tables[0].to_dict("records"), regionprops(labels), strict=True):
        assert row["volume_voxels"] == props.area
        assert tuple(row[c] for c in COLUMNS[3:9]) == props.bbox
        assert [row[c] for c in COLUMNS[9:12]] == pytest.approx(list(props.centroid))
        assert np.isnan(row["volume_um3"])
        assert np.isnan(row["centroid_z_um"])


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_files_are_whole_and_repeat_byte_for_byte(tmp_path, suffix):
    for count in (0, 3):
        counter = ObjectCounter(count)
        counter.add(np.arange(count + 1).reshape(1, 1, -1), (0, 0, 0, 1, 1, count + 1))
        table = counter.table(
            scores=np.full(count, 0.1), classes=np.zeros(count), shape=(1, 1, 4), spacing_um=(2, 1, 1)
        )
        written = []
        for name in ("a", "b"):
            write_table(table, tmp_path / f"{name}{suffix}")
            written.append((tmp_path / f"{name}{suffix}").read_bytes())
        assert written[0] == written[1]
        read = pd.read_parquet if suffix == ".parquet" else pd.read_csv
        assert list(read(tmp_path / f"a{suffix}").columns) == COLUMNS
        assert len(read(tmp_path / f"a{suffix}")) == count
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]
