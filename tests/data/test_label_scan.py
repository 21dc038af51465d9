"""Scans of label voxels: every crop and every instance against a loop over ids, whatever the blocks."""

import time
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
from crop_toys import boxes_by_loop, label_volume

from seg3d_monai.data.crop_grid import CropGrid, crop_starts
from seg3d_monai.data.label_scan import CropRows, check_label, join_crops, join_instances, measure_block


def scan(label: np.ndarray, grid: CropGrid, block: Sequence[int]) -> np.ndarray:
    """Rows of all blocks of a size."""
    parts = []
    for z, y, x in product(*(range(0, n, step) for n, step in zip(label.shape, block, strict=True))):
        part = label[z : z + block[0], y : y + block[1], x : x + block[2]]
        parts.append(measure_block(part, (z, y, x), grid))
    return np.concatenate(parts)


def crops_of(rows: np.ndarray, grid: CropGrid) -> list[CropRows]:
    """Crops of every layer, with labels as ids."""
    rows = rows.copy()
    rows[:, 0] = np.maximum(rows[:, 0], 0)
    return [join_crops(rows, grid, layer) for layer in range(grid.counts[0])]


@pytest.mark.parametrize(("size", "crop", "stride"), [(10, 4, 3), (11, 4, 4), (3, 4, 2), (4, 4, 1), (20, 5, 5)])
def test_starts_cover_an_axis(size: int, crop: int, stride: int) -> None:
    starts = crop_starts(size, crop, stride)
    covered = {voxel for start in starts for voxel in range(start, min(start + crop, size))}
    assert covered == set(range(size))
    assert starts == sorted(set(starts))
    assert starts[-1] + min(crop, size) == size
    assert all(b - a <= stride for a, b in pairwise(starts))


def test_starts_by_hand() -> None:
    assert crop_starts(10, 4, 3) == [0, 3, 6]
    assert crop_starts(11, 4, 4) == [0, 4, 7]
    assert crop_starts(3, 4, 2) == [0]


def test_a_grid_by_hand() -> None:
    grid = CropGrid((6, 8, 12), (4, 8, 6), (2, 4, 6))
    assert (grid.counts, len(grid), grid.extent) == ((2, 1, 2), 4, (4, 8, 6))
    assert [grid.roi(n) for n in range(4)] == [
        (0, 0, 0, 4, 8, 6),
        (0, 0, 6, 4, 8, 12),
        (2, 0, 0, 6, 8, 6),
        (2, 0, 6, 6, 8, 12),
    ]
    assert grid.corners().tolist() == [list(grid.roi(n)[:3]) for n in range(4)]
    assert [faces.tolist() for faces in grid.faces] == [[0, 2, 4, 6], [0, 8], [0, 6, 12]]


def test_the_nearest_crop_is_that_of_a_loop() -> None:
    grid = CropGrid((9, 20, 31), (4, 7, 10), (3, 3, 8))
    centres = grid.corners() * 2 + np.array(grid.extent)
    rng = np.random.default_rng(1)
    for _ in range(200):
        low = np.array([rng.integers(0, n - 2) for n in grid.shape])
        high = low + [rng.integers(1, n - a + 1) for n, a in zip(grid.shape, low, strict=True)]
        distance = np.abs(centres - (low + high))
        best = [
            min(set(centres[:, axis].tolist()), key=lambda c, axis=axis: (abs(c - (low + high)[axis]), c))
            for axis in range(3)
        ]
        found = grid.nearest((*low.tolist(), *high.tolist()))
        assert centres[found].tolist() == best, distance[found]


@pytest.mark.parametrize(
    ("crop", "stride"),
    [((5, 7, 9), (2, 3, 4)), ((4, 4, 4), (4, 4, 4)), ((50, 6, 50), (25, 5, 1)), ((1, 2, 3), (1, 1, 1))],
)
@pytest.mark.parametrize("block", [(1, 1, 1), (4, 5, 7), (11, 3, 20), (50, 50, 50)])
def test_a_scan_agrees_with_a_loop_over_crops(
    crop: tuple[int, int, int], stride: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(3)
    label = np.kron(rng.integers(0, 40, (4, 5, 7)), np.ones((3, 3, 3), int))[:11, :13, :20].astype(np.uint16) * 3
    label[rng.random(label.shape) < 0.05] = 65535
    truth = np.where(label == 65535, -1, label.astype(np.int64))
    grid = CropGrid(label.shape, crop, stride)
    rows = scan(label, grid, block)
    layers = crops_of(rows, grid)
    per_layer = grid.counts[1] * grid.counts[2]
    for number in range(len(grid)):
        layer, place = divmod(number, per_layer)
        z1, y1, x1, z2, y2, x2 = grid.roi(number)
        part = truth[z1:z2, y1:y2, x1:x2]
        inside = layers[layer].crops == place
        ids, boxes = layers[layer].ids[inside], layers[layer].boxes[inside]
        voxels = dict(zip(ids.tolist(), layers[layer].voxels[inside].tolist(), strict=True))
        expected = boxes_by_loop(part)
        assert ids[ids > 0].tolist() == list(expected)
        assert boxes[ids > 0].tolist() == list(expected.values())
        assert [voxels[i] for i in expected] == [int((part == i).sum()) for i in expected]
        assert voxels.get(0, 0) == int((part == -1).sum())
    totals = join_instances(rows[rows[:, 0] > 0])
    expected = boxes_by_loop(truth)
    assert totals[:, 0].tolist() == list(expected)
    assert totals[:, 2:].tolist() == list(expected.values())
    assert totals[:, 1].tolist() == [int((truth == i).sum()) for i in expected]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.uint64])
def test_every_integer_type_is_scanned(dtype: type) -> None:
    label = label_volume((3, 5, 7), {1: (0, 0, 0, 2, 2, 2), 120: (1, 3, 2, 3, 5, 6)}, dtype)
    label[2, 0, 6] = np.iinfo(dtype).max
    rows = measure_block(label, (10, 20, 30), CropGrid((50, 50, 50), (50, 50, 50), (50, 50, 50)))
    assert rows.tolist() == [
        [-1, 1, 12, 20, 36, 13, 21, 37],
        [1, 8, 10, 20, 30, 12, 22, 32],
        [120, 16, 11, 23, 32, 13, 25, 36],
    ]


def test_ids_as_large_as_they_get() -> None:
    label = np.zeros((1, 2, 4), np.uint64)
    label[0, 0] = [2**63 - 1, 2**63 - 1, 5, 2**64 - 1]
    grid = CropGrid(label.shape, (1, 2, 4), (1, 1, 1))
    rows = measure_block(label, (0, 0, 0), grid)
    assert rows[:, :2].tolist() == [[-1, 1], [5, 1], [2**63 - 1, 2]]
    assert join_instances(np.concatenate([rows[1:], rows[1:]]))[:, :2].tolist() == [[5, 2], [2**63 - 1, 4]]


def test_nothing_is_scanned_to_nothing() -> None:
    grid = CropGrid((3, 5, 7), (2, 3, 4), (1, 2, 2))
    rows = measure_block(np.zeros((3, 5, 7), np.uint16), (0, 0, 0), grid)
    assert rows.shape == (0, 8)
    assert join_instances(rows).shape == (0, 8)
    assert all(len(layer.crops) == 0 for layer in crops_of(rows, grid))


@pytest.mark.parametrize("shape", [(1, 40, 50), (40, 1, 50), (40, 50, 1), (1, 1, 1)])
def test_volumes_one_voxel_thick(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, shape).astype(np.uint8)
    grid = CropGrid(shape, (8, 16, 16), (4, 8, 8))
    totals = join_instances(scan(label, grid, (16, 16, 16)))
    assert totals[:, 2:].tolist() == list(boxes_by_loop(label).values())
    joined = crops_of(scan(label, grid, (7, 7, 7)), grid)
    assert sum(len(layer.crops) for layer in joined) >= len(totals)


def test_one_object_fills_everything() -> None:
    label = np.full((12, 20, 30), 7, np.uint32)
    grid = CropGrid(label.shape, (4, 8, 10), (2, 4, 5))
    rows = scan(label, grid, (5, 20, 30))
    assert join_instances(rows).tolist() == [[7, label.size, 0, 0, 0, 12, 20, 30]]
    for layer in crops_of(rows, grid):
        assert layer.crops.tolist() == list(range(grid.counts[1] * grid.counts[2]))
        assert (layer.voxels == 4 * 8 * 10).all()
        assert (layer.boxes == [0, 0, 0, 4, 8, 10]).all()


def test_a_hundred_thousand_ids() -> None:
    ids = np.random.default_rng(0).permutation(100_000).reshape(25, 50, 80).astype(np.uint32) * 40_000 + 1
    label = np.kron(ids, np.ones((2, 2, 2), np.uint32))
    grid = CropGrid(label.shape, (16, 32, 32), (8, 16, 16))
    start = time.perf_counter()
    rows = measure_block(label, (0, 0, 0), grid)
    totals = join_instances(rows)
    layers = crops_of(np.column_stack([np.searchsorted(totals[:, 0], rows[:, 0]) + 1, rows[:, 1:]]), grid)
    assert time.perf_counter() - start < 20
    assert len(totals) == 100_000
    assert (totals[:, 1] == 8).all()
    assert [len(layer.crops) for layer in layers] == [
        16 * 32 * 32 // 8 * grid.counts[1] * grid.counts[2]
    ] * grid.counts[0]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full((3, 4, 5), -1, np.int16), "labels hold -1"),
        (np.full((3, 4, 5), 2**63, np.uint64), "2\\*\\*63"),
    ],
)
def test_labels_that_are_not_ids_are_refused(label: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_block(label, (0, 0, 0), CropGrid(label.shape, (2, 3, 4), (1, 2, 2)), name="v")


@pytest.mark.parametrize(
    ("dtype", "channels", "message"),
    [(bool, 1, "dtype bool"), (np.float32, 1, "dtype float32"), (np.uint8, 2, "2 channels")],
)
def test_volumes_that_hold_no_labels_are_refused(dtype: type, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"v: labels have {message}"):
        check_label(np.dtype(dtype), channels, "v")
