"""Warps in micrometres against SciPy, label by label; turns of planes against `rot90`."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from seg3d_monai.data.transforms import RandTurnPlaned, RandWarpd, train_transforms
from seg3d_monai.data.transforms_geometry import bend, rotation, sampling_grid

SHAPE = (10, 34, 27)
SPACING = (2.0, 0.5, 0.8)
STILL: dict[str, Any] = {"rotate_degrees": 0.0, "tilt_degrees": 0.0, "shear": 0.0, "scale_range": ((1, 1),) * 3}


class Prescribed(RandWarpd):
    """A warp whose map, in micrometres, is given rather than drawn."""

    matrix: np.ndarray

    def _draw_matrix(self) -> np.ndarray:
        return self.matrix


def cells(shape: tuple[int, int, int], number: int, seed: int = 0) -> np.ndarray:
    """Labels of the nearest of some points, with an ignored corner and background between; ids from 1."""
    rng = np.random.default_rng(seed)
    if number == 0:
        return np.zeros(shape, np.int32)
    points = rng.uniform(0, shape, (number, 3))
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    away = np.linalg.norm(grid[..., None, :] - points, axis=-1)
    label = (away.argmin(axis=-1) + 1).astype(np.int32)
    label[away.min(axis=-1) > 6] = 0
    label[:2, :3, :4] = -1
    return label


def sample(label: np.ndarray, spacing: tuple[float, float, float] | None = SPACING) -> dict[str, torch.Tensor]:
    data = {"image": torch.from_numpy(label[None].astype(np.float32)), "label": torch.from_numpy(label[None])}
    return data if spacing is None else {**data, "spacing_um": torch.tensor(spacing, dtype=torch.float64)}


def affine_by_scipy(array: np.ndarray, matrix: np.ndarray, size: tuple[int, ...], order: int, outside: int) -> Any:
    """`array` under a map of micrometres around the centre; and where rounding may decide between two voxels."""
    voxel = np.diag(SPACING)
    to_input = np.linalg.inv(voxel) @ np.linalg.inv(matrix) @ voxel
    offset = (np.array(array.shape) - 1) / 2 - to_input @ ((np.array(size) - 1) / 2)
    moved = ndimage.affine_transform(
        array, to_input, offset, output_shape=size, order=order, mode="grid-constant", cval=outside
    )
    places = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1) @ to_input.T + offset
    is_tie = (np.abs(places - np.floor(places) - 0.5) < 1e-3).any(axis=-1)
    return moved, is_tie


@pytest.mark.parametrize("number", [0, 1, 60])
@pytest.mark.parametrize("crop_size", [None, (6, 20, 18)])
@pytest.mark.parametrize("keeps_planes", [False, True])
def test_an_affine_map_is_scipys_with_labels_of_order_0(
    number: int, crop_size: tuple[int, int, int] | None, keeps_planes: bool
) -> None:
    label = cells(SHAPE, number)
    size = crop_size or SHAPE
    rng = np.random.default_rng(1)
    for _ in range(4):
        warp = Prescribed(crop_size=crop_size, affine_prob=1.0, elastic_prob=0.0)
        warp.matrix = np.eye(3) + rng.uniform(-0.25, 0.25, (3, 3))
        if keeps_planes:
            warp.matrix[0, 1:] = warp.matrix[1:, 0] = 0
        result = warp(sample(label))
        expected, is_tie = affine_by_scipy(label, warp.matrix, size, 0, -1)
        found = result["label"][0].numpy()
        assert found.dtype == np.int32
        assert is_tie.mean() < 0.03
        assert np.array_equal(found[~is_tie], expected[~is_tie])
        assert set(np.unique(found)) <= {*np.unique(label), -1}
        image, _ = affine_by_scipy(label.astype(np.float64), warp.matrix, size, 1, 0)
        assert np.allclose(result["image"][0].numpy(), image, atol=5e-3)


def test_a_turn_by_a_right_angle_in_micrometres_swaps_axes_of_unequal_voxels() -> None:
    label = np.zeros((9, 11, 21), np.int32)
    label[4, 3:8, 5:16] = 3  # 2.5 x 8.8 micrometres
    warp = Prescribed(affine_prob=1.0, elastic_prob=0.0)
    warp.matrix = rotation("yx", np.pi / 2)
    places = np.argwhere(warp(sample(label))["label"][0].numpy() == 3)
    extent = (places.max(0) - places.min(0) + 1) * np.array(SPACING)
    assert extent[1] == pytest.approx(5.5, abs=0.01)  # 8.8 um do not fit 11 rows of 0.5 um
    assert extent[2] == pytest.approx(2.5, abs=0.8)


def test_spacing_from_the_sample_the_constructor_or_neither() -> None:
    label = cells(SHAPE, 40)
    results = []
    for own, brought in ((None, SPACING), ((9.0, 9.0, 9.0), SPACING), (SPACING, None), (None, None)):
        warp = Prescribed(spacing_um=own, affine_prob=1.0, elastic_prob=0.0)
        warp.matrix = rotation("zx", 0.4)
        results.append(warp(sample(label, brought))["label"])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])
    with pytest.raises(ValueError, match="spacing"):
        RandWarpd(spacing_um=(1, 0, 1))


def test_tilts_keep_lengths_in_micrometres() -> None:
    # A rod of 4 x 4 x 24 micrometres; its second moments are those of the body, wherever it points to.
    label = np.zeros((40, 81, 101), np.int32)
    spacing = (1.6, 0.5, 0.4)
    label[18:22, 36:45, 20:81] = 1
    warp = RandWarpd(
        affine_prob=1.0, elastic_prob=0.0, rotate_degrees=25.0, tilt_degrees=40.0, shear=0.0, scale_range=((1, 1),) * 3
    )
    tilted = []
    for seed in range(6):
        moved = warp.set_random_state(seed=seed)(sample(label, spacing))["label"][0].numpy()
        found, before = (np.linalg.eigvalsh(np.cov((np.argwhere(array == 1) * spacing).T)) for array in (moved, label))
        assert found[2] == pytest.approx(before[2], rel=0.05)
        places = np.argwhere(moved == 1) * spacing
        tilted.append(float(np.ptp(places[:, 0])))
        assert (moved == 1).sum() == pytest.approx((label == 1).sum(), rel=0.04)
    assert max(tilted) > 8  # some stand out of the plane


def test_what_is_drawn_stays_in_its_range() -> None:
    def drawn(**options: Any) -> np.ndarray:
        warp = RandWarpd(**{**STILL, **options})
        return np.array([warp.set_random_state(seed=seed)._draw_matrix() for seed in range(200)])

    assert np.allclose(drawn(), np.eye(3))
    zooms = drawn(scale_range=((0.5, 0.6), (1, 1), (2, 3)))
    assert np.allclose(zooms, zooms * np.eye(3))
    for axis, low, high in ((0, 0.5, 0.6), (1, 1, 1), (2, 2, 3)):
        assert zooms[:, axis, axis].min() >= low
        assert zooms[:, axis, axis].max() <= high
        assert np.ptp(zooms[:, axis, axis]) >= 0.9 * (high - low)
    shears = drawn(shear=0.2) - np.eye(3)
    assert np.allclose(shears * np.eye(3), 0)
    assert 0.19 < np.abs(shears).max() <= 0.2
    plane = drawn(rotate_degrees=30.0)
    assert np.allclose(plane[:, 0], [1, 0, 0])
    angles = np.degrees(np.arctan2(plane[:, 2, 1], plane[:, 1, 1]))
    assert 28 < np.abs(angles).max() <= 30
    assert angles.min() < -20 < 20 < angles.max()
    tilts = drawn(tilt_degrees=20.0)
    assert np.allclose(tilts @ tilts.transpose(0, 2, 1), np.eye(3))
    assert not np.allclose(tilts[:, 0, 0], 1)


def test_the_bending_is_a_cubic_b_spline() -> None:
    lattice = np.random.default_rng(0).normal(size=(3, 5, 6, 8))
    periods, size = (1.7, 3.0, 4.2), (6, 7, 9)
    found = bend(torch.from_numpy(lattice), periods, size).numpy()
    places = [(np.arange(n) + 0.5) * p / n + 1 for n, p in zip(size, periods, strict=True)]
    where = np.stack(np.meshgrid(*places, indexing="ij"))
    expected = [ndimage.map_coordinates(part, where, order=3, prefilter=False) for part in lattice]
    assert np.allclose(found, expected, atol=1e-12)


def test_a_bending_moves_labels_by_its_displacement_in_micrometres() -> None:
    label = cells(SHAPE, 50)
    displacement = np.random.default_rng(3).normal(0, 1.0, (3, *SHAPE))
    displacement = np.stack([ndimage.gaussian_filter(part, 3) * 20 for part in displacement])
    matrix = rotation("zy", 0.2) @ np.diag([1.1, 0.9, 1.0])
    grid = sampling_grid(
        np.linalg.inv(matrix), torch.from_numpy(displacement).float(), source=SHAPE, size=SHAPE, spacing=SPACING
    )
    shifted = torch.from_numpy(label[None, None] + 1).float()
    found = torch.nn.functional.grid_sample(shifted, grid, mode="nearest", align_corners=False)[0, 0].numpy() - 1
    centre = (np.array(SHAPE) - 1) / 2
    places = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    um = (places - centre) * SPACING + np.moveaxis(displacement, 0, -1)
    there = um @ np.linalg.inv(matrix).T / SPACING + centre
    expected = ndimage.map_coordinates(label, np.moveaxis(there, -1, 0), order=0, mode="grid-constant", cval=-1)
    is_tie = (np.abs(there - np.floor(there) - 0.5) < 1e-3).any(axis=-1)
    assert np.abs(displacement).max() > 1
    assert np.array_equal(found[~is_tie], expected[~is_tie])


@pytest.mark.parametrize("seed", range(3))
def test_the_strongest_bending_does_not_fold(seed: int) -> None:
    warp = RandWarpd(affine_prob=0.0, elastic_prob=1.0, elastic_um=(4.0, 4.0), elastic_period_um=10.0)
    size = np.array((24, 40, 50))
    spacing = np.array((1.5, 1.0, 0.8))
    field = warp.set_random_state(seed=seed)._draw_bending(size * spacing, size).double().numpy()
    assert np.abs(field).max() <= 4.0
    assert np.abs(field).max() > 1.0
    gradient = np.array([np.gradient(part, *spacing) for part in field])  # [component, axis, ...]
    jacobian = np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3))
    assert jacobian.min() > 0
    assert jacobian.std() > 0.05


def test_bent_cells_stay_in_one_piece_and_ids_are_no_others() -> None:
    label = cells((20, 48, 44), 25, seed=4)
    warp = RandWarpd(affine_prob=0.0, elastic_prob=1.0, elastic_um=(3.0, 3.0), elastic_period_um=10.0)
    changed = 0.0
    for seed in range(3):
        moved = warp.set_random_state(seed=seed)(sample(label, (1.0, 1.0, 1.0)))["label"][0].numpy()
        assert set(np.unique(moved)) <= {*np.unique(label), -1}
        changed = max(changed, float((moved != label).mean()))
        for number in np.unique(moved[moved > 0]):
            pieces, count = ndimage.label(moved == number, structure=np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            assert count == 1 or sizes.max() > 0.97 * sizes.sum()  # thin corners may break at voxels
    assert changed > 0.1


def test_without_luck_only_the_margin_is_cut_off() -> None:
    label = cells(SHAPE, 30)
    result = RandWarpd(crop_size=(6, 20, 17), affine_prob=0.0, elastic_prob=0.0)(sample(label))
    assert np.array_equal(result["label"][0].numpy(), label[2:8, 7:27, 5:22])
    assert np.array_equal(result["image"][0].numpy(), label[2:8, 7:27, 5:22])
    still = RandWarpd(affine_prob=1.0, elastic_prob=0.0, **STILL)(sample(label))
    assert np.array_equal(still["label"][0].numpy(), label)
    assert np.allclose(still["image"][0].numpy(), label, atol=1e-3)


def test_a_single_plane_and_a_single_voxel() -> None:
    for shape in ((1, 12, 9), (1, 1, 1), (5, 1, 7)):
        label = np.full(shape, 2, np.int32)
        warp = RandWarpd(affine_prob=1.0, elastic_prob=1.0, elastic_um=(0.0, 0.1))
        result = warp.set_random_state(seed=0)(sample(label))
        assert result["label"].shape == (1, *shape)
        assert set(result["label"].unique().tolist()) <= {-1, 2}
        centre = tuple(n // 2 for n in shape)
        assert result["label"][0][centre] == 2


def test_large_ids_survive_and_larger_ones_are_refused() -> None:
    label = np.full(SHAPE, 16_777_213, np.int32)
    label[:, :9] = 65_537
    warp = RandWarpd(affine_prob=1.0, elastic_prob=1.0)
    result = warp.set_random_state(seed=2)(sample(label))
    assert set(result["label"].unique().tolist()) == {-1, 65_537, 16_777_213}
    label[0, 0, 0] = 1 << 24
    with pytest.raises(ValueError, match="renumber them from 1"):
        warp.set_random_state(seed=2)(sample(label))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elastic_um": (0.0, 5.0), "elastic_period_um": 12.0}, "can fold space"),
        ({"elastic_um": (2.0, 1.0)}, "two amplitudes"),
        ({"elastic_period_um": 0.0}, "elastic_period_um=0.0"),
        ({"shear": 0.5}, "shear=0.5"),
        ({"scale_range": ((1, 1), (0, 1), (1, 1))}, "magnifications"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandWarpd(**options)


def test_planes_are_turned_where_they_are_square_in_voxels_and_micrometres() -> None:
    label = torch.arange(2 * 6 * 6 * 6, dtype=torch.int32).reshape(2, 6, 6, 6)[:1]
    data = {"image": label.float(), "label": label}
    planes = {"zy": (1, 2), "zx": (1, 3), "yx": (2, 3)}
    for plane, axes in planes.items():
        for spacing, may_turn in (
            (None, True),
            ((2.0, 2.0, 2.0), True),
            ((2.0, 2.1, 2.0), True),
            ((2.0, 0.8, 0.8), plane == "yx"),
        ):
            brought = {} if spacing is None else {"spacing_um": torch.tensor(spacing)}
            turned = RandTurnPlaned(prob=1.0, plane=plane).set_random_state(seed=3)({**data, **brought})
            expected = [torch.rot90(label, k, axes) for k in (1, 2, 3)] if may_turn else [label]
            assert any(torch.equal(torch.as_tensor(turned["label"]), one) for one in expected)
            assert torch.equal(torch.as_tensor(turned["image"]), torch.as_tensor(turned["label"]).float())
    with pytest.raises(ValueError, match="plane='xy'"):
        RandTurnPlaned(plane="xy")


def test_a_strong_augmentation_repeats_whatever_the_threads() -> None:
    options: dict[str, Any] = {
        "tilt_degrees": 10.0,
        "shear": 0.1,
        "affine_prob": 1.0,
        "elastic_prob": 1.0,
        "intensity_prob": 1.0,
        "coarse_z_prob": 1.0,
        "channel_drop_prob": 1.0,
    }
    label = cells(SHAPE, 40)
    data = {**sample(label), "image": torch.rand(2, *SHAPE)}
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            transform = train_transforms(crop_size=(7, 20, 18), **options)
            results.append(transform.set_random_state(seed=11)(data))
    finally:
        torch.set_num_threads(threads)
    for key in ("image", "label"):
        assert torch.equal(torch.as_tensor(results[0][key]), torch.as_tensor(results[1][key]))
    assert results[0]["image"].shape == (2, 7, 20, 18)
    assert np.array_equal(data["label"][0].numpy(), label)  # the input is left as it was
