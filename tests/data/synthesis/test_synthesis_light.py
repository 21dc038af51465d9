"""Light and camera against hand-made numbers: widths, tilts, depths, shot noise, bits."""

from dataclasses import replace

import numpy as np
import pytest

from seg3d_monai.data.synthesis import Scene, light
from seg3d_monai.data.synthesis.noise import gaussian
from seg3d_monai.data.synthesis.region import Region
from seg3d_monai.data.synthesis.scene import Background, Camera, Optics
from seg3d_monai.data.synthesis.structures import Structures, add_structures, structures

SPACING = np.array([1.5, 0.5, 0.6])
CLEAR = Optics(haze=0, sheet_end=0, vignetting=0, stripes=0, attenuation_um=1e9)
DARK = Background(glow=0)


def region(*shape: int) -> Region:
    return Region(start=np.zeros(3, np.int64), stop=np.array(shape))


def spread_um(image: np.ndarray) -> np.ndarray:
    """Standard deviations along (z, y, x), micrometres."""
    places = np.stack(np.meshgrid(*(np.arange(n) for n in image.shape), indexing="ij"), -1) * SPACING
    middle = np.average(places.reshape(-1, 3), axis=0, weights=image.ravel())
    variance = np.average((places.reshape(-1, 3) - middle) ** 2, axis=0, weights=image.ravel())
    return np.sqrt(variance)


def test_a_point_gets_the_point_spread_and_deep_down_a_wider_one() -> None:
    stain = np.zeros((21, 61, 71), np.float32)
    stain[10, 30, 35] = 1
    optics = replace(CLEAR, psf_um=1.2, psf_ratio=2.5, scatter=1.5)
    sharp, wide = light.blurred(stain, optics, SPACING)
    assert sharp.sum() == pytest.approx(1, abs=1e-4)
    assert spread_um(sharp) == pytest.approx([3.0, 1.2, 1.2], rel=0.05)
    assert spread_um(wide) == pytest.approx([4.5, 1.8, 1.8], rel=0.06)
    assert (light.halo(optics, SPACING) >= 3 * np.array([3.0, 1.2, 1.2]) / SPACING).all()


def test_wings_are_a_lorentzian_beside_the_gaussian() -> None:
    assert light.axial(2.0, 0.0, 3.0) == gaussian(2.0)
    assert light.axial(0.0, 0.5, 2.0) == gaussian(0.0)
    for wings in (0.3, 1.0):
        weights = np.array(light.axial(2.0, wings, 2.0))
        middle = len(weights) // 2
        assert weights.sum() == pytest.approx(1)
        assert np.array_equal(weights, weights[::-1])
        half = 2 * 2.0 * (2 * np.log(2)) ** 0.5
        places = np.arange(-middle, middle + 1)
        lorentzian = 1 / (1 + (places / half) ** 2) - 1 / 26  # which is 0 at five half-widths
        assert middle == int(5 * half)
        beyond = np.abs(places) > 6  # three standard deviations
        assert weights[beyond] == pytest.approx(wings * (lorentzian / lorentzian.sum())[beyond])
    stain = np.zeros((41, 9, 9), np.float32)
    stain[20, 4, 4] = 1
    optics = replace(CLEAR, psf_um=0.3, psf_ratio=6.0, wings=0.6, wings_ratio=2.0, scatter=1.0)
    sharp, wide = light.blurred(stain, optics, SPACING)
    assert np.array_equal(sharp, wide)
    along = sharp.sum(axis=(1, 2))
    kernel = np.array(light.axial(1.2, 0.6, 2.0))
    assert light.halo(optics, SPACING)[0] == len(kernel) // 2
    assert along[20 - len(kernel) // 2 : 21 + len(kernel) // 2] == pytest.approx(kernel, abs=1e-6)


def test_a_tilted_sheet_leans() -> None:
    stain = np.zeros((21, 21, 71), np.float32)
    stain[10, 10, 35] = 1
    sharp, _ = light.blurred(stain, replace(CLEAR, psf_um=0.5, psf_ratio=6, tilt_degrees=20), SPACING)
    assert sharp.sum() == pytest.approx(1, abs=1e-4)
    rows = [(z, np.average(np.arange(71), weights=sharp[z].sum(0))) for z in range(5, 16)]
    slope = np.polyfit([z * SPACING[0] for z, _ in rows], [x * SPACING[2] for _, x in rows], 1)[0]
    assert slope == pytest.approx(np.tan(np.radians(20)), rel=0.02)


def test_light_falls_with_depth_and_towards_the_ends_of_the_sheet() -> None:
    scene = Scene(depth_um=30.0, optics=replace(CLEAR, attenuation_um=50.0, vignetting=0.4), background=DARK)
    ones = np.ones((4, 3, 5), np.float32)
    found = light.illuminated(scene, ones, ones, np.zeros(()), region(4, 3, 5), SPACING, 5, 0)
    depth = 30 + (np.arange(4) + 0.5) * 1.5
    across = (2 * (np.arange(5) + 0.5) / 5 - 1) ** 2
    wanted = scene.camera.photons * np.exp(-depth / 50)[:, None, None] * (1 - 0.4 * across) * np.ones((1, 3, 1))
    assert np.allclose(found, wanted, rtol=1e-5)


def test_what_is_deep_or_at_the_ends_of_the_sheet_is_blurred_more() -> None:
    ones, zeros = np.ones((2, 2, 4), np.float32), np.zeros((2, 2, 4), np.float32)

    def share(**options: float) -> np.ndarray:
        scene = Scene(optics=replace(CLEAR, **options), background=DARK, depth_um=10.0)
        found = light.illuminated(scene, zeros, ones, np.zeros(()), region(2, 2, 4), SPACING, 4, 0)
        return found / light.illuminated(scene, ones, ones, np.zeros(()), region(2, 2, 4), SPACING, 4, 0)

    assert share().max() < 1e-6
    assert share(sheet_end=0.8)[0, 0] == pytest.approx(
        [0.8 * 0.5625, 0.8 * 0.0625, 0.8 * 0.0625, 0.8 * 0.5625], rel=1e-4
    )
    assert share(attenuation_um=20.0)[1, 0, 0] == pytest.approx(1 - np.exp(-(10 + 2.25) / 40), rel=1e-4)


def test_haze_keeps_the_light_of_an_object_and_is_as_wide_as_asked() -> None:
    points, masses = np.array([[42.0, 33.0, 36.0]]), np.array([1800.0])
    found = light.haze(6.0, points, masses, region(56, 132, 120), SPACING)
    assert found.sum() * SPACING.prod() == pytest.approx(1800, rel=0.03)
    assert spread_um(found) == pytest.approx([6.0] * 3, rel=0.1)
    part = Region(start=np.array([3, 40, 17]), stop=np.array([31, 77, 90]))
    assert np.array_equal(light.haze(6.0, points, masses, part, SPACING), found[3:31, 40:77, 17:90])
    assert not light.haze(6.0, np.zeros((0, 3)), np.zeros(0), part, SPACING).any()


@pytest.mark.parametrize("photons", [0.0, 0.5, 4.0, 300.0])
def test_counts_have_poissons_mean_and_variance(photons: float) -> None:
    scene = Scene(camera=Camera(gain=20, offset=1000, read_noise=30, photons=1000))
    expected = np.full((30, 60, 60), photons, np.float32)
    counts = light.recorded(scene, expected, region(30, 60, 60), 0).astype(np.float64)
    assert counts.mean() == pytest.approx(1000 + 20 * photons, abs=20 * 0.1)
    # In gain squared: of the shots, and of the read noise; a normal number squared has 1/2 more where it is dark.
    assert -0.02 * photons < (counts.var() - 900) / 400 - photons < 0.6 + 0.02 * photons
    other = light.recorded(scene, expected, region(30, 60, 60), 1)
    assert abs(np.corrcoef(other.ravel(), counts.ravel())[0, 1]) < 0.02


def test_noise_has_its_strength_and_its_grain() -> None:
    camera = Camera(gain=20, offset=2000, read_noise=0, photons=1000, grain=0.7, grain_axial=0.4)
    expected = np.full((30, 60, 60), 300, np.float32)
    counts = light.recorded(Scene(camera=camera), expected, region(30, 60, 60), 0).astype(np.float64)
    assert counts.var() == pytest.approx(400 * 300, rel=0.05)
    for axis, sigma in ((0, 0.4), (1, 0.7), (2, 0.7)):
        weights = np.array(gaussian(sigma))
        wanted = (weights[1:] * weights[:-1]).sum() / (weights**2).sum()
        one, other = np.delete(counts, 0, axis).ravel(), np.delete(counts, -1, axis).ravel()
        assert np.corrcoef(one, other)[0, 1] == pytest.approx(wanted, abs=0.02)


def test_a_camera_saturates_and_has_so_many_levels() -> None:
    camera = Camera(photons=100, gain=2, offset=50, white_level=3, bits=8)  # white: 650 counts
    counts = np.array([-5.0, 0.0, 325.0, 650.0, 9000.0], np.float32)
    assert light.digitised(counts, camera).tolist() == [0, 0, 128, 255, 255]
    assert light.digitised(counts, replace(camera, bits=16)).tolist() == [0, 0, 325, 650, 650]
    bright = replace(camera, photons=1e5, white_level=20, bits=16)
    assert light.digitised(np.array([1e6], np.float32), bright).tolist() == [65535]


def test_specks_and_fibres_are_where_they_are_and_as_bright() -> None:
    both = Structures(
        point=np.array([[15.75, 10.25, 9.3], [15.75, 20.25, 9.3]]),
        direction=np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        radius=np.array([1.5, 2.0]),
        brightness=np.array([2.0, 0.5]),
    )
    stain = np.zeros((20, 60, 40), np.float32)
    add_structures(stain, both, region(20, 60, 40), SPACING)
    assert stain[10, 20, 15] == pytest.approx(2.0, abs=0.01)
    assert stain[10, 40, :] == pytest.approx([0.5] * 40, abs=0.01)
    assert stain[10, 44, 30] == pytest.approx(0.5 * np.exp(-1), abs=0.01)
    part = np.zeros((6, 30, 20), np.float32)
    add_structures(part, both, Region(start=np.array([8, 15, 5]), stop=np.array([14, 45, 25])), SPACING)
    assert np.array_equal(part, stain[8:14, 15:45, 5:25])
    assert both.near(np.array([0.0, 0.0, 0.0]), np.array([9.0, 9.0, 9.0])) == []


def test_a_region_shows_equally_many_structures_in_a_volume_of_any_size() -> None:
    scene = Scene(background=Background(specks=0.5, fibres=6.0))
    numbers = []
    for size in (150.0, 600.0):
        extent = np.array([size, size, size])
        found = structures(scene, extent, num_objects=int(size**3 / 4000))
        fibres = []
        for shift in range(12):
            low = (0.15 + 0.05 * shift) * extent
            shown = found.near(low, low + 40)
            fibres.append(sum(bool(found.direction[n].any()) for n in shown))
        numbers.append(np.mean(fibres))
        specks = int((~found.direction.any(axis=1)).sum())
        assert specks == pytest.approx(size**3 / 8000, abs=5 * (size**3 / 8000) ** 0.5)
    assert numbers[1] == pytest.approx(numbers[0], rel=0.5)
