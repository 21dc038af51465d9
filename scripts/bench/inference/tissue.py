"""Synthetic tissue without gaps, and a predictor that is perfect but for where each block sees the cells' seeds."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation
from torch import Tensor

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import Instances

Roi = tuple[int, int, int, int, int, int]
Seeds = NDArray[np.float64]
Labels = NDArray[np.int32]

JITTER = 0.35
"""How far a seed lies from its lattice point along each axis, at most, in diameters."""
TILE = 8


def tissue_seeds(shape: tuple[int, int, int], diameter: float, seed: int) -> Seeds:
    """Seeds of a volume's cells: a jittered cubic lattice, turned and shifted at random, so that it fits no grid.

    Args:
        shape: (Z, Y, X) of the volume, voxels.
        diameter: distance of neighbouring lattice points, voxels; a cell has diameter**3 voxels on average.
        seed: of every draw.

    Returns:
        [N, 3] (z, y, x), voxels, all within the volume.
    """
    rng = np.random.default_rng([seed, round(1000 * diameter)])
    extent = np.asarray(shape, dtype=np.float64)
    steps = np.arange(-(count := int(np.linalg.norm(extent) / 2 / diameter) + 2), count + 1)
    lattice = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    moved = lattice + rng.uniform(-JITTER, JITTER, lattice.shape) + rng.uniform(-0.5, 0.5, 3)
    points = Rotation.random(rng=rng).apply(moved * diameter) + extent / 2
    return points[((points >= 0) & (points < extent)).all(axis=1)]


def voronoi(seeds: Seeds, roi: Roi) -> Labels:
    """The number + 1 of the seed that is nearest to each voxel's centre; of two, the lower.

    A tile's voxels can only belong to seeds that are near its centre. A tree finds these; each voxel then looks at them
    alone, which is several times faster than to ask the tree for each voxel.

    Args:
        seeds: [N, 3] (z, y, x), N >= 1.
        roi: (z1, y1, x1, z2, y2, x2), voxels.

    Returns:
        [d, h, w].
    """
    shape = (roi[3] - roi[0], roi[4] - roi[1], roi[5] - roi[2])
    labels = np.empty(shape, dtype=np.int32)
    corners = np.stack(np.meshgrid(*(np.arange(0, n, TILE) for n in shape), indexing="ij"), axis=-1).reshape(-1, 3)
    centres = corners + np.asarray(roi[:3]) + TILE / 2
    radius = np.sqrt(3) * (TILE - 1) / 2
    tree = cKDTree(seeds)
    nearest, _ = tree.query(centres)
    # A voxel's own seed is no farther from it than the centre's seed is, which is within nearest + radius.
    candidates = tree.query_ball_point(centres, nearest + 2 * radius + 1e-6, return_sorted=True)
    offsets = np.stack(np.meshgrid(*(np.arange(TILE) + 0.5,) * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    for corner, near in zip(corners, candidates, strict=True):
        numbers = np.asarray(near)
        owner = cdist(offsets + (corner + roi[:3]), seeds[numbers], "sqeuclidean").argmin(axis=1)
        z, y, x = corner
        window = labels[z : z + TILE, y : y + TILE, x : x + TILE]
        d, h, w = window.shape
        window[...] = (numbers[owner] + 1).reshape(TILE, TILE, TILE)[:d, :h, :w]
    return labels


def to_instances(labels: NDArray[np.integer], rng: np.random.Generator) -> Instances:
    """The instances of a label crop, by ascending id, with random scores in 0.5 to 1."""
    boxes, masks = [], []
    for index, box in enumerate(find_objects(labels), start=1):
        if box is not None:
            boxes.append([axis.start for axis in box] + [axis.stop for axis in box])
            masks.append(labels[box] == index)
    return Instances(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 6),
        scores=rng.uniform(0.5, 1.0, len(masks)),
        classes=np.zeros(len(masks), dtype=np.int64),
        masks=masks,
    )


class DisplacedTissue:
    """A predictor of tissue that is perfect, except that every block sees the seeds displaced by draws of its own.

    Args:
        seeds: [N, 3] of the tissue, voxels.
        sigma: standard deviation of a seed's displacement along each axis, voxels.
        seed: of the draws; a block's also depend on its ROI.
    """

    def __init__(self, seeds: Seeds, sigma: float, seed: int = 0) -> None:
        self.seeds, self.sigma, self.seed = seeds, sigma, seed

    def __call__(self, block: Tensor, roi: Roi) -> Instances:
        """The instances of a block; its voxels are not looked at."""
        rng = np.random.default_rng([self.seed, *roi])
        return to_instances(voronoi(self.seeds + rng.normal(0, self.sigma, self.seeds.shape), roi), rng)


class Truth:
    """A predictor that returns the truth, cut to the ROI that it got.

    Args:
        labels: [Z, Y, X], the true ids of the volume.
    """

    def __init__(self, labels: NDArray[np.integer]) -> None:
        self.labels = labels

    def __call__(self, block: Tensor, roi: Roi) -> Instances:
        """The instances of a block; its voxels are not looked at."""
        cut = self.labels[roi[0] : roi[3], roi[1] : roi[4], roi[2] : roi[5]]
        return to_instances(cut, np.random.default_rng(roi))


def image_of(truth: NDArray[np.integer]) -> ArrayVolume:
    """An image without constant blocks, which a run may take for empty; the predictors here do not look at it."""
    ramp = np.arange(truth.shape[2], dtype=np.uint8)
    return ArrayVolume(np.broadcast_to(ramp, truth.shape), (2.0, 1.0, 0.5))
