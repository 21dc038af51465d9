"""The classical baseline on two balls that touch."""

import numpy as np
import pytest

from seg3d_monai.report import otsu_watershed


def test_two_touching_balls_are_parted_in_physical_units() -> None:
    spacing = np.array([2.0, 0.5, 0.8])
    grid = (np.indices((14, 48, 60)).transpose(1, 2, 3, 0) + 0.5) * spacing
    first = np.linalg.norm(grid - (14.3, 12.1, 16.6), axis=-1) < 7
    second = np.linalg.norm(grid - (13.6, 11.7, 29.3), axis=-1) < 7
    labels = otsu_watershed(np.where(first | second, 1000, 50).astype(np.uint16), spacing)
    assert labels.dtype == np.uint32
    assert labels.max() == 2
    left, right = labels[7, 24, 20], labels[7, 24, 37]
    assert {left, right} == {1, 2}
    assert (labels == left)[first & ~second].mean() > 0.85
    assert (labels == right)[second & ~first].mean() > 0.85


def test_a_flat_or_empty_image_holds_nothing() -> None:
    assert otsu_watershed(np.full((3, 5, 7), 9, dtype=np.uint16)).max() == 0
    assert otsu_watershed(np.zeros((0, 5, 7), dtype=np.uint16)).shape == (0, 5, 7)


def test_wrong_arguments_are_named() -> None:
    image = np.zeros((3, 5, 7), dtype=np.uint16)
    with pytest.raises(ValueError, match="one channel"):
        otsu_watershed(image[None])
    with pytest.raises(ValueError, match="spacing_um"):
        otsu_watershed(image, (1.0, 2.0))
    with pytest.raises(ValueError, match="seed_radius_um"):
        otsu_watershed(image, seed_radius_um=0.0)
