"""Where objects are: as many as asked for, none too close, touching where they should; what voxels they get."""

import numpy as np
import pytest
from scipy import ndimage

from seg3d_monai.data.synthesis.cells import FAR, Painter, as_cells
from seg3d_monai.data.synthesis.placement import Shapes, draw_shapes, place_shapes, wanted_number
from seg3d_monai.data.synthesis.scene import FAMILIES, Objects

EXTENT = np.array([60.0, 90.0, 75.0])
SPACING = np.array([1.5, 0.6, 0.7])


def placed(seed: int = 0, **options: float) -> Shapes:
    return place_shapes(np.random.default_rng(seed), EXTENT, Objects(**options))


def gaps(shapes: Shapes) -> np.ndarray:
    """For each pair its distance in sums of the radii towards each other, by brute force."""
    found = []
    for i in range(len(shapes)):
        for j in range(i):
            offset = shapes.centre[i] - shapes.centre[j]
            distance = np.linalg.norm(offset)
            radii = sum(1 / np.linalg.norm(shapes.axes[k] @ (offset / distance)) for k in (i, j))
            found.append(distance / radii)
    return np.array(found)


@pytest.mark.parametrize("closeness", [0.75, 1.0])
def test_none_lies_too_close(closeness: float) -> None:
    shapes = placed(fill=0.4, closeness=closeness, attach=0.6, elongated=0.5, elongation=3.0)
    assert len(shapes) > 100
    assert gaps(shapes).min() >= closeness * (1 - 1e-9)
    assert (shapes.centre >= -6).all()
    assert (shapes.centre <= EXTENT + 6).all()


def test_as_many_as_asked_for() -> None:
    objects = Objects(fill=0.2, spread=0.3, axis_ratio=1.0, deformation=0.0)
    shapes = place_shapes(np.random.default_rng(1), np.array([150.0, 140.0, 160.0]), objects)
    assert len(shapes) == wanted_number(np.array([150.0, 140.0, 160.0]), objects)
    volume = (4 / 3 * np.pi / np.abs(np.linalg.det(shapes.axes))).sum() / (162 * 152 * 172)
    assert volume == pytest.approx(0.2, rel=0.2)  # large ones find fewer places


def test_none_one_and_too_many() -> None:
    assert len(placed(fill=0.0)) == 0
    one = place_shapes(np.random.default_rng(0), np.array([12.0, 12.0, 12.0]), Objects(fill=0.07))
    assert len(one) == 1
    packed = placed(fill=1.2, closeness=1.0)
    assert 100 < len(packed) < 0.7 * wanted_number(EXTENT, Objects(fill=1.2))


def test_attached_objects_touch_and_others_keep_apart() -> None:
    def touching(attach: float) -> float:
        shapes = placed(seed=2, fill=0.05, attach=attach, closeness=1.0)
        number, close = len(shapes), gaps(shapes) < 1.1
        rows = [(i, j) for i in range(number) for j in range(i)]
        return len({k for pair, is_close in zip(rows, close, strict=True) if is_close for k in pair}) / number

    assert touching(0.0) < 0.25
    assert touching(1.0) > 0.75


def test_families_by_their_weights_and_shapes() -> None:
    objects = Objects(ellipsoid=1, elongated=1, lobed=2, dividing=0, elongation=3.0, axis_ratio=1.0, spread=0.0)
    shapes = draw_shapes(np.random.default_rng(0), 4000, objects)
    assert np.bincount(shapes.family, minlength=4) / 4000 == pytest.approx([0.25, 0.25, 0.5, 0.0], abs=0.03)
    radii = 1 / np.linalg.norm(shapes.axes, axis=2)
    assert radii.prod(axis=1) == pytest.approx(6.0**3)  # the volume is that of a ball of the diameter
    ratio = radii.max(axis=1) / radii.min(axis=1)
    is_long = shapes.family == FAMILIES.index("elongated")
    assert ratio[~is_long] == pytest.approx(1)
    assert 2 <= ratio[is_long].min() < ratio[is_long].max() <= 3


def test_an_ellipsoid_gets_its_volume_and_distances_are_those_of_its_surface() -> None:
    shapes = draw_shapes(np.random.default_rng(3), 1, Objects(axis_ratio=2.0, deformation=0.0, spread=0.0))
    shapes.centre[:] = [[14.3, 12.1, 13.7]]
    cells = as_cells(np.random.default_rng(0), shapes)
    shape = np.array([20, 42, 40])
    painted = Painter(cells, SPACING, 1.35, FAR).paint(np.zeros(3, int), shape)
    inside = painted.owner(1.0) == 1
    assert inside.sum() * SPACING.prod() == pytest.approx(cells.volumes()[0], rel=0.02)
    places = (np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1) + 0.5) * SPACING
    wanted = np.linalg.norm((places - shapes.centre[0]) @ shapes.axes[0].T, axis=-1)
    near = painted.nearest_object == 1
    assert np.allclose(painted.nearest[near], wanted[near], atol=1e-5)
    assert (wanted[~near] >= 1.35 - 1e-5).all()
    assert (painted.runner_up == FAR).all()


def test_a_region_is_painted_the_same_whatever_the_region() -> None:
    shapes = placed(seed=4, fill=0.5, ellipsoid=1, elongated=1, lobed=1, dividing=1)
    cells = as_cells(np.random.default_rng(0), shapes)
    assert cells.num_objects > len(shapes)
    start, stop = np.array([-3, 10, 20]), np.array([30, 90, 110])
    painter = Painter(cells, SPACING, 1.5, 0.4)
    whole = painter.paint(start, stop)
    for low, high in (([-3, 10, 20], [0, 90, 110]), ([5, 33, 40], [17, 61, 99]), ([29, 89, 109], [30, 90, 110])):
        part = painter.paint(np.array(low), np.array(high))
        inner = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start.tolist(), strict=True))
        for name in ("nearest_object", "nearest", "runner_up"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[inner])


def test_a_voxel_goes_to_the_relatively_nearest_and_knows_the_next() -> None:
    shapes = Shapes.joined([draw_shapes(np.random.default_rng(n), 1, Objects(deformation=0.0)) for n in (0, 1)])
    shapes.centre[:] = [[15, 15, 12], [15, 15, 21]]  # they overlap
    cells = as_cells(np.random.default_rng(0), shapes)
    painted = Painter(cells, SPACING, 1.35, FAR).paint(np.zeros(3, int), np.array([20, 50, 48]))
    places = (np.stack(np.meshgrid(np.arange(20), np.arange(50), np.arange(48), indexing="ij"), -1) + 0.5) * SPACING
    away = np.stack(
        [np.linalg.norm((places - c) @ a.T, axis=-1) for c, a in zip(shapes.centre, shapes.axes, strict=True)]
    )
    both = (away < 1.2).all(axis=0)
    assert both.sum() > 100
    assert np.array_equal(painted.nearest_object[both], away.argmin(axis=0)[both] + 1)
    assert np.allclose(painted.runner_up[both], away.max(axis=0)[both], atol=1e-5)
    assert set(np.unique(painted.owner(1.0))) == {0, 1, 2}


def test_distances_are_those_of_a_bumpy_surface_up_to_the_limit_and_runners_up_to_the_gap() -> None:
    shapes = placed(seed=6, fill=0.4, deformation=0.2)
    cells = as_cells(np.random.default_rng(0), shapes)
    shape, limit, gap = np.array([12, 30, 28]), 1.4, 0.3
    painted = Painter(cells, SPACING, limit, gap).paint(np.zeros(3, int), shape)
    places = (np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1) + 0.5) * SPACING
    away = []
    for each in range(len(shapes)):
        unit = (places - shapes.centre[each]) @ shapes.axes[each].T
        norm = np.linalg.norm(unit, axis=-1)
        unit /= norm[..., None]
        even = np.einsum("zyxi,ij,zyxj->zyx", unit, shapes.quadratic[each], unit)
        odd = np.prod(unit @ shapes.cubic[each].T, axis=-1)
        away.append(norm / (1 + even + odd))
    number, ordered = np.argmin(away, axis=0) + 1, np.sort(away, axis=0)
    ordered[ordered >= limit] = FAR
    assert np.array_equal(painted.nearest_object, np.where(ordered[0] < limit, number, 0))
    assert np.allclose(painted.nearest, ordered[0], atol=1e-5)
    assert np.allclose(painted.runner_up, np.minimum(ordered[1], ordered[0] + gap), atol=1e-5)
    assert 0.1 < (painted.runner_up < painted.nearest + 0.29).mean() < 0.9


@pytest.mark.parametrize("seed", range(4))
def test_lobes_are_one_object_and_daughters_two_that_touch(seed: int) -> None:
    for family, number in (("lobed", 1), ("dividing", 2)):
        options = {"ellipsoid": 0.0, family: 1.0}
        shapes = draw_shapes(np.random.default_rng(seed), 1, Objects(**options))
        shapes.centre[:] = 15
        cells = as_cells(np.random.default_rng(seed), shapes)
        assert cells.num_objects == number
        assert len(cells.shapes) == (2 if family == "dividing" else len(cells.owner)) >= 2
        painter = Painter(cells, np.array([0.5, 0.5, 0.5]), 1.0, 0.1)
        labels = painter.paint(np.zeros(3, int), np.array([60, 60, 60])).owner(1.0)
        assert set(np.unique(labels)) == set(range(number + 1))
        assert ndimage.label(labels > 0)[1] == 1
        for one in range(1, number + 1):
            assert ndimage.label(labels == one)[1] == 1
