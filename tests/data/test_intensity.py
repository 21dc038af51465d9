"""Percentiles against numpy, the sample against the whole, and the degenerate volumes."""

import numpy as np
import pytest
import tifffile

from seg3d_monai.data.intensity import Intensity, check_finite, measure_intensity
from seg3d_monai.data.volume import ArrayVolume, open_volume


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_small_volumes_are_measured_exactly(channels, dtype):
    array = channels.astype(dtype)
    measured = measure_intensity(ArrayVolume(array), percentiles=(2.5, 97.0))
    for channel in range(2):
        low, high = np.percentile(array[channel], [2.5, 97.0])
        assert (measured.low[channel], measured.high[channel]) == (low, high)


def test_large_volumes_are_sampled_on_a_grid_of_the_shape_alone():
    rng = np.random.default_rng(0)
    # A gradient along every axis is the hardest for a grid: a part that it misses shifts the tails.
    z, y, x = np.ogrid[:64, :300, :320]
    array = (z * 20 + y * 3 + x * 2 + rng.normal(0, 5, (64, 300, 320))).astype(np.float32)
    exact = measure_intensity(ArrayVolume(array))
    sampled = measure_intensity(ArrayVolume(array), max_voxels=2**20)
    span = exact.high[0] - exact.low[0]
    assert sampled != exact
    assert abs(sampled.low[0] - exact.low[0]) < 0.08 * span
    assert abs(sampled.high[0] - exact.high[0]) < 0.08 * span
    assert measure_intensity(ArrayVolume(array.copy()), max_voxels=2**20) == sampled


def test_sampling_reads_no_more_than_its_budget(stack):
    class Counting(ArrayVolume):
        voxels = 0

        def read(self, roi):
            block = super().read(roi)
            self.voxels += block.size
            return block

    volume = Counting(np.zeros((40, 200, 210), dtype=np.uint16))
    measure_intensity(volume, max_voxels=300_000)
    assert 150_000 < volume.voxels <= 300_000


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_constant_volume_normalises_to_zero(value):
    array = np.full((3, 4, 5), value, dtype=np.uint16)
    measured = measure_intensity(ArrayVolume(array))
    assert measured.high[0] > measured.low[0] == value
    np.testing.assert_array_equal(measured.normalise(array[None]), np.zeros((1, 3, 4, 5)))


@pytest.mark.parametrize("value", [1e20, -1e20, 1e-30])
def test_constant_floats_of_any_size(value):
    array = np.full((1, 3, 4, 5), value, dtype=np.float32)
    measured = measure_intensity(ArrayVolume(array))
    np.testing.assert_array_equal(measured.normalise(array), np.zeros_like(array))


def test_nearly_empty_volume_keeps_its_few_bright_voxels():
    array = np.full((10, 30, 31), 100, dtype=np.uint16)
    array[5, 5, 5] = 900  # far less than 0.2 percent
    measured = measure_intensity(ArrayVolume(array))
    assert (measured.low, measured.high) == ((100.0,), (900.0,))


def test_bool_volume():
    array = np.zeros((4, 5, 6), dtype=bool)
    array[:2] = True
    measured = measure_intensity(ArrayVolume(array))
    assert (measured.low, measured.high) == ((0.0,), (1.0,))
    np.testing.assert_array_equal(measured.normalise(array[None]), array[None].astype(np.float32))


def test_normalise_by_hand():
    intensity = Intensity(low=(100.0, -2.0), high=(300.0, 2.0))
    block = np.array([[0, 100, 200, 300, 5000], [-60, -2, 0, 2, 18]], dtype=np.int16).reshape(2, 1, 1, 5)
    before = block.copy()
    result = intensity.normalise(block)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.reshape(2, 5), [[-0.5, 0, 0.5, 1, 8], [-1, 0, 0.5, 1, 5]])
    np.testing.assert_array_equal(block, before)
    floats = block.astype(np.float32)
    intensity.normalise(floats)
    np.testing.assert_array_equal(floats, before)


def test_wide_integers_keep_their_low_digits():
    block = np.array([2**30, 2**30 + 1, 2**30 + 2], dtype=np.int32).reshape(1, 1, 1, 3)
    result = Intensity(low=(2.0**30,), high=(2.0**30 + 2,)).normalise(block)
    np.testing.assert_allclose(result.ravel(), [0, 0.5, 1])


def test_json_round_trip_and_unsound_values():
    intensity = Intensity(low=(1.5, 2.0), high=(3.0, 8.25))
    assert Intensity.from_json(intensity.to_json()) == intensity
    for low, high in [((1,), (1,)), ((1,), (2, 3)), ((), ()), ((float("nan"),), (1,)), ((0,), (float("inf"),))]:
        with pytest.raises(ValueError, match="low below high"):
            Intensity(low=low, high=high)
    with pytest.raises(ValueError, match="keys low and high"):
        Intensity.from_json({"low": [1]})
    with pytest.raises(ValueError, match="2 channels"):
        intensity.normalise(np.zeros((1, 2, 3, 4)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels_are_named(tmp_path, channels, bad):
    array = channels.astype(np.float32)
    array[1, 4, 20, 33] = bad
    for check in (measure_intensity, check_finite):
        with pytest.raises(ValueError, match=r"channel 1, z 4, y 20, x 33\) is " + str(bad)):
            check(ArrayVolume(array))
    path = tmp_path / "bad.tif"
    tifffile.imwrite(path, array[1], photometric="minisblack")
    with pytest.raises(ValueError, match=r"bad\.tif: voxel \(channel 0, z 4, y 20, x 33"):
        check_finite(open_volume(path))


def test_check_finite_passes_sound_volumes_and_does_not_read_integers(channels):
    check_finite(ArrayVolume(channels.astype(np.float64)))

    class Unreadable(ArrayVolume):
        def read(self, roi):
            raise AssertionError("integers need no reading")

    check_finite(Unreadable(channels))


@pytest.mark.parametrize("percentiles", [(50, 50), (-1, 50), (1, 101), (99, 1)])
def test_percentiles_out_of_range(stack, percentiles):
    with pytest.raises(ValueError, match="percentiles"):
        measure_intensity(ArrayVolume(stack), percentiles=percentiles)


def test_max_voxels_out_of_range(stack):
    with pytest.raises(ValueError, match="max_voxels=0"):
        measure_intensity(ArrayVolume(stack), max_voxels=0)
