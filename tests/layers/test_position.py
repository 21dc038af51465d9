"""Sine encodings against the formula in plain Python; centres counted by hand."""

import math

import pytest
import torch

from seg3d_monai.layers import level_centres, level_positions, sine_positions


def encode(row, channels, shortest, longest):
    """One encoding, number by number."""
    pairs = channels // (2 * len(row))
    encoding = []
    for value in row:
        lengths = [shortest * (longest / shortest) ** (i / max(pairs - 1, 1)) for i in range(pairs)]
        encoding += [math.sin(2 * math.pi * value / length) for length in lengths]
        encoding += [math.cos(2 * math.pi * value / length) for length in lengths]
    return encoding + [0.0] * (channels - len(encoding))


@pytest.mark.parametrize(("axes", "channels"), [(3, 6), (3, 7), (3, 16), (3, 24), (6, 12), (6, 40), (1, 5)])
@pytest.mark.parametrize("waves", [(4.0, 1024.0), (2.5, 100.0)])
def test_encoding_is_the_formula(axes, channels, waves):
    torch.manual_seed(0)
    places = torch.rand(2, 3, axes, dtype=torch.float64) * 300 - 20
    found = sine_positions(places, channels, min_wavelength=waves[0], max_wavelength=waves[1])
    wanted = [encode(row, channels, *waves) for row in places.flatten(0, 1).tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64).view(2, 3, channels))
    single = sine_positions(places.float(), channels, min_wavelength=waves[0], max_wavelength=waves[1])
    torch.testing.assert_close(single, found.float(), atol=1e-3, rtol=0)


def test_half_types_are_encoded_in_float32():
    assert sine_positions(torch.rand(2, 3, dtype=torch.bfloat16), 12).dtype == torch.float32
    assert sine_positions(torch.zeros(0, 3), 12).shape == (0, 12)


def test_one_voxel_makes_a_difference_also_far_from_the_origin():
    code = sine_positions(torch.tensor([[4000.0, 0, 0], [4001.0, 0, 0]]), 12)
    # Two wavelengths an axis; the shortest, 4 voxels, goes a quarter turn in one voxel.
    torch.testing.assert_close(code[:, 0], torch.tensor([0.0, 1.0]), atol=2e-3, rtol=0)


def test_centres_counted_by_hand():
    found = level_centres((1, 2, 3), (4, 2, 1), "cpu")
    assert found.dtype == torch.float32
    assert found.tolist() == [[2, y, x] for y in (1.0, 3.0) for x in (0.5, 1.5, 2.5)]


@pytest.mark.parametrize("channels", [6, 16, 24])
@pytest.mark.parametrize("size", [(2, 3, 5), (1, 1, 1), (7, 1, 2)])
def test_positions_of_a_level_are_those_of_its_centres(channels, size):
    stride = (1, 2, 4)
    wanted = sine_positions(level_centres(size, stride, "cpu"), channels)
    torch.testing.assert_close(level_positions(size, stride, channels, "cpu"), wanted, atol=0, rtol=0)


def test_too_few_channels_are_refused():
    with pytest.raises(ValueError, match="channels is 11; give at least 12"):
        sine_positions(torch.zeros(1, 6), 11)
    with pytest.raises(ValueError, match="channels is 5; give at least 6"):
        level_positions((1, 1, 1), (1, 1, 1), 5, "cpu")
