"""Crops of touching cells for tests that learn them by heart, and instances painted into a label volume."""

import numpy as np
import torch

from seg3d_monai.data.intensity import Intensity
from seg3d_monai.inference import InstancePredictor

SIZE = (24, 64, 80)
CELL = (8, 16, 16)


def tissue(count, seed=0, size=SIZE):
    """Labels [D, H, W] of `count` cells packed without gaps: a jittered lattice's Voronoi cells, rounded.

    The lattice has one cell for each CELL in `size`, 60 in SIZE.
    """
    rng = np.random.default_rng(seed)
    lattice = np.stack(np.meshgrid(*(np.arange(c / 2, n, c) for n, c in zip(size, CELL, strict=True)), indexing="ij"))
    seeds = lattice.reshape(3, -1).T + rng.uniform(-0.12, 0.12, (lattice[0].size, 3)) * CELL
    near = np.abs((seeds - np.array(size) / 2) / CELL).sum(1).argsort(kind="stable")[:count]
    places = np.stack(np.indices(size), -1)[..., None, :]
    distance = np.sqrt((((places - seeds[near]) / CELL) ** 2).sum(-1))
    label = np.where(distance.min(-1) < 0.62, distance.argmin(-1) + 1, 0)
    return torch.from_numpy(label)


def image_of(label):
    """float32 [1, D, H, W]: noisy, and darker towards each cell's surface, so that touching cells can be told apart."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.zeros(label.shape)
    for number in label.unique()[1:]:
        mask = (label == number).float()[None, None]
        pooled = torch.nn.functional.avg_pool3d(mask, (3, 5, 5), 1, (1, 2, 2))[0, 0]
        inner += pooled * mask[0, 0]
    return (inner + 0.1 * torch.randn(label.shape, generator=generator))[None]


def target_of(label):
    """The targets of a label volume, all of class 0."""
    ids = label.unique()[1:]
    corners = [(label == i).nonzero() for i in ids]
    boxes = torch.stack([torch.cat([c.amin(0), c.amax(0) + 1]) for c in corners]).float()
    return {"label": label, "ids": ids, "boxes": boxes, "classes": torch.zeros(len(ids), dtype=torch.int64)}


def predicted_labels(network, image, score_threshold=0.5):
    """Labels [D, H, W] of what the shipped predictor finds in one crop, higher scores in front."""
    predictor = InstancePredictor(
        network=network,
        score_threshold=score_threshold,
        min_visible=0.5,
        intensity=Intensity(low=(0.0,), high=(1.0,)),
        device=next(network.parameters()).device,
    )
    size = image.shape[1:]
    found = predictor(image, (0, 0, 0, *size))
    label = np.zeros(size, dtype=np.int64)
    for i in reversed(range(len(found.masks))):
        corner = np.floor(found.boxes[i, :3]).astype(int)
        mask = found.masks[i]
        label[tuple(slice(c, c + n) for c, n in zip(corner, mask.shape, strict=True))][mask] = i + 1
    return label
