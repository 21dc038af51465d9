"""What an annotator begins with, and files that tifffile and napari read as they were meant."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
from annotate_toys import SPACING

from seg3d_monai.annotation.export import labels_to_correct, napari_command, write_region
from seg3d_monai.data import open_volume
from seg3d_monai.inference import Instances

WINDOW = (10, 20, 30, 14, 28, 40)  # 4 x 8 x 10
IGNORE = 65535


def bars(*columns: tuple[int, int, float, int]) -> Instances:
    """Instances that fill the window along z and y: first and last + 1 along x, score, class."""
    return Instances(
        boxes=np.array([(0, 0, a, 4, 8, b) for a, b, _, _ in columns], float).reshape(-1, 6),
        scores=np.array([score for *_, score, _ in columns]),
        classes=np.array([kind for *_, kind in columns], np.int64),
        masks=[np.ones((4, 8, b - a), bool) for a, b, _, _ in columns],
    )


def line(labels: np.ndarray) -> list[int]:
    """The labels along x, which are the same everywhere."""
    assert (labels == labels[:1, :1]).all()
    return labels[0, 0].tolist()


def test_predictions_where_nothing_is_annotated() -> None:
    found = bars((0, 3, 0.6, 0), (2, 5, 0.9, 1), (6, 9, 0.4, 0))
    labels, known_ids, classes = labels_to_correct(found, WINDOW, None, IGNORE, accept_score=0.5)
    assert line(labels) == [2, 2, 1, 1, 1, 0, 0, 0, 0, 0]  # the higher score has the voxel that both claim
    assert (labels.dtype, known_ids, classes) == (np.uint32, (), {1: 1, 2: 0})


def test_zero_instances() -> None:
    labels, known_ids, classes = labels_to_correct(Instances.empty(), WINDOW, None, IGNORE, 0.5)
    assert (labels.any(), labels.shape, known_ids, classes) == (False, (4, 8, 10), (), {})


def test_what_is_annotated_stays_and_predictions_fill_the_rest() -> None:
    known = np.zeros((4, 8, 10), np.uint16)
    known[..., :2], known[..., 2:4], known[..., 5:] = 700, 30, IGNORE
    # The first lies on annotated voxels for the most part, the second not, the third nowhere on them.
    found = bars((2, 6, 0.9, 0), (4, 8, 0.8, 0), (8, 10, 0.7, 0))
    labels, known_ids, classes = labels_to_correct(found, WINDOW, known, IGNORE, 0.5)
    assert known_ids == (30, 700)
    assert line(labels) == [2, 2, 1, 1, 0, 3, 3, 3, 4, 4]
    assert classes == {3: 0, 4: 0}


def test_nothing_or_everything_unannotated() -> None:
    found = bars((0, 4, 0.9, 0))
    known = np.full((4, 8, 10), IGNORE, np.uint16)
    labels, known_ids, _ = labels_to_correct(found, WINDOW, known, IGNORE, 0.5)
    assert (line(labels), known_ids) == ([1] * 4 + [0] * 6, ())
    labels, known_ids, _ = labels_to_correct(found, WINDOW, np.full_like(known, 5), IGNORE, 0.5)
    assert (line(labels), known_ids) == ([1] * 10, (5,))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_files_hold_the_same_voxels_and_their_size(tmp_path: Path, dtype: type) -> None:
    image = np.random.default_rng(0).integers(0, 200, (2, 4, 8, 10)).astype(dtype)
    labels = np.arange(320, dtype=np.uint32).reshape(4, 8, 10)
    names = write_region(
        tmp_path / "001",
        image=image,
        labels=labels,
        roi=(11, 21, 31, 13, 28, 40),
        window=WINDOW,
        spacing_um=SPACING,
        classes={2: 1, 1: 0},
    )
    assert names == ["image_0.tif", "image_1.tif", "margin.tif", "labels.tif"]
    expected = np.ones((4, 8, 10), bool)
    expected[1:3, 1:, 1:] = False
    for name, array in zip(names, [image[0], image[1], expected, labels], strict=True):
        volume = open_volume(tmp_path / "001" / name)
        assert volume.spacing_um == SPACING
        np.testing.assert_array_equal(volume.read((0, 0, 0, 4, 8, 10))[0], array)
    assert (tmp_path / "001" / "classes.csv").read_text().split() == ["id,class", "1,0", "2,1"]


def test_without_margin_classes_or_spacing(tmp_path: Path) -> None:
    image, labels = np.zeros((1, 4, 8, 10), np.int32), np.zeros((4, 8, 10), np.uint32)
    names = write_region(
        tmp_path / "1", image=image, labels=labels, roi=WINDOW, window=WINDOW, spacing_um=None, classes={}
    )
    assert names == ["image.tif", "labels.tif"]
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == names
    assert tifffile.imread(tmp_path / "1" / "image.tif").dtype == np.float32  # int32 would open as labels
    assert napari_command(Path("a b"), names, None) == "napari 'a b/image.tif' 'a b/labels.tif'"


def test_the_same_voxels_give_the_same_bytes(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 999, (1, 4, 8, 10)).astype(np.uint16)
    labels = np.ones((4, 8, 10), np.uint32)
    contents = []
    for name in ("a", "b"):
        files = write_region(
            tmp_path / name, image=image, labels=labels, roi=WINDOW, window=WINDOW, spacing_um=SPACING, classes={}
        )
        contents.append([(tmp_path / name / file).read_bytes() for file in files])
    assert contents[0] == contents[1]


def test_napari_opens_image_and_labels_at_the_right_scale_and_saves_ids(tmp_path: Path) -> None:
    """As the command line does it: paths, and scale as a layer's argument."""
    components = pytest.importorskip("napari.components")
    plugins = pytest.importorskip("napari.plugins")
    image = np.random.default_rng(0).integers(0, 999, (2, 4, 8, 10)).astype(np.uint16)
    labels = np.zeros((4, 8, 10), np.uint32)
    labels[1:3, 2:5, 3:7] = 7
    roi = (11, 21, 31, 13, 27, 39)
    names = write_region(
        tmp_path / "001", image=image, labels=labels, roi=roi, window=WINDOW, spacing_um=SPACING, classes={}
    )
    words = shlex.split(napari_command(tmp_path / "001", names, SPACING))
    assert words[0] == "napari"
    assert words[-2:] == ["--scale", "(2,0.5,0.25)"]
    plugins._initialize_plugins()
    viewer = components.ViewerModel()
    viewer.open(words[1:-2], plugin="napari", scale=(2, 0.5, 0.25))
    assert [(layer.name, type(layer).__name__) for layer in viewer.layers] == [
        ("image_0", "Image"),
        ("image_1", "Image"),
        ("margin", "Labels"),
        ("labels", "Labels"),
    ]
    for layer in viewer.layers:
        assert layer.scale.tolist() == [2, 0.5, 0.25]
        assert layer.data.shape == (4, 8, 10)
    layer = viewer.layers["labels"]
    assert isinstance(layer.data, np.ndarray)  # in memory, so that it can be painted on
    assert viewer.layers.selection.active is layer
    layer.paint((1, 6, 8), 8)
    layer.save(str(tmp_path / "001" / "labels.tif"), plugin="napari")
    saved = open_volume(tmp_path / "001" / "labels.tif", axes="ZYX")  # four planes are saved as samples of one
    assert saved.dtype.kind in "iu"
    np.testing.assert_array_equal(saved.read((0, 0, 0, 4, 8, 10))[0], layer.data)
