"""Stacks by the slab: what is made does not depend on the slabs, and looks as what is made at once."""

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from seg3d_monai.data.synthetic_imaging import ImagingModel
from seg3d_monai.data.synthetic_nuclei import NucleiModel
from seg3d_monai.data.synthetic_slabs import PlaneNoise, SlabStack
from seg3d_monai.data.synthetic_volume import make_volume_with_classes

SHAPE = (41, 50, 61)
WHOLE = (0, 0, 0, *SHAPE)
LOOKS: list[dict[str, Any]] = [
    {"spacing_um": (2.0, 0.8, 0.8)},
    {"spacing_um": (1.0, 0.8, 1.1), "depth_um": 60.0},
    {"spacing_um": (0.5, 1.0, 0.6), "channels": 2, "num_classes": 2},
]


@pytest.mark.parametrize("looks", LOOKS)
def test_slabs_of_any_size_give_the_same_voxels(looks: dict[str, Any]) -> None:
    first, *others = (SlabStack(SHAPE, seed=(4, 1), planes=planes, **looks) for planes in (1, 7, 64))
    assert first.num_slabs > others[0].num_slabs > others[1].num_slabs == 1
    for other in others:
        np.testing.assert_array_equal(other.image.read(WHOLE), first.image.read(WHOLE))
        np.testing.assert_array_equal(other.labels.read(WHOLE), first.labels.read(WHOLE))
        np.testing.assert_array_equal(other.classes, first.classes)


@pytest.mark.parametrize("looks", LOOKS)
def test_labels_are_those_of_a_volume_in_memory_and_the_image_looks_like_it(looks: dict[str, Any]) -> None:
    stack = SlabStack(SHAPE, seed=(4, 1), planes=5, **looks)
    image, labels, classes = make_volume_with_classes(SHAPE, seed=(4, 1), **({"num_classes": 1} | looks))
    np.testing.assert_array_equal(stack.labels.read(WHOLE)[0], labels)
    np.testing.assert_array_equal(stack.classes, classes)
    found, expected = stack.image.read(WHOLE).astype(float), np.reshape(image, (-1, *SHAPE)).astype(float)
    assert found.shape == expected.shape == (looks.get("channels", 1), *SHAPE)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.75  # texture and glow are other draws
        for part in (labels > 0, labels == 0):
            assert ours[part].mean() - 100 == pytest.approx(theirs[part].mean() - 100, rel=0.35)


def test_without_noise_the_two_ways_agree() -> None:
    """No texture, patches or shadows, much light and no camera noise: what is left follows from the nuclei alone."""
    nuclei = NucleiModel(texture=0.0)
    imaging = ImagingModel(photons=6e3, autofluorescence=0.0, stripes=0.0, read_noise=0.0, gain=1.0)
    for spacing in ((2.0, 0.8, 0.8), (0.9, 0.7, 1.3)):
        options: dict[str, Any] = {"spacing_um": spacing, "nuclei": nuclei, "imaging": imaging}
        image, _, _ = make_volume_with_classes(SHAPE, seed=3, num_classes=1, **options)
        found = SlabStack(SHAPE, seed=(3,), planes=4, **options).image.read(WHOLE)[0]
        both = found.astype(float) + image - 200
        # Two draws of the same Poisson distributions, whatever is near a slab's face.
        away = np.where(both > 40, (found.astype(float) - image) / np.sqrt(np.maximum(both, 40)), np.nan)
        assert np.isfinite(away).mean() > 0.3
        assert abs(np.nanmean(away)) < 0.02
        assert 0.97 < np.nanstd(away) < 1.03
        planes = [plane[np.isfinite(plane)] for plane in away]
        lit = [values for values in planes if len(values) > 300]
        assert len(lit) > 20
        for values in lit:
            assert abs(values.mean()) < 5 / np.sqrt(len(values))
            assert 0.85 < values.std() < 1.15


@pytest.mark.parametrize(
    ("size", "sigma"), [((90, 80), (0.45, 1.1, 1.1)), ((3, 200), (6.2, 9.5, 9.5)), ((300,), (2.0, 5.0))]
)
def test_noise_is_of_unit_variance_smooth_and_one_field(size: tuple[int, ...], sigma: tuple[float, ...]) -> None:
    noise = PlaneNoise((5,), size, sigma)
    field = noise.planes(0, 400)
    assert field.dtype == np.float32
    assert field.shape == (400, *size)
    assert abs(field.mean()) < 0.15
    assert 0.85 < field.std() < 1.1
    for first, stop in ((0, 1), (17, 40), (399, 400)):
        np.testing.assert_array_equal(noise.planes(first, stop), field[first:stop])
    neighbours = np.mean([np.mean(a * b) for a, b in pairwise(field)]) / field.var()
    response = ndimage.gaussian_filter1d(np.eye(101)[50], sigma[0])
    assert neighbours == pytest.approx((response[1:] * response[:-1]).sum() / (response**2).sum(), abs=0.1)
    assert np.abs(noise.planes(0, 5) - PlaneNoise((6,), size, sigma).planes(0, 5)).mean() > 0.3


def test_a_stack_smaller_than_a_nucleus() -> None:
    stack = SlabStack((1, 2, 3), seed=(0, 1))
    assert stack.labels.read((0, 0, 0, 1, 2, 3)).max() == 0
    assert stack.image.read((0, 0, 0, 1, 2, 3)).shape == (1, 1, 2, 3)
    assert stack.image.read((0, 1, 1, 0, 2, 3)).shape == (1, 0, 1, 2)
    with pytest.raises(ValueError, match="leaves the volume"):
        stack.image.read((0, 0, 0, 2, 2, 3))


def test_identities_tell_stacks_apart() -> None:
    one = SlabStack((6, 20, 24), seed=(0, 1))
    again, other = SlabStack((6, 20, 24), seed=(0, 1), planes=2), SlabStack((6, 20, 24), seed=(0, 2))
    assert one.image.identity() == again.image.identity() != other.image.identity()
    assert one.image.identity() != one.labels.identity()


def test_memory_does_not_grow_with_the_depth() -> None:
    def peak(depth: int) -> int:
        tracemalloc.start()
        stack = SlabStack((depth, 96, 96), seed=(0, 1), planes=4)
        for slab in range(stack.num_slabs):
            stack.make_image(slab)
            stack.make_labels(slab)
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return largest

    peak(40)  # what is imported and set up once
    assert peak(400) < 1.3 * peak(100)
