"""Sets of crops as bits, against lists."""

import pickle

import numpy as np
import pytest

from seg3d_monai.data import CropSelection
from seg3d_monai.data.crop_selection import BitSet


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 20_000])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
def test_a_set_of_bits_is_a_list_of_places(size: int, density: float) -> None:
    members = np.random.default_rng(size).random(size) < density
    places = np.flatnonzero(members)
    bits = BitSet(members)
    assert len(bits) == len(places)
    for rank in range(0, len(places), max(1, len(places) // 50)):
        assert bits.member(rank) == places[rank]
    for value in {0, 1, size // 2, max(0, size - 1), size}:
        assert bits.below(min(value, size)) == int((places < value).sum())


def test_a_selection_of_three_volumes_by_hand() -> None:
    matches = np.array([0, 1, 1, 0, 0, 1, 1, 1, 1, 0], bool)
    occupied = np.array([0, 0, 1, 0, 0, 0, 1, 0, 1, 0], bool)
    found = CropSelection(first_crops=[11, 50, 101], volume_crops=[4, 1, 5], matches=matches, occupied=occupied)
    assert len(found) == 6
    assert found.num_crops.tolist() == [2, 0, 4]
    assert found.num_occupied.tolist() == [1, 0, 2]
    assert [found.crop(0, rank) for rank in range(2)] == [12, 13]
    assert [found.crop(2, rank) for rank in range(4)] == [101, 102, 103, 104]
    assert [found.crop(2, rank, occupied=True) for rank in range(2)] == [102, 104]
    for volume, rank in ((0, 2), (1, 0), (0, -1)):
        with pytest.raises(IndexError, match="rank"):
            found.crop(volume, rank)


def test_all_of_ten_million_crops_take_little() -> None:
    occupied = np.zeros(10_000_000, bool)
    occupied[::7] = True
    found = CropSelection(first_crops=[1], volume_crops=[len(occupied)], matches=None, occupied=occupied)
    assert len(pickle.dumps(found)) < 1.5e6
    assert found.crop(0, 9_999_999) == 10_000_000
    assert found.crop(0, 1_000_000, occupied=True) == 7_000_001
