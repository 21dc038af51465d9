"""Random fields: the same whatever region is asked for, with the moments that they should have."""

import numpy as np
import pytest

from seg3d_monai.data.synthesis.noise import (
    between,
    filtered_noise,
    gaussian,
    smooth_noise,
    variation_of_sums,
    white_noise,
)


def test_white_noise_is_a_function_of_the_place() -> None:
    whole = white_noise((1, 2), (-40, -3, 0), (30, 70, 45))
    for start, stop in (((-40, -3, 0), (-39, 70, 45)), ((5, 31, 31), (29, 33, 34)), ((-1, -1, 0), (1, 1, 1))):
        part = white_noise((1, 2), start, stop)
        inner = tuple(slice(a - b, c - b) for a, b, c in zip(start, (-40, -3, 0), stop, strict=True))
        assert np.array_equal(part, whole[inner])
    assert not np.array_equal(white_noise((1, 3), (-40, -3, 0), (30, 70, 45)), whole)
    assert white_noise((0,), (3, 3), (3, 9)).shape == (0, 6)


def test_white_noise_is_normal_and_white() -> None:
    noise = white_noise((7,), (0, 0, 0), (64, 96, 80)).astype(np.float64)
    error = noise.size**-0.5
    assert abs(noise.mean()) < 4 * error
    assert noise.std() == pytest.approx(1, abs=4 * error)
    assert (noise**4).mean() == pytest.approx(3 - 0.3, abs=0.05)  # four uniform numbers: 3 - 6 / 5 / 4
    for axis in range(3):
        for shift in (1, 32):
            moved = np.roll(noise, shift, axis)
            assert abs((noise * moved).mean()) < 4 * error


@pytest.mark.parametrize("sigma", [(0.0, 0.7, 1.0), (2.6, 9.0, 1.9), (30.0, 30.0, 30.0)])
def test_smooth_noise_is_a_function_of_the_place(sigma: tuple[float, float, float]) -> None:
    start, stop = (-20, 3, 0), (25, 60, 50)
    whole = smooth_noise((4,), start, stop, sigma)
    assert whole.dtype == np.float32
    for low, high in (((-20, 3, 0), (-19, 4, 1)), ((-3, 20, 11), (9, 47, 50)), ((24, 59, 49), (25, 60, 50))):
        inner = tuple(slice(a - b, c - b) for a, b, c in zip(low, start, high, strict=True))
        assert np.array_equal(smooth_noise((4,), low, high, sigma), whole[inner])


def test_smooth_noise_has_unit_variance_and_its_length() -> None:
    noise = smooth_noise((5,), (0, 0), (900, 1100), (3.0, 12.0)).astype(np.float64)
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert 0.8 < noise.std() < 1.02  # interpolation between the places of the lattice takes some
    for axis, sigma in ((0, 3.0), (1, 12.0)):
        moved = np.roll(noise, round(2 * sigma), axis)
        # White noise through a Gaussian of s is correlated by exp(-d^2 / 4 s^2).
        assert (noise * moved).mean() / noise.var() == pytest.approx(np.exp(-1), abs=0.08)


def test_filtered_noise_is_a_function_of_the_place_and_of_unit_variance() -> None:
    start, stop, sigma = (-5, 0, 3), (30, 70, 60), (0.0, 0.8, 1.4)
    whole = filtered_noise((6,), start, stop, sigma)
    part = filtered_noise((6,), (2, 31, 20), (9, 40, 59), sigma)
    assert np.array_equal(part, whole[7:14, 31:40, 17:56])
    assert np.array_equal(filtered_noise((6,), start, stop, (0, 0, 0)), white_noise((6,), start, stop))
    assert whole.std() == pytest.approx(1, abs=0.02)


def test_sums_of_filtered_noise_vary_as_said() -> None:
    sigma = (0.5, 1.0, 1.5)
    noise = filtered_noise((8,), (0, 0, 0), (60, 480, 480), sigma)
    sums = noise.reshape(2, 30, 8, 60, 8, 60).sum(axis=(1, 3, 5))
    assert sums.std() / (30 * 60 * 60) ** 0.5 == pytest.approx(variation_of_sums(sigma), rel=0.2)
    assert variation_of_sums((0, 0, 0)) == 1
    for deviation in (1.0, 2.5):
        assert variation_of_sums((0, deviation)) == pytest.approx((4 * np.pi * deviation**2) ** 0.25, rel=0.02)


def test_gaussian_weights() -> None:
    assert gaussian(0.0) == [1.0]
    for sigma in (0.1, 0.5, 1.7, 4.0):
        weights = np.array(gaussian(sigma))
        places = np.arange(len(weights)) - len(weights) // 2
        assert weights.sum() == pytest.approx(1)
        assert np.array_equal(weights, weights[::-1])
        if sigma > 1:
            assert (weights * places**2).sum() == pytest.approx(sigma**2, rel=0.05)


def test_between_whole_places_and_in_the_middle() -> None:
    array = np.array([[0, 10, 20, 40]], np.float32)
    assert between(array, 1, np.array([5.0, 7.0]), 5).tolist() == [[0, 20]]
    assert between(array, 1, np.array([5.5, 7.75, 8.0]), 5).tolist() == [[5, 35, 40]]
