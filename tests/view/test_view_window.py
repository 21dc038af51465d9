"""Layers in real napari: where they lie, what is drawn, what a click tells. A picture needs Qt, a display or Xvfb."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from skimage.io import imread
from view_toys import (
    BRIGHT,
    COARSE,
    SHAPE,
    SPACING,
    WORLD,
    rows,
    spot,
    write_ome,
    write_prediction,
    write_pyramid,
    write_seams,
)

from seg3d_monai.data import ArrayVolume
from seg3d_monai.viewing import build_layers
from seg3d_monai.viewing.layers import TRUTH_COLOR
from seg3d_monai.viewing.window import clicked_text, fill

pytest.importorskip("napari", reason="napari is not installed (extra view)")


def has_qt():
    try:
        import qtpy.QtWidgets  # noqa: F401
    except Exception:
        return False
    return True


def filled(layers):
    from napari.components import ViewerModel

    viewer = ViewerModel()
    fill(viewer, layers)
    return viewer


@pytest.fixture
def specimen(tmp_path):
    labels = [spot(value=1, dtype=np.uint32), spot((6, 10, 14), COARSE, 1, np.uint32)]
    table = rows(BRIGHT, (1, 2, 3), volume_um3=[0.4, 0.8])
    return {
        "image": write_pyramid(tmp_path / "image.zarr"),
        "prediction": write_prediction(tmp_path / "out.zarr", labels, table, [(1, 1, 1), (1, 2, 2)]),
        "truth": write_pyramid(tmp_path / "truth.zarr", 7, np.uint32),
        "seam_report": write_seams(tmp_path / "seams.json", BRIGHT),
    }


@pytest.mark.parametrize("options", [{}, {"color_by": "score"}, {"roi": (2, 5, 11, 6, 20, 20)}, {"level": 1}])
def test_layers_lie_in_the_world_of_napari(specimen, options):
    viewer = filled(build_layers(**specimen, **options))
    names = [layer.name.split(",")[0] for layer in viewer.layers]
    assert names == ["image", "prediction", "truth", "objects", "seams"]
    # Centres of the first and the last voxel.
    low, high = np.zeros(3), np.subtract(SHAPE, 1) * SPACING
    if "roi" in options:
        low, high = (4.0, 2.5, 4.4), (10.0, 9.5, 7.6)
    if "level" in options:
        low, high = (0, 0.25, 0.2), (10.0, 9.25, 10.6)
    for layer in viewer.layers:
        assert [str(unit) for unit in layer.units] == ["micrometer"] * 3
        if layer.name not in ("objects", "seams"):
            np.testing.assert_allclose(layer.extent.world, [low, high], atol=1e-6, err_msg=layer.name)
            assert layer.multiscale is (not options or "color_by" in options)
    assert viewer.layers.selection.active is viewer.layers[1]
    assert viewer.layers[2].contour == 1
    world = viewer.layers["objects"].data_to_world(viewer.layers["objects"].data[0])
    np.testing.assert_allclose(world, WORLD)


def test_what_lies_under_the_mouse(specimen):
    viewer = filled(build_layers(**specimen))
    viewer.dims.set_point(0, WORLD[0])
    for layer in viewer.layers:
        found = layer.get_value(WORLD, world=True)
        expected = {"image": 200, "prediction": 1, "truth": 7, "objects": 0, "seams": 0}[layer.name]
        assert (found[-1] if isinstance(found, tuple) else found) == expected, layer.name
    click = viewer.mouse_drag_callbacks[-1]
    event = SimpleNamespace(position=WORLD, view_direction=None, dims_displayed=[1, 2])
    viewer.layers["seams"].visible = False
    click(viewer, event)
    assert viewer.text_overlay.text.splitlines()[:2] == ["id: 1", "score: 0.5"]
    assert "volume_um3: 0.4" in viewer.text_overlay.text
    event.position = (WORLD[0], 0.0, 0.0)
    click(viewer, event)
    assert viewer.text_overlay.text == ""


def test_rows_of_clicked_objects():
    labels = pd.DataFrame({"score": [0.25, 0.5], "index": [3, 9]})
    assert clicked_text(labels, 9) == "id: 9\nscore: 0.5"
    assert clicked_text(labels, (2, 3)) == "id: 3\nscore: 0.25"
    assert clicked_text(labels, 0) == ""
    assert clicked_text(labels, None) == ""
    assert clicked_text(pd.DataFrame({"kind": ["split"], "id": [4]}), 0) == "id: 4\nkind: split"


@pytest.mark.parametrize("count", [0, 1, 300])
def test_napari_takes_any_number_of_objects(tmp_path, count):
    places = np.random.default_rng(0).integers(0, SHAPE, (count, 3))
    labels = np.zeros(SHAPE, np.uint32)
    labels[tuple(places.T)] = np.arange(1, count + 1)
    made = write_prediction(tmp_path / "out.zarr", [labels], rows(*places))
    seams = write_seams(tmp_path / "seams.json", *places[:2])
    for color_by in (None, "score", "id"):
        layers = build_layers(ArrayVolume(spot(), SPACING), made, color_by=color_by, seam_report=seams)
        assert len(filled(layers).layers["objects"].data) == count


def test_a_series_and_volumes_in_napari(tmp_path, specimen):
    image = write_ome(tmp_path / "series.zarr", [np.stack([spot(at=(t, 9, 14)) for t in range(4)])], axes="tzyx")
    made = write_prediction(
        tmp_path / "moving.zarr",
        [np.stack([spot(at=(t, 9, 14), value=t + 1, dtype=np.uint32) for t in range(4)])],
        rows(*((t, 9, 14) for t in range(4)), time=range(4)),
        axes="tzyx",
    )
    viewer = filled(build_layers(image, made, time="all"))
    viewer.dims.set_point([0, 1], [3, 6.0])
    where = (3, 6.0, 4.5, 5.6)
    assert [layer.get_value(where, world=True) for layer in viewer.layers] == [200, 4, 3]
    for options in ({}, {"roi": (1, 2, 3, 6, 20, 28)}):
        viewer = filled(build_layers(**specimen, **options))
        viewer.dims.ndisplay = 3
        size = (5, 18, 25) if options else (6, 10, 14)  # the coarsest level where there are several
        assert viewer.layers["image"]._slice.image.raw.shape == size
        assert viewer.layers["image"]._slice.image.raw.max() == 200


def nuclei():
    """Two balls, their labels, and predicted ones of which the second is missing."""
    z, y, x = np.indices((9, 60, 80))
    first = (z - 4) ** 2 * 4 + (y - 20) ** 2 + (x - 20) ** 2 < 144
    second = (z - 4) ** 2 * 4 + (y - 40) ** 2 + (x - 60) ** 2 < 144
    image = np.where(first | second, 800, 100).astype(np.uint16)
    return image, (first + 2 * second).astype(np.uint32), first.astype(np.uint32)


@pytest.mark.skipif(not has_qt(), reason="no binding of Qt is installed (extra view)")
@pytest.mark.skipif(
    not (os.environ.get("DISPLAY") or shutil.which("Xvfb")) and sys.platform.startswith("linux"),
    reason="there is neither a display nor Xvfb",
)
def test_a_picture(tmp_path):
    import tifffile

    image, truth, labels = nuclei()
    tifffile.imwrite(tmp_path / "image.tif", image)
    tifffile.imwrite(tmp_path / "truth.tif", truth)
    made = write_prediction(tmp_path / "out.zarr", [labels], rows((4, 20, 20)), spacing=(2, 1, 1))
    command = [sys.executable, "-m", "seg3d_monai", "view", str(tmp_path / "image.tif"), made]
    command += ["--truth", str(tmp_path / "truth.tif"), "--spacing", "[2,1,1]", "--color_by", "score"]
    command += ["--screenshot", str(tmp_path / "view.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    picture = imread(tmp_path / "view.png")[..., :3].astype(int)
    assert picture.shape == (900, 1200, 3)
    # 60 x 80 um fill 95 % of 900 x 1200: 14.25 pixels each.
    outline = (np.abs(picture - np.array(TRUTH_COLOR[:3]) * 255) < 40).all(axis=-1)
    for y, x in ((20, 20), (40, 60)):
        row, column = round(450 + (y - 29.5) * 14.25), round(600 + (x - 39.5) * 14.25)
        window = (slice(row - 12, row + 13), slice(column - 12, column + 13))
        assert not outline[window].any()
        ring = np.argwhere(outline[row - 214 : row + 215, column - 214 : column + 215])
        assert len(ring) > 1000
        np.testing.assert_allclose(ring.mean(axis=0), 214, atol=8)
        radius = np.hypot(*(ring - 214).T) / 14.25
        assert radius.min() > 9
        assert radius.max() < 13.5
    predicted, missed = picture[450 - 42, 322 - 80], picture[600, 892 + 60]
    assert np.ptp(predicted) > 40  # coloured
    assert np.ptp(missed) < 10  # grey
    assert missed.mean() > 100
    assert picture[5, 5].max() < 10
