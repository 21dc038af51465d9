"""Measurements, against scikit-image on whole arrays, plain loops, and numbers counted by hand."""

from itertools import product

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import zarr
from measure_toys import BLOCK_SIZES, SHAPE, SPACING, crowded, measured, pictures, write_output
from skimage.measure import regionprops_table

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import measure, object_columns
from seg3d_monai.inference.measure import measure_objects


def crofton(mask, spacing):
    """Surface by walking along every line of voxels; directions weighed by drawing at random."""
    spacing = np.array(spacing)
    steps = [np.array(step) for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]
    lengths = np.array([np.linalg.norm(step * spacing) for step in steps])
    units = np.array(steps) * spacing / lengths[:, None]
    drawn = np.random.default_rng(0).normal(size=(200_000, 3))
    weights = np.bincount(np.abs(drawn @ units.T).argmax(axis=1), minlength=13) / len(drawn)
    padded = np.pad(mask, 1)
    crossings = [(padded != np.roll(padded, step, axis=(0, 1, 2))).sum() for step in steps]
    return 2 * (weights * crossings * spacing.prod() / lengths).sum()


@pytest.mark.parametrize(
    ("block_size", "dtype"),
    [*zip(BLOCK_SIZES, [np.uint16, np.int16, np.float32, np.uint32], strict=True), (BLOCK_SIZES[1], np.float64)],
)
def test_every_column_agrees_with_scikit_image(tmp_path, monkeypatch, block_size, dtype):
    monkeypatch.setattr(measure, "_BLOCK_SIZE", block_size)
    monkeypatch.setattr(measure, "_PENDING_ROWS", 20)
    labels, image = crowded(), pictures(dtype=dtype)
    table = measured(tmp_path, labels, image)
    properties = ["label", "area", "num_pixels", "equivalent_diameter_area", "inertia_tensor_eigvals"]
    properties += [f"intensity_{name}" for name in ("mean", "std", "min", "max")]
    values = np.moveaxis(image, 0, -1)
    expected = regionprops_table(
        labels, values, spacing=SPACING, properties=[*properties, "axis_major_length", "axis_minor_length"]
    )
    assert len(table) > 30
    assert list(table["id"]) == list(expected["label"])
    assert list(table["volume_voxels"]) == list(expected["num_pixels"])
    same = {
        "volume_um3": "area",
        "equivalent_diameter_um": "equivalent_diameter_area",
        "axis_major_length_um": "axis_major_length",
        "axis_minor_length_um": "axis_minor_length",
    }
    same |= {f"intensity_{n}_c{c}": f"intensity_{n}-{c}" for n in ("mean", "std", "min", "max") for c in (0, 1)}
    for ours, theirs in same.items():
        np.testing.assert_allclose(table[ours], expected[theirs], rtol=1e-6, atol=1e-6, err_msg=ours)
    for c in (0, 1):
        sums = [image[c][labels == i].astype(np.float64).sum() for i in table["id"]]
        np.testing.assert_allclose(table[f"intensity_sum_c{c}"], sums, rtol=1e-12)
    # The eigenvalues of the inertia tensor are sums of two variances.
    inertia = np.stack([expected[f"inertia_tensor_eigvals-{i}"] for i in range(3)], axis=1)
    variances = inertia.sum(axis=1, keepdims=True) / 2 - inertia[:, ::-1]
    np.testing.assert_allclose(table["axis_intermediate_length_um"], np.sqrt(20 * variances[:, 1]), rtol=1e-6)
    np.testing.assert_allclose(table["elongation"], np.sqrt(variances[:, 0] / variances[:, 1]), rtol=1e-6)
    for row in table.iloc[::7].to_dict("records"):
        assert row["surface_area_um2"] == pytest.approx(crofton(labels == row["id"], SPACING), rel=5e-3)
        ball = np.pi ** (1 / 3) * (6 * row["volume_um3"]) ** (2 / 3)
        assert row["sphericity"] == pytest.approx(ball / row["surface_area_um2"])


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_the_block_size_does_not_matter(tmp_path, monkeypatch, dtype):
    labels, image = crowded(), pictures(dtype=dtype)
    atlas = ArrayVolume(np.random.default_rng(3).integers(0, 4, (6, 8, 9)), (8.0, 5.0, 2.0))
    tables = []
    for number, block_size in enumerate(BLOCK_SIZES):
        monkeypatch.setattr(measure, "_BLOCK_SIZE", block_size)
        (tmp_path / str(number)).mkdir()
        tables.append(measured(tmp_path / str(number), labels, image, atlas=atlas))
    for table in tables[1:]:
        if dtype == np.uint16:
            pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
        else:
            pd.testing.assert_frame_equal(table, tables[0], rtol=1e-13, atol=1e-13)


def test_by_hand(tmp_path):
    labels = np.zeros((3, 4, 5), np.uint32)
    labels[1, 1, 1:4] = 2  # a rod
    labels[0, 3, 4] = 7  # one voxel, in a corner
    image = np.zeros((1, 3, 4, 5), np.uint8)
    image[0, 1, 1, 1:4] = 1, 2, 6
    image[0, 0, 3, 4] = 9
    table = measured(tmp_path, labels, image, spacing_um=(2.0, 2.0, 2.0))
    assert list(table["id"]) == [2, 7]
    assert list(table["volume_voxels"]) == [3, 1]
    assert list(table["volume_um3"]) == [24, 8]
    # places -2, 0, 2 um have the variance 8/3
    assert list(table["axis_major_length_um"]) == pytest.approx([np.sqrt(20 * 8 / 3), 0])
    assert list(table["axis_intermediate_length_um"]) == [0, 0]
    assert list(table["axis_minor_length_um"]) == [0, 0]
    assert table["elongation"].isna().all()
    assert list(table["intensity_mean_c0"]) == [3, 9]
    assert list(table["intensity_std_c0"]) == pytest.approx([np.sqrt(14 / 3), 0])
    assert table[["intensity_min_c0", "intensity_max_c0", "intensity_sum_c0"]].to_numpy().tolist() == [
        [1, 6, 9],
        [9, 9, 9],
    ]
    # The published weights of both senses of a direction: axis, diagonal of a face, diagonal of the cube.
    axis, face, cube = 2 * 0.045777891, 2 * 0.036980628, 2 * 0.035195640
    one = 4 * 8 / 2 * (3 * axis + 6 * face / np.sqrt(2) + 4 * cube / np.sqrt(3))
    joined = 4 * 8 / 2 * axis * 2  # two pairs of neighbours hide two crossings each
    assert list(table["surface_area_um2"]) == pytest.approx([3 * one - joined, one], rel=1e-6)


@pytest.mark.parametrize(
    ("spacing", "radii", "tolerance"),
    [
        ((1, 1, 1), (20, 20, 20), 0.01),
        ((3, 1, 1), (20, 20, 20), 0.03),
        ((2, 1, 0.5), (24, 16, 10), 0.08),  # the directions of such voxels crowd around z
    ],
)
def test_ellipsoids_come_near_the_true_surface(tmp_path, spacing, radii, tolerance):
    spacing, radii = np.array(spacing, float), np.array(radii, float)
    shape = [int(2 * r / s) + 3 for r, s in zip(radii, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 + 0.2 for n in shape), indexing="ij"), axis=-1) * spacing
    labels = (((grid / radii) ** 2).sum(axis=-1) <= 1).astype(np.uint32)
    row = measured(tmp_path, labels, labels.astype(np.uint8), spacing_um=tuple(spacing)).iloc[0]
    # The surface of an ellipsoid: the mean over the sphere of |area vector|.
    u = np.random.default_rng(0).normal(size=(50_000, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    surface = 4 * np.pi * radii.prod() * np.linalg.norm(u / radii, axis=1).mean()
    assert row["surface_area_um2"] == pytest.approx(surface, rel=tolerance)
    assert row["volume_um3"] == pytest.approx(4 / 3 * np.pi * radii.prod(), rel=0.02)
    lengths = [row[f"axis_{name}_length_um"] for name in ("major", "intermediate", "minor")]
    assert lengths == pytest.approx(sorted(2 * radii)[::-1], rel=0.02)


def test_one_object_that_fills_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_BLOCK_SIZE", (4, 8, 8))
    labels, image = np.ones(SHAPE, np.uint32), pictures()
    (row,) = measured(tmp_path, labels, image).to_dict("records")
    assert row["volume_voxels"] == labels.size
    assert row["intensity_sum_c1"] == image[1].sum()
    assert row["surface_area_um2"] == pytest.approx(crofton(labels > 0, SPACING), rel=5e-3)
    # n equally spaced places have the variance (n * n - 1) / 12
    lengths = sorted(np.sqrt(20 / 12 * (np.array(SHAPE) ** 2.0 - 1)) * SPACING)
    names = ("minor", "intermediate", "major")
    assert [row[f"axis_{name}_length_um"] for name in names] == pytest.approx(lengths)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_no_object(tmp_path, suffix):
    output = write_output(tmp_path / "x.zarr", np.zeros(SHAPE, np.uint32))
    image, atlas = ArrayVolume(pictures(), SPACING), ArrayVolume(np.ones(SHAPE, np.uint16), SPACING)
    path = measure_objects(output, image, table=tmp_path / f"t{suffix}", atlas=atlas, progress=False)
    table = pd.read_parquet(path) if suffix == ".parquet" else pd.read_csv(path)
    assert len(table) == 0
    (tmp_path / "one").mkdir()
    one = measured(tmp_path / "one", np.ones(SHAPE, np.uint32), pictures(), atlas=atlas)
    assert list(table.columns) == list(one.columns)
    if suffix == ".parquet":
        assert list(table.dtypes) == list(one.dtypes)


def test_large_offsets_do_not_blur_the_deviation(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_BLOCK_SIZE", (4, 8, 8))
    labels = crowded()
    noise = np.random.default_rng(4).integers(0, 3, SHAPE)
    table = measured(tmp_path, labels, np.stack([noise, noise * 0]) + 1e9)
    expected = [noise[labels == i].std() for i in table["id"]]
    np.testing.assert_allclose(table["intensity_std_c0"], expected, rtol=1e-6)
    assert (table["intensity_std_c1"] == 0).all()


def test_places_far_from_the_origin_are_exact():
    # 2**20 voxels of a cube that lies where sums of squares leave 64 bits
    side, far = 128, 10**8
    x = np.arange(far, far + side, dtype=object)
    count, total, squares = side**3, int(x.sum()) * side**2, int((x * x).sum()) * side**2
    wrapped = (squares + 2**63) % 2**64 - 2**63
    assert squares > 2**63
    arguments = (np.array([value], np.int64) for value in (count, total, total, wrapped))
    assert object_columns._central_products(*arguments)[0] == count * (side**2 - 1) / 12


def test_files(tmp_path):
    labels, image = crowded(), pictures()
    output = write_output(tmp_path / "x.zarr", labels, image=image)  # the labels, not the copied image, are measured
    zarr.create_array(tmp_path / "in.zarr", data=np.moveaxis(image, 0, -1), chunks=(4, 8, 8, 2))
    path = measure_objects(output, tmp_path / "in.zarr", axes="ZYXC", channels=[1], progress=False)
    assert path == tmp_path / "x.measurements.parquet"
    alone = pd.read_parquet(path)
    assert [name for name in alone if name.startswith("intensity_mean")] == ["intensity_mean_c1"]
    first = path.read_bytes()
    both = measure_objects(output, output, table=tmp_path / "t.csv", progress=False)
    np.testing.assert_array_equal(pd.read_csv(both)["intensity_sum_c1"], alone["intensity_sum_c1"])
    measure_objects(output, tmp_path / "in.zarr", axes="ZYXC", channels=1, progress=False)
    assert path.read_bytes() == first
    names = ["in.zarr", "t.csv", "x.measurements.parquet", "x.zarr"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 5, 9, 4), (1, 0, 0, 0)])
def test_a_voxel_that_is_not_finite_is_named_and_nothing_is_written(tmp_path, monkeypatch, value, place):
    monkeypatch.setattr(measure, "_BLOCK_SIZE", (4, 9, 5))
    image = pictures(dtype=np.float32)
    image[place] = value
    channel, z, y, x = place
    with pytest.raises(ValueError, match=rf"voxel \(channel {channel}, z {z}, y {y}, x {x}\) is {value}; replace"):
        measured(tmp_path, np.ones(SHAPE, np.uint32), image)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zarr"]


def test_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_ROWS", 7)
    table = measured(tmp_path, crowded(), pictures())
    metadata = pq.ParquetFile(tmp_path / "x.measurements.parquet").metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert max(groups) == 7
    assert sum(groups) == len(table)


def test_unknown_spacing_is_null_with_one_warning(tmp_path):
    with pytest.warns(UserWarning, match="spacing is unknown") as caught:
        table = measured(tmp_path, crowded(), pictures(), spacing_um=None)
    assert len(caught) == 1
    unknown = [n for n in table if n.endswith(("_um", "_um2", "_um3")) or n in ("sphericity", "elongation")]
    assert len(unknown) == 8
    assert table[unknown].isna().all(axis=None)
    assert table.drop(columns=unknown).notna().all(axis=None)
    output = tmp_path / "x.zarr"
    path = measure_objects(output, ArrayVolume(pictures()), spacing=SPACING, progress=False)
    (tmp_path / "known").mkdir()
    known = measured(tmp_path / "known", crowded(), pictures())
    pd.testing.assert_frame_equal(pd.read_parquet(path), known, check_exact=True)


def test_a_series_is_measured_one_time_point_at_a_time(tmp_path):
    labels = np.stack([np.ones(SHAPE, np.uint32), np.full(SHAPE, 2, np.uint32)])
    zarr.create_array(tmp_path / "x.zarr", data=labels, dimension_names=["t", "z", "y", "x"])
    image = np.stack([pictures()[0], pictures()[1]])
    zarr.create_array(tmp_path / "in.zarr", data=image, dimension_names=["t", "z", "y", "x"])
    options = {"spacing": SPACING, "progress": False}
    table = pd.read_parquet(measure_objects(tmp_path / "x.zarr", tmp_path / "in.zarr", time=1, **options))
    assert table[["id", "intensity_sum_c0"]].to_numpy().tolist() == [[2, image[1].sum()]]
    zarr.create_array(tmp_path / "more.zarr", data=image[[0, 1, 1]], dimension_names=["t", "z", "y", "x"])
    with pytest.raises(ValueError, match=r"2 time points and the image .* has 3; open the image at the time point"):
        measure_objects(tmp_path / "x.zarr", tmp_path / "more.zarr", time=1, **options)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"output": "none.zarr"}, FileNotFoundError, "output .*none.zarr does not exist"),
        ({"output": "in.zarr"}, ValueError, "output .* has 1 channel.* of float32, no labels; give what seg3d predict"),
        ({"image": "none.tif"}, FileNotFoundError, "none.tif"),
        ({"image": "other.zarr"}, ValueError, r"labels .* \(11, 23, 17\) and the image .* \(11, 23, 16\).*--axes"),
        ({"image": ArrayVolume(pictures(), (4, 1.5, 2))}, ValueError, r"spacing .* and the image .*\(--spacing\)"),
        ({"image": ArrayVolume(pictures()), "channels": [0]}, ValueError, "describe a file"),
        ({"channels": [0, 0]}, ValueError, "channels is .*name each channel once"),
        ({"channels": [3]}, ValueError, "channels=.* is not there"),
        ({"spacing": (1, 0, 1)}, ValueError, "spacing="),
        ({"table": "t.xlsx"}, ValueError, "ends with .parquet or .csv"),
        ({"table": "x.instances.parquet"}, ValueError, "object table of seg3d predict"),
        ({"table": "none/t.csv"}, FileNotFoundError, "folder of table"),
        ({"atlas": ArrayVolume(np.zeros((2, 3, 4), np.uint8))}, ValueError, "atlas; pass atlas_spacing"),
        ({"atlas": ArrayVolume(np.zeros(SHAPE, np.uint8), (4, 1.5, 0.9))}, ValueError, "atlas is 15.3 um long along x"),
        ({"atlas": ArrayVolume(np.zeros(SHAPE, np.float32), SPACING)}, ValueError, "atlas has .* of float32"),
        ({"atlas_spacing": SPACING}, ValueError, "atlas_spacing is given without atlas"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, monkeypatch, change, kind, message):
    monkeypatch.chdir(tmp_path)
    write_output(tmp_path / "x.zarr", crowded())
    zarr.create_array(tmp_path / "in.zarr", data=pictures(dtype=np.float32)[0])
    zarr.create_array(tmp_path / "other.zarr", data=pictures()[0, :, :, :16])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=message):
        measure_objects(**({"output": "x.zarr", "image": "in.zarr", "progress": False} | change))
    assert sorted(tmp_path.iterdir()) == before
