"""Where layers lie in the world, counted by hand; what they show of files, tables and options."""

import numpy as np
import pandas as pd
import pytest
import tifffile
from view_toys import (
    BRIGHT,
    COARSE,
    COARSE_WORLD,
    SHAPE,
    SPACING,
    WORLD,
    CountingVolume,
    bright_world,
    by_name,
    rows,
    spot,
    write_ome,
    write_prediction,
    write_pyramid,
    write_seams,
)

from seg3d_monai.data import ArrayVolume
from seg3d_monai.viewing import build_layers


@pytest.fixture
def specimen(tmp_path):
    """Image and truth with two levels, a prediction with the same, its table and a report of seams."""
    labels = [spot(value=1, dtype=np.uint32), spot((6, 10, 14), COARSE, 1, np.uint32)]
    factors = [(1, 1, 1), (1, 2, 2)]
    return {
        "image": write_pyramid(tmp_path / "image.zarr"),
        "prediction": write_prediction(tmp_path / "out.zarr", labels, rows(BRIGHT), factors),
        "truth": write_pyramid(tmp_path / "truth.zarr", 7, np.uint32),
        "seam_report": write_seams(tmp_path / "seams.json", BRIGHT),
    }


def test_a_voxel_its_labels_its_row_and_its_seam_coincide(specimen):
    layers = by_name(build_layers(**specimen))
    assert list(layers) == ["image", "prediction", "truth", "objects", "seams"]
    for name, layer in layers.items():
        np.testing.assert_allclose(bright_world(layer), [WORLD], err_msg=name)
        assert layer.options["units"] == ("um",) * 3
        assert layer.options["axis_labels"] == ("z", "y", "x")
        assert layer.options["scale"] == SPACING
    assert [level.shape for level in layers["image"].data] == [SHAPE, (6, 10, 14)]
    assert [level.shape for level in layers["prediction"].data] == [SHAPE, (6, 10, 14)]


@pytest.mark.parametrize("roi", [(2, 5, 11, 6, 20, 20), (*BRIGHT, 4, 10, 15), (0, 0, 0, *SHAPE)])
def test_they_coincide_in_a_region(specimen, roi):
    layers = by_name(build_layers(**specimen, roi=roi))
    size = tuple(b - a for a, b in zip(roi[:3], roi[3:], strict=True))
    for name, layer in layers.items():
        np.testing.assert_allclose(bright_world(layer), [WORLD], err_msg=name)
        if layer.kind != "points":
            assert layer.data.shape == size
            np.testing.assert_allclose(layer.options["translate"], np.multiply(roi[:3], SPACING))


def test_they_coincide_at_level_1(specimen):
    layers = by_name(build_layers(**specimen, level=1))
    for name in ("image", "prediction", "truth"):
        assert layers[name].data.shape == (6, 10, 14)
        np.testing.assert_allclose(layers[name].options["scale"], (2.0, 1.0, 0.8))
        np.testing.assert_allclose(layers[name].options["translate"], (0.0, 0.25, 0.2))
        np.testing.assert_allclose(bright_world(layers[name]), [COARSE_WORLD])
    # The table counts voxels of full resolution.
    np.testing.assert_allclose(bright_world(layers["objects"]), [WORLD])


def test_they_coincide_in_a_region_of_level_1(specimen):
    layers = by_name(build_layers(**specimen, level="1", roi=(1, 3, 6, 5, 6, 10)))
    for name in ("image", "prediction", "truth"):
        assert layers[name].data.shape == (4, 3, 4)
        np.testing.assert_allclose(layers[name].options["translate"], (2.0, 3.25, 5.0))
        np.testing.assert_allclose(bright_world(layers[name]), [COARSE_WORLD])
    np.testing.assert_allclose(bright_world(layers["objects"]), [WORLD])


def test_a_prediction_of_level_1_lies_on_the_image_at_any_level(specimen, tmp_path):
    table = rows(COARSE)
    made = write_prediction(
        tmp_path / "coarse.zarr", [spot((6, 10, 14), COARSE, 1, np.uint32)], table, spacing=(2.0, 1.0, 0.8)
    )
    for options in ({}, {"level": 1}, {"roi": (2, 8, 14, 6, 10, 16)}, {"level": 1, "roi": (3, 4, 7, 4, 5, 8)}):
        layers = by_name(build_layers(specimen["image"], made, **options))
        for name in ("prediction", "objects"):
            np.testing.assert_allclose(bright_world(layers[name]), [COARSE_WORLD], err_msg=f"{name} {options}")


def test_labels_without_levels_lie_on_a_coarse_image(specimen, tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", spot(value=3, dtype=np.uint8))
    layers = by_name(build_layers(specimen["image"], truth=tmp_path / "flat.tif", level=1, roi=(1, 3, 6, 5, 6, 10)))
    assert layers["truth"].data.shape == (4, 6, 8)
    np.testing.assert_allclose(bright_world(layers["truth"]), [WORLD])


def test_an_odd_extent_has_whole_factors(tmp_path):
    levels = [spot((5, 7, 9), (4, 6, 8)), spot((3, 4, 5), (2, 3, 4))]
    image = write_ome(tmp_path / "odd.zarr", levels, [(1, 1, 1), (2, 2, 2)])
    (layer,) = build_layers(image, level=1)
    np.testing.assert_allclose(layer.options["scale"], (4.0, 1.0, 0.8))
    np.testing.assert_allclose(bright_world(layer), [(9.0, 3.25, 3.4)])  # voxel 4.5, 6.5, 8.5
    flat = [ArrayVolume(levels[0], SPACING), ArrayVolume(levels[1])]  # nothing tells the factors but the extents
    (layer,) = build_layers(flat, level=1)
    np.testing.assert_allclose(bright_world(layer), [(9.0, 3.25, 3.4)])


@pytest.mark.parametrize("count", [0, 1, 500])
def test_any_number_of_objects(tmp_path, count):
    generator = np.random.default_rng(0)
    places = generator.integers(0, SHAPE, (count, 3))
    labels = np.zeros(SHAPE, np.uint32)
    labels[tuple(places.T)] = np.arange(1, count + 1)
    made = write_prediction(tmp_path / "out.zarr", [labels], rows(*places))
    layers = by_name(build_layers(ArrayVolume(spot(), SPACING), made))
    assert layers["objects"].data.shape == (count, 3)
    assert layers["objects"].options["features"]["id"].tolist() == list(range(1, count + 1))
    assert layers["prediction"].options["features"]["index"].tolist() == list(range(1, count + 1))
    np.testing.assert_array_equal(np.asarray(layers["prediction"].data), labels)


@pytest.mark.parametrize("count", [0, 1, 500])
def test_labels_and_points_are_coloured_alike(tmp_path, count):
    table = rows(*np.zeros((count, 3)))
    made = write_prediction(tmp_path / "out.zarr", [spot(value=1, dtype=np.uint32)], table)
    layers = build_layers(ArrayVolume(spot(), SPACING), made, color_by="score")
    labels, points = layers[1], layers[2]
    colors = labels.options["colormap"]
    assert colors[0] == (0, 0, 0, 0)
    assert None in colors
    assert len(colors) == count + 2
    if count:
        np.testing.assert_allclose([colors[i + 1] for i in range(count)], points.options["face_color"])
    if count == 500:
        assert labels.options["name"] == "prediction, score 0.5 to 0.9"
        # viridis: violet for the lowest, yellow for the highest
        np.testing.assert_allclose(colors[1][:3], (0.267, 0.005, 0.329), atol=0.001)
        np.testing.assert_allclose(colors[500][:3], (0.993, 0.906, 0.144), atol=0.001)


def test_a_region_keeps_the_rows_of_what_reaches_into_it(specimen, tmp_path):
    table = rows((3, 9, 14), (3, 9, 18), (3, 2, 14)).assign(x1=[14, 15, 14], x2=[15, 25, 15])
    made = write_prediction(tmp_path / "many.zarr", [spot(value=1, dtype=np.uint32)], table)
    layers = by_name(build_layers(specimen["image"], made, roi=(0, 8, 12, 6, 12, 16)))
    assert layers["objects"].options["features"]["id"].tolist() == [1]
    assert layers["prediction"].options["features"]["index"].tolist() == [1, 2]


def test_channels_are_layers_of_their_own(tmp_path):
    array = np.stack([spot(value=value) for value in (10, 20, 30)])
    image = write_ome(tmp_path / "many.zarr", [array], axes="czyx")
    layers = build_layers(image)
    assert [layer.options["name"] for layer in layers] == ["channel 0", "channel 1", "channel 2"]
    assert len({layer.options["colormap"] for layer in layers}) == 3
    assert [int(np.asarray(layer.data).max()) for layer in layers] == [10, 20, 30]
    for layer in layers:
        np.testing.assert_allclose(bright_world(layer), [WORLD])
    two = build_layers(image, channels=[2, 0])
    assert [int(np.asarray(layer.data).max()) for layer in two] == [30, 10]
    (one,) = build_layers(image, channels=1)
    assert one.options["name"] == "image"
    assert int(np.asarray(one.data).max()) == 20


def test_a_series(tmp_path):
    places = [(0, 1, 2), (3, 9, 14), (5, 19, 27)]
    array = np.stack([np.stack([spot(at=at, value=value) for value in (5, 6)]) for at in places])
    labels = np.stack([spot(at=at, value=number, dtype=np.uint32) for number, at in enumerate(places, 1)])
    image = write_ome(tmp_path / "series.zarr", [array], axes="tczyx")
    made = write_prediction(tmp_path / "out.zarr", [labels], rows(*places, time=[0, 1, 2]), axes="tzyx")
    layers = by_name(build_layers(image, made, time="all"))
    expected = [(t, *np.multiply(at, SPACING)) for t, at in enumerate(places)]
    for name in ("channel 0", "channel 1", "prediction", "objects"):
        np.testing.assert_allclose(bright_world(layers[name]), expected, err_msg=name)
        assert layers[name].options["axis_labels"] == ("t", "z", "y", "x")
    one = by_name(build_layers(image, made, time=2))
    for name in ("channel 0", "channel 1", "prediction", "objects"):
        np.testing.assert_allclose(bright_world(one[name]), [np.multiply(places[2], SPACING)], err_msg=name)
    with pytest.raises(ValueError, match="time=3 is not there"):
        build_layers(image, made, time=3)


def test_a_prediction_of_some_time_points(tmp_path):
    image = write_ome(tmp_path / "series.zarr", [np.stack([spot()] * 4)], axes="tzyx")
    labels = np.stack([spot(value=number, dtype=np.uint32) for number in (1, 2)])
    made = write_prediction(tmp_path / "out.zarr", [labels], rows(BRIGHT, BRIGHT, time=[1, 3]), axes="tzyx")
    layers = by_name(build_layers(image, made, time=3))
    assert int(np.asarray(layers["prediction"].data).max()) == 2
    assert layers["objects"].options["features"]["id"].tolist() == [2]
    with pytest.raises(ValueError, match=r"time=2 was not predicted; choose from \[1, 3\]"):
        build_layers(image, made, time=2)


def test_truth_that_is_not_annotated_is_not_shown():
    for dtype, ignore in ((np.uint16, 65535), (np.int32, -1)):
        labels = np.full(SHAPE, ignore, dtype)
        labels[BRIGHT] = 4
        layers = by_name(build_layers(ArrayVolume(spot(), SPACING), truth=ArrayVolume(labels)))
        np.testing.assert_allclose(bright_world(layers["truth"]), [WORLD])
    layers = by_name(build_layers(ArrayVolume(spot(), SPACING), truth=ArrayVolume(spot(value=True, dtype=bool))))
    assert layers["truth"].data.dtype == np.uint8
    np.testing.assert_allclose(bright_world(layers["truth"]), [WORLD])


def test_contrast_is_of_the_middle():
    array = np.full((40, 300, 310), 60000, np.uint16)
    array[12:28, 22:278, 27:283] = np.arange(256)
    (layer,) = build_layers(ArrayVolume(array, SPACING))
    np.testing.assert_allclose(layer.options["contrast_limits"], np.percentile(np.arange(256), (1, 99.8)), atol=1)
    assert layer.options["metadata"]["seen"] == (0, 255)
    (flat,) = build_layers(ArrayVolume(np.full(SHAPE, 7, np.uint8), SPACING))
    assert flat.options["contrast_limits"] == (7, 8)
    (empty,) = build_layers(ArrayVolume(np.full(SHAPE, np.nan, np.float32), SPACING))
    assert empty.options["contrast_limits"] == (0, 1)


def test_a_huge_volume_is_read_as_it_comes_into_sight():
    image, labels = CountingVolume((1, 20000, 20000, 20000)), CountingVolume((1, 20000, 20000, 20000), np.uint32)
    layers = build_layers(image, labels)
    assert image.num_voxels == 16 * 256 * 256  # the sample for the contrast
    assert labels.num_voxels == 0
    image.num_voxels = 0
    part = layers[0].data[7000][300:400, 50:250]
    assert image.num_voxels == 0
    assert (np.asarray(part) == 7000).all()
    assert image.num_voxels == 100 * 200
    with pytest.raises(ValueError, match="GB would have to be read at once"):
        np.asarray(layers[1].data)


def test_voxel_sizes(tmp_path, caplog):
    (layer,) = build_layers(ArrayVolume(spot()))
    assert layer.options["units"] == ("pixel",) * 3
    assert layer.options["scale"] == (1, 1, 1)
    assert "the voxel size is unknown" in caplog.text
    labels = ArrayVolume(spot(value=1), SPACING)
    assert build_layers(ArrayVolume(spot()), labels)[0].options["scale"] == SPACING
    assert build_layers(ArrayVolume(spot(), SPACING), spacing=(1, 3, 4))[0].options["scale"] == (1, 3, 4)
    image = write_pyramid(tmp_path / "image.zarr")
    (layer,) = build_layers(image, level=1, spacing=(4, 2, 2))  # of the level
    np.testing.assert_allclose(layer.options["scale"], (4, 2, 2))
    np.testing.assert_allclose(layer.options["translate"], (0, 0.5, 0.5))
    caplog.clear()
    build_layers(ArrayVolume(spot(), SPACING), ArrayVolume(spot(value=1), (1, 1, 1)))
    assert "the first is taken" in caplog.text


def test_a_table_of_measurements_takes_the_centroids_of_the_prediction(specimen, tmp_path):
    pd.DataFrame({"id": [1], "sphericity": [0.75]}).to_csv(tmp_path / "measured.csv", index=False)
    layers = by_name(
        build_layers(specimen["image"], specimen["prediction"], table=tmp_path / "measured.csv", color_by="sphericity")
    )
    assert layers["objects"].options["features"]["sphericity"].tolist() == [0.75]
    np.testing.assert_allclose(bright_world(layers["objects"]), [WORLD])


def test_labels_of_an_ome_zarr_that_also_has_the_image(tmp_path):
    write_prediction(tmp_path / "out.zarr", [spot(value=5, dtype=np.uint32)], rows(BRIGHT))
    write_ome(tmp_path / "both.zarr", [spot(value=900)])
    (tmp_path / "out.zarr" / "labels").rename(tmp_path / "both.zarr" / "labels")
    for path in (tmp_path / "both.zarr", str(tmp_path / "both.zarr")):
        layers = by_name(build_layers(path, path, truth=path))
        assert [int(np.asarray(layer.data).max()) for layer in layers.values()] == [900, 5, 5]
    with pytest.raises(FileNotFoundError, match=r"none\.zarr' does not exist"):
        build_layers(tmp_path / "both.zarr", tmp_path / "none.zarr")


def test_a_table_alone_counts_voxels_of_the_level(specimen, tmp_path):
    rows(COARSE).to_csv(tmp_path / "coarse.csv")
    layers = by_name(build_layers(specimen["image"], table=tmp_path / "coarse.csv", level=1))
    np.testing.assert_allclose(bright_world(layers["objects"]), [COARSE_WORLD])


def test_kinds_have_colours_of_their_own(tmp_path):
    table = rows(*np.zeros((4, 3)), touches_border=[True, False, True, False], kind=["a", "b", None, "a"])
    made = write_prediction(tmp_path / "out.zarr", [spot(value=1, dtype=np.uint32)], table)
    image = ArrayVolume(spot(), SPACING)
    colors = build_layers(image, made, color_by="touches_border")[1].options["colormap"]
    assert colors[1] == colors[3]
    assert colors[2] == colors[4]
    assert colors[1] != colors[2]
    colors = build_layers(image, made, color_by="kind")[1].options["colormap"]
    assert colors[1] == colors[4]
    assert colors[3] == (0.5, 0.5, 0.5, 1)
