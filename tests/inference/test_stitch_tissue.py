"""Stitching dense tissue: exact with a perfect predictor, and no seam with one whose masks wobble."""

import numpy as np
import pytest
from inference_toys import Jittered, Perfect, blank, same_partition, tissue_seeds, voronoi

from seg3d_monai.inference import predict_labels

SHAPE = (36, 70, 62)
TRUTH = voronoi(tissue_seeds(SHAPE, (8, 14, 12), seed=1), (0, 0, 0, *SHAPE))


@pytest.mark.parametrize(
    ("block_size", "halo"),
    [((12, 24, 20), (1, 1, 1)), ((7, 35, 62), (2, 3, 0)), ((13, 17, 64), (4, 9, 2)), ((10, 16, 9), (6, 3, 7)), (99, 0)],
)
def test_every_grid_gives_the_truth(block_size, halo):
    labels, table = predict_labels(blank(SHAPE), Perfect(TRUTH), block_size, halo)
    assert same_partition(labels, TRUTH)
    ids, volumes = np.unique(labels, return_counts=True)
    assert table["id"].tolist() == ids.tolist()
    assert table["volume_voxels"].tolist() == volumes.tolist()


@pytest.mark.parametrize("kind", ["rods", "shells"])
def test_objects_through_five_blocks(kind):
    z, y, x = np.indices((20, 25, 30))
    if kind == "rods":
        truth = 1 + (y // 2) * 30 + x // 3  # along z
    else:
        depth = np.maximum(np.maximum(abs(z - 9.5) / 10, abs(y - 12) / 12.5), abs(x - 14.5) / 15)
        truth = 1 + (depth * 4).astype(int)  # closed boxes around each other
    labels, _ = predict_labels(blank(truth.shape), Perfect(truth), (4, 5, 6), (1, 2, 1))
    assert same_partition(labels, truth)


def seam_errors(truth, labels, block_size):
    """(cells on a face, of these split, merged or lost), (other cells, ...)."""
    stride = int(labels.max()) + 1
    keys, shared = np.unique(truth.ravel().astype(np.int64) * stride + labels.ravel(), return_counts=True)
    cell, found = keys // stride, keys % stride
    cell_size, found_size = np.bincount(truth.ravel()), np.bincount(labels.ravel())
    cell_size[0] = found_size[0] = 0
    real = found > 0
    cell, found, shared = cell[real], found[real], shared[real]
    num_inside = np.bincount(cell[2 * shared > found_size[found]], minlength=len(cell_size))  # objects mostly in a cell
    covered = 2 * shared > cell_size[cell]
    num_covered = np.bincount(found[covered], minlength=len(found_size))  # cells mostly within an object
    merged = np.bincount(cell[covered & (num_covered[found] > 1)], minlength=len(cell_size)) > 0
    iou = np.zeros(len(cell_size))
    np.maximum.at(iou, cell, shared / (cell_size[cell] + found_size[found] - shared))
    bad = (num_inside > 1) | merged | (iou < 0.3)
    on_face = np.zeros(len(cell_size), bool)
    for axis, size in enumerate(block_size):
        for face in range(size, truth.shape[axis], size):
            before, behind = np.take(truth, face - 1, axis), np.take(truth, face, axis)
            on_face[before[before == behind]] = True
    exists = cell_size > 0
    return (
        (on_face & exists).sum(),
        (on_face & bad & exists).sum(),
        (~on_face & exists).sum(),
        (~on_face & bad & exists).sum(),
    )


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
def test_no_seams_when_every_block_sees_other_seeds(sigma):
    shape, block_size, halo = (44, 96, 80), (22, 36, 30), (8, 12, 12)
    seeds = tissue_seeds(shape, (10, 12, 12), seed=3)
    truth = voronoi(seeds, (0, 0, 0, *shape))
    labels, _ = predict_labels(blank(shape), Jittered(seeds, sigma), block_size, halo)
    num_seam, bad_seam, num_inner, bad_inner = seam_errors(truth, labels, block_size)
    assert num_seam > 150
    assert num_inner > 30
    assert bad_inner == 0
    assert bad_seam == 0  # the rate must stay below 0.5 % of the cells on a face


def test_two_grids_find_the_same_cells():
    seeds = tissue_seeds(SHAPE, (12, 14, 12), seed=4)
    first, _ = predict_labels(blank(SHAPE), Jittered(seeds, 0.5), (18, 24, 32), (8, 12, 12))
    second, _ = predict_labels(blank(SHAPE), Jittered(seeds, 0.5), (12, 35, 20), (8, 12, 12))
    assert first.max() == second.max()
    stride = int(second.max()) + 1
    keys, shared = np.unique(first.ravel().astype(np.int64) * stride + second.ravel(), return_counts=True)
    a, b = keys // stride, keys % stride
    iou = shared / (np.bincount(first.ravel())[a] + np.bincount(second.ravel())[b] - shared)
    partners = np.flatnonzero(iou > 0.5)
    assert len(partners) == first.max()
