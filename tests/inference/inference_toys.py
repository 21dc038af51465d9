"""Predictors whose answer is known: the truth itself, the truth with jittered seeds, and views drawn as text."""

import hashlib
from pathlib import Path

import numpy as np
import torch
import zarr
from scipy.ndimage import find_objects
from scipy.spatial import cKDTree

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import Instances


def to_instances(labels, scores=None):
    """Instances of a label crop, by ascending id; scores: {id: score}."""
    boxes, masks, values = [], [], []
    for index, box in enumerate(find_objects(labels)):
        if box is not None:
            boxes.append([s.start for s in box] + [s.stop for s in box])
            masks.append(labels[box] == index + 1)
            values.append((scores or {}).get(index + 1, 0.9))
    return Instances(
        boxes=np.array(boxes, np.float64).reshape(-1, 6),
        scores=np.array(values),
        classes=np.zeros(len(masks), np.int64),
        masks=masks,
    )


def crop(labels, roi):
    return labels[roi[0] : roi[3], roi[1] : roi[4], roi[2] : roi[5]]


class Perfect:
    """Returns the truth's instances, cropped to the roi that it got."""

    def __init__(self, truth):
        self.truth = truth

    def __call__(self, block, roi):
        assert isinstance(block, torch.Tensor)
        assert block.dtype == torch.float32
        assert tuple(block.shape[1:]) == crop(self.truth, roi).shape
        return to_instances(crop(self.truth, roi))


class Logging(Perfect):
    """Perfect; notes every roi in a file; fails at the n-th call if told so."""

    def __init__(self, truth, log, fail_at=None):
        super().__init__(truth)
        self.log, self.fail_at = Path(log), fail_at

    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def identity(self):
        return {"name": "logging"}

    def __call__(self, block, roi):
        if self.fail_at is not None and len(self.calls()) >= self.fail_at:
            raise RuntimeError("out of memory")
        with self.log.open("a") as file:
            file.write(f"{roi}\n")
        return super().__call__(block, roi)


class Jittered:
    """Voronoi tissue whose seeds every block sees displaced by noise of its own."""

    def __init__(self, seeds, sigma):
        self.seeds, self.sigma = seeds, sigma

    def __call__(self, block, roi):
        rng = np.random.default_rng([*roi, 1])
        labels = voronoi(self.seeds + rng.normal(0, self.sigma, self.seeds.shape), roi)
        scores = dict(enumerate(rng.uniform(0.5, 1, len(self.seeds)), start=1))
        return to_instances(labels, scores)


def voronoi(seeds, roi):
    axes = [np.arange(roi[a], roi[a + 3]) + 0.5 for a in range(3)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return cKDTree(seeds).query(grid.reshape(-1, 3))[1].reshape(grid.shape[:3]) + 1


def tissue_seeds(shape, diameter, seed):
    axes = [np.arange(d / 2, n, d) for n, d in zip(shape, diameter, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return grid + np.random.default_rng(seed).uniform(-0.35, 0.35, grid.shape) * np.array(diameter)


class Drawn:
    """A 1-D stack; what each block sees is drawn as text over its read roi, one letter an instance."""

    def __init__(self, views, scores=None):
        self.views = {(x, len(text)): text for x, text in views}
        self.scores = scores or {}

    def __call__(self, block, roi):
        text = self.views[roi[2], roi[5] - roi[2]]
        labels = np.array([0 if c == "." else ord(c) - ord("a") + 1 for c in text]).reshape(1, 1, -1)
        return to_instances(labels, {ord(c) - ord("a") + 1: s for c, s in self.scores.items()})


def blank(shape, spacing_um=(2.0, 1.0, 0.5)):
    return ArrayVolume(np.zeros(shape, np.uint8), spacing_um)


def same_partition(a, b):
    """Whether two label arrays are equal up to the names of the ids, background to background."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]).astype(np.int64), axis=1)
    one_to_one = len(np.unique(pairs[0])) == pairs.shape[1] == len(np.unique(pairs[1]))
    return one_to_one and bool(((pairs[0] == 0) == (pairs[1] == 0)).all())


def tree_digest(folder):
    """Every file below a folder with the digest of its bytes."""
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def labels_of(output):
    """The labels of an OUTPUT, level 0, in memory."""
    return np.asarray(zarr.open_array(output, path="labels/instances/0", mode="r"))
