"""Statistics of images against hand-made ones; a recipe found again from an image of it."""

from dataclasses import replace

import numpy as np
import pytest

from seg3d_monai.data.synthesis import Recipe, SyntheticStack, match_recipe, measure
from seg3d_monai.data.synthesis.noise import gaussian
from seg3d_monai.data.synthesis.statistics import SMOOTHING


def test_noise_is_that_of_white_noise_whatever_lies_beneath() -> None:
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.arange(n) for n in (20, 60, 70)), indexing="ij")
    beneath = 300 * np.sin(y / 9) + 200 * np.sin(x / 13 + z) + 4 * y * x / 70
    for sigma in (5.0, 40.0):
        image = beneath + sigma * rng.standard_normal(beneath.shape)
        found = measure(image)
        assert found.noise * (found.high - found.low) == pytest.approx(sigma, rel=0.05)


def test_white_noise_is_as_strong_along_z_as_within_planes() -> None:
    image = 7 + 3 * np.random.default_rng(1).standard_normal((30, 50, 60))
    found = measure(image)
    assert np.array([found.noise, found.axial_noise]) * (found.high - found.low) == pytest.approx([3, 3], rel=0.03)


def test_planes_that_were_interpolated_have_less_noise_along_z() -> None:
    planes = 5 * np.random.default_rng(2).standard_normal((31, 60, 70))
    found = measure((planes[1:] + planes[:-1]) / 2)
    scale = found.high - found.low
    # The mean of two planes; its second differences along z weigh 1/2, -1/2, -1/2, 1/2.
    assert found.noise * scale == pytest.approx(5 / 2**0.5, rel=0.03)
    assert found.axial_noise * scale == pytest.approx(5 / 6**0.5, rel=0.03)


@pytest.mark.parametrize("sigma", [(2.0, 2.0, 2.0), (4.5, 2.0, 2.0), (1.5, 3.0, 3.0), (3.0, 1.5, 2.5)])
@pytest.mark.parametrize("glow", [0.0, 0.5])
def test_blobs_are_as_long_and_as_wide_as_they_are(sigma: tuple[float, float, float], glow: float) -> None:
    shape = (60, 64, 72)
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    rng = np.random.default_rng(3)
    image = 100 + glow * 100 * np.sin(x / 25) * np.sin(z / 20) + rng.standard_normal(shape)
    for middle in ((15, 16, 18), (15, 48, 54), (45, 16, 54), (45, 48, 18)):
        square = sum(((place - m) / s) ** 2 for place, m, s in zip((z, y, x), middle, sigma, strict=True))
        image = image + 500 * np.exp(-square / 2)
    found = measure(image)
    through = np.sqrt(np.square(sigma) + SMOOTHING**2)  # of the filter against noise
    assert found.elongation == pytest.approx(through[0] / through[1:].mean(), rel=0.08)
    # A Gaussian's autocorrelation falls to half at 2 sqrt(ln 2) standard deviations, sooner where its foot is cut off.
    whole = 2 * np.log(2) ** 0.5 * np.array([through[0], through[1:].mean()])
    assert (found.widths > 0.55 * whole).all()
    assert (found.widths < whole).all()


def test_a_distance_of_one_third_of_a_half_is_objects_of_twice_the_length() -> None:
    one = measure(np.random.default_rng(0).normal(size=(16, 20, 20)))
    assert one.distance(replace(one, widths=one.widths * [2, 1])) == pytest.approx(1 / 12)
    assert one.distance(replace(one, axial_noise=one.axial_noise * 10)) == pytest.approx(1 / 6)


def neighbours(grain: float) -> float:
    """Correlation of the noise of neighbouring voxels."""
    weights = np.array(gaussian(grain))
    return float((weights[1:] * weights[:-1]).sum() / (weights**2).sum())


def test_how_far_objects_are_drawn_out_along_z_is_found_again() -> None:
    fixed = {
        "voxels": {"plane_um": 1.0, "anisotropy": 1.0},
        "objects": {"diameter_um": 4.0, "fill": 0.04},
        "stain": {"brightness_spread": 0.3},
    }
    optics = {"psf_um": 1.1, "scatter": 1.0, "haze": 0.0}
    camera = {"photons": 200.0}
    start = Recipe({**fixed, "optics": {**optics, "psf_ratio": [1.0, 8.0]}, "camera": {**camera, "grain": [0.0, 0.9]}})
    for ratio, grain in ((1.5, 0.6), (5.0, 0.0)):
        truth = Recipe({**fixed, "optics": {**optics, "psf_ratio": ratio}, "camera": {**camera, "grain": grain}})
        image, _ = SyntheticStack(truth.scene(4), (32, 56, 56)).whole()
        found = match_recipe(image[0], (1, 1, 1), start, rounds=2, num_scenes=30, num_kept=4, crop_size=image[0].shape)
        assert ratio / 1.3 < found.scene.optics.psf_ratio < ratio * 1.3
        assert found.found.elongation == pytest.approx(found.wanted.elongation, rel=0.15)
        assert (neighbours(found.scene.camera.grain) > 0.15) == (neighbours(grain) > 0.15)


def test_offset_gain_and_type_play_no_part() -> None:
    image = np.random.default_rng(0).gamma(2.0, 50.0, (12, 30, 20)).round()
    one, other = measure(image), measure((image * 3 + 700).astype(np.uint16))
    assert one.distance(other) == pytest.approx(0, abs=1e-4)
    assert (other.low, other.high) == pytest.approx((3 * one.low + 700, 3 * one.high + 700))


def test_a_wave_has_its_power_in_its_band() -> None:
    for axis, name, bands in ((0, "axial_power", 6), (1, "plane_power", 8), (2, "plane_power", 8)):
        for cycles in (0.1, 0.35):
            places = np.arange(48).reshape([-1 if a == axis else 1 for a in range(3)])
            image = np.broadcast_to(np.sin(2 * np.pi * cycles * places), (48, 48, 48))
            power = getattr(measure(image), name)
            assert power.argmax() == int(cycles * 2 * bands)


def test_a_distance_of_one_is_a_different_image() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(16, 40, 40))
    assert measure(image).distance(measure(rng.normal(size=(16, 40, 40)))) < 0.05
    assert measure(image).distance(measure(np.cumsum(np.cumsum(image, 1), 2))) > 0.5


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((9, 9)), "has shape"),
        (np.zeros((7, 20, 20)), "eight voxels"),
        (np.full((9, 9, 9), 3.0), "is constant"),
    ],
)
def test_images_without_statistics(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(image)


def test_a_recipe_is_found_again() -> None:
    truth = Recipe(
        {
            "voxels": {"plane_um": 0.7, "anisotropy": 2.0},
            "objects": {"diameter_um": 9.0, "fill": 0.3},
            "camera": {"photons": 60.0, "offset": 400, "gain": 1.5},
            "optics": {"psf_um": 0.5},
        }
    ).scene(3)
    image, _ = SyntheticStack(truth, (30, 60, 60)).whole()
    start = Recipe(
        {
            "objects": {"diameter_um": [5, 20], "fill": [0.05, 0.6]},
            "camera": {"photons": [5, 2000]},
            "optics": {"psf_um": [0.2, 1.2]},
        }
    )
    lines: list[str] = []
    found = match_recipe(image[0], (1.4, 0.7, 0.7), start, rounds=3, num_scenes=25, num_kept=5, report=lines.append)
    assert len(lines) == 3
    assert found.distances[2] < found.distances[0]
    assert found.wanted.distance(found.found) < 0.12
    for group, name, factor in (("objects", "diameter_um", 1.5), ("camera", "photons", 2.5), ("optics", "psf_um", 1.6)):
        value, wanted = getattr(getattr(found.scene, group), name), getattr(getattr(truth, group), name)
        assert wanted / factor < value < wanted * factor
    again, _ = SyntheticStack(found.scene, (30, 60, 60), any_density=True).whole()
    assert np.percentile(again, [1, 99.8]) == pytest.approx(np.percentile(image, [1, 99.8]), rel=0.1)
    low, high = found.recipe.ranges["objects"]["diameter_um"]  # type: ignore[misc]
    assert 5 < low < high < 20
    assert found.recipe.ranges["voxels"] == {"plane_um": 0.7, "anisotropy": 2.0}


def test_what_cannot_be_matched() -> None:
    image = np.random.default_rng(0).normal(100, 9, (12, 20, 20))
    with pytest.raises(ValueError, match="num_kept=1"):
        match_recipe(image, (1, 1, 1), Recipe({}), num_kept=1)
    with pytest.raises(ValueError, match="none fits into an image"):
        match_recipe(image, (0.5, 0.5, 0.5), Recipe({}), rounds=1, num_scenes=3, num_kept=2)
