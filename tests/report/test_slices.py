"""The picture: outlines counted by hand, proportions, colours, refusals."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from seg3d_monai.report import save_slices
from seg3d_monai.report.slices import outline_segments, slices_figure


def test_outlines_of_two_touching_instances() -> None:
    plane = np.array([[0, 0, 0, 0], [0, 1, 2, 0], [0, 1, 2, 2]])
    segments = {tuple(map(tuple, segment)) for segment in outline_segments(plane).astype(int).tolist()}
    assert segments == {
        ((1, 1), (1, 3)),  # above both
        ((2, 3), (2, 4)),  # above the voxel that sticks out
        ((1, 1), (3, 1)),  # left of 1
        ((1, 2), (3, 2)),  # between 1 and 2
        ((1, 3), (2, 3)),  # right of 2
    }


def test_no_outline_without_instances_or_in_one_voxel() -> None:
    assert outline_segments(np.zeros((3, 5), int)).shape == (0, 2, 2)
    assert outline_segments(np.ones((1, 1), int)).shape == (0, 2, 2)


def make() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(100, 120, (6, 30, 50)).astype(np.uint16)
    truth = np.zeros(image.shape, dtype=np.uint32)
    truth[1:5, 8:22, 10:22] = 1
    truth[1:5, 8:22, 22:40] = 2
    prediction = np.roll(truth, 2, axis=1)
    return image + 200 * (truth > 0).astype(np.uint16), truth, prediction


def count(picture: np.ndarray, red: float, green: float, blue: float) -> int:
    """Pixels of that hue: thin lines are mixed with the black around and the grey below."""
    rgb = picture[..., :3]
    chroma = rgb - rgb.min(-1, keepdims=True)
    wanted = np.array((red, green, blue)) - min(red, green, blue)
    strength = np.linalg.norm(chroma, axis=-1)
    cosine = chroma @ wanted / np.maximum(strength * np.linalg.norm(wanted), 1e-6)
    return int(((strength > 0.3) & (cosine > 0.97)).sum())


def test_the_picture_has_both_colours_and_physical_proportions(tmp_path: Path) -> None:
    image, truth, prediction = make()
    path = save_slices(tmp_path / "new" / "a.png", image, truth, prediction, (4.0, 1.0, 1.0), "A title")
    picture = imread(path)
    assert count(picture, 1.0, 0.69, 0.0) > 200
    assert count(picture, 0.21, 0.79, 1.0) > 200
    # 50 + 24 um wide, 30 + 24 um high, and a gap of both: wider than high by that ratio but for margins.
    assert picture.shape[1] / picture.shape[0] == pytest.approx((50 + 24) / (30 + 24), rel=0.12)
    flat = imread(save_slices(tmp_path / "b.png", image, truth, prediction, (1.0, 1.0, 1.0)))
    assert flat.shape[1] / flat.shape[0] == pytest.approx((50 + 6) / (30 + 6), rel=0.15)
    assert not list(tmp_path.rglob(".partial*"))


def test_truth_or_prediction_may_be_missing(tmp_path: Path) -> None:
    image, truth, prediction = make()
    picture = imread(save_slices(tmp_path / "a.png", image, None, prediction, (4.0, 1.0, 1.0)))
    assert count(picture, 1.0, 0.69, 0.0) == 0
    assert count(picture, 0.21, 0.79, 1.0) > 200
    picture = imread(save_slices(tmp_path / "b.png", image, truth, None))
    assert count(picture, 1.0, 0.69, 0.0) > 200
    picture = imread(save_slices(tmp_path / "c.png", image, np.zeros_like(truth), None))
    assert picture.shape[2] >= 3


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    image, truth, prediction = make()
    first = save_slices(tmp_path / "a.png", image, truth, prediction)
    second = save_slices(tmp_path / "b.png", image, truth, prediction)
    assert first.read_bytes() == second.read_bytes()


def test_a_channel_and_a_position_are_chosen(tmp_path: Path) -> None:
    image, truth, _ = make()
    stacked = np.stack([np.zeros_like(image), image])
    alone = save_slices(tmp_path / "a.png", image, truth, None, position=(2, 10, 20))
    chosen = save_slices(tmp_path / "b.png", stacked, truth, None, channel=1, position=(2, 10, 20))
    other = save_slices(tmp_path / "c.png", stacked, truth, None, position=(2, 10, 20))
    assert alone.read_bytes() == chosen.read_bytes()
    assert alone.read_bytes() != other.read_bytes()


def drawn_words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_places_are_those_of_the_volume() -> None:
    image, truth, _ = make()
    words = drawn_words(slices_figure(image, truth, None, position=(2, 10, 20), origin=(100, 1000, 7)))
    assert words == ["YX  z = 102", "XZ  y = 1010", "YZ  x = 27"]


def test_a_small_picture_keeps_the_size_of_its_words() -> None:
    image, truth, prediction = make()
    small = slices_figure(image, truth, prediction, (4.0, 1.0, 1.0), longest_inch=2.0, has_key=False)
    assert max(small.get_size_inches()) < 2.5
    assert {text.get_fontsize() for axes in small.axes for text in axes.texts} == {8.0}
    assert small.legends == []
    assert len(slices_figure(image, truth, prediction).legends) == 1


def test_a_projection_does_not_break_outlines_in_noise() -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((20, 40, 40), int)
    labels[5:12, 10:30, 10:30] = 1
    image = rng.normal(0, 1, labels.shape) + 2.0 * (labels > 0)
    figure = slices_figure(image, labels, None, projects=True)
    plan = figure.axes[0].collections[0].get_segments()
    # The four sides of the square are 80 edges of pixels; those of the brightest raw voxels are 1.45 times as many.
    length = sum(float(np.abs(np.diff(segment, axis=0)).sum()) for segment in plan)
    assert length < 1.15 * 80


def test_one_voxel_and_a_flat_image(tmp_path: Path) -> None:
    one = np.zeros((1, 1, 1), dtype=np.float32)
    assert save_slices(tmp_path / "a.png", one, one.astype(int), None, (2.0, 1.0, 1.0)).stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.zeros((3, 4))}, "image"),
        ({"image": np.zeros((0, 3, 4))}, "empty"),
        ({"truth": np.zeros((2, 3, 5), int)}, "truth has shape"),
        ({"prediction": np.zeros((4, 3, 2), int)}, "prediction has shape"),
        ({"spacing_um": (1.0, 2.0)}, "spacing_um"),
        ({"image": np.zeros((2, 2, 3, 4)), "channel": 2}, "channel=2"),
        ({"position": (0, 0, 4)}, "position"),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str, tmp_path: Path) -> None:
    arguments = {"image": np.zeros((2, 3, 4)), "truth": None, "prediction": None, **options}
    with pytest.raises(ValueError, match=message):
        save_slices(tmp_path / "a.png", **arguments)
    assert list(tmp_path.iterdir()) == []
