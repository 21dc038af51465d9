"""Volumes and a detector for the search for settings, whose best settings follow by hand.

The detector finds connected voxels that are not dark. Grey values are thousandths: an object whose brightest voxel is
600 has the score 0.6, and a voxel of it that is 240 belongs to it with a probability of 240 / 600.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import nn

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import InstancePredictor

SETTINGS = {"score_threshold": 0.8, "mask_threshold": 0.5, "min_voxels": 1, "min_visible": 0.0}
CANDIDATES = {"mask_threshold": [0.3, 0.5, 0.7], "min_voxels": [1, 4, 16], "min_visible": [0.0, 0.5, 0.9]}


class Bright(nn.Module):
    """A detector whose answer stands in the image.

    Args:
        backbone: not used; stands for that of a bundle's network.
        detection_nms_threshold: from 0.5 on every object is found again, one voxel further along x, a little less sure.
        capacity: the most objects of one image.
    """

    def __init__(self, *, backbone=None, detection_nms_threshold=0.4, capacity=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.detection_nms_threshold, self.capacity = detection_nms_threshold, capacity
        self.looks = []

    def forward(self, images):
        self.looks.append((self.detection_nms_threshold, tuple(images.shape[2:])))
        return [self.detect(image[0].numpy()) for image in images]

    def detect(self, image):
        labels, _ = ndimage.label(image > 0.02)
        boxes, scores, grids = [], [], []
        for number, window in enumerate(ndimage.find_objects(labels), start=1):
            inside = labels[window] == number
            scores.append(float(image[window][inside].max()))
            prob = np.where(inside, image[window] / scores[-1], 0).clip(0.001, 0.999)
            boxes.append([s.start for s in window] + [s.stop for s in window])
            grids.append(torch.from_numpy(np.log(prob / (1 - prob)).astype(np.float32)))
        if self.detection_nms_threshold >= 0.5:
            boxes += [np.add(box, (0, 0, 1, 0, 0, 1)).clip(max=[2**30] * 5 + [image.shape[2]]) for box in boxes]
            scores += [score - 0.001 for score in scores]
            grids += list(grids)
        order = np.argsort(-np.array(scores, dtype=np.float64), kind="stable")[: self.capacity]
        return {
            "boxes": torch.tensor(np.array(boxes, np.float32).reshape(-1, 6)[order]),
            "scores": torch.tensor(np.array(scores, np.float32)[order]),
            "classes": torch.zeros(len(order), dtype=torch.int64),
            "mask_logits": [grids[i] for i in order],
        }


def scene(shape, cells):
    """Image and labels of boxes.

    Args:
        shape: (z, y, x) voxels.
        cells: (box, grey value, whether it is a true object, grey value of its outermost voxels along x, or None).
    """
    image, labels = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
    for number, ((z1, y1, x1, z2, y2, x2), grey, is_true, rim) in enumerate(cells, start=1):
        image[z1:z2, y1:y2, x1:x2] = grey
        if rim is not None:
            image[z1:z2, y1:y2, [x1, x2 - 1]] = rim
        if is_true:
            labels[z1:z2, y1:y2, x1:x2] = number
    return image, labels


def item(image, labels, name="toy", split="val", spacing=None):
    return {
        "volume": ArrayVolume(image, spacing),
        "label": ArrayVolume(labels, spacing),
        "name": name,
        "split": split,
    }


def row_of_cells(greys, trues, *, rim=None, size=(4, 5, 6), gap=3):
    """Cells of one size along x, `gap` dark voxels between them."""
    d, h, w = size
    cells = [
        ((1, 2, gap + i * (w + gap), 1 + d, 2 + h, gap + i * (w + gap) + w), grey, is_true, rim and round(rim * grey))
        for i, (grey, is_true) in enumerate(zip(greys, trues, strict=True))
    ]
    return scene((d + 2, h + 4, gap + len(cells) * (w + gap)), cells)


def known_best(rim=None):
    """Four true cells with scores from 0.6, and three false ones up to 0.5: best is a threshold in between."""
    return row_of_cells([1000, 500, 600, 480, 700, 450, 800], [True, False, True, False, True, False, True], rim=rim)


def predictor_of(network, **changes):
    """A predictor to which grey values are thousandths, where the volume holds 0 and 1000."""
    return InstancePredictor(network=network, percentiles=(0.0, 100.0), **SETTINGS | changes)
