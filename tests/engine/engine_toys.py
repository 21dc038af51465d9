"""Toy network, criterion, loader, volumes and predictor that keep the engine's contracts."""

import numpy as np
import torch
from torch import nn

from seg3d_monai.engine import VolumeEvaluator
from seg3d_monai.inference import Instances

SHAPE = (2, 3, 5)  # z, y, x of every toy image: anisotropic, not a cube


class ToyNetwork(nn.Module):
    """One linear map of the image, with dropout so that random draws show in the losses."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.linear = nn.Linear(SHAPE[0] * SHAPE[1] * SHAPE[2], 2)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images, targets):
        self.seen += len(images)
        return {"value": self.linear(self.dropout(images.flatten(1)))}


def toy_criterion(outputs, targets):
    """Two weighted losses, each a mean over the batch."""
    value = outputs["value"].float()
    wanted = torch.stack([target["classes"].float().mean() for target in targets])
    return {"first": 2 * (value[:, 0] - wanted).square().mean(), "second": (value[:, 1] + wanted).abs().mean()}


class ToyLoader:
    """Batches that are a function of (epoch, position), as CropLoader's."""

    def __init__(self, num_batches=4, batch_size=2, poison=None):
        self.num_batches, self.batch_size, self.poison = num_batches, batch_size, poison
        self.epoch = None
        self.served = []

    def __len__(self):
        return self.num_batches

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for position in range(self.num_batches):
            self.served.append((self.epoch, position))
            yield self.batch(self.epoch, position)

    def batch(self, epoch, position):
        crops = [position * self.batch_size + i for i in range(self.batch_size)]
        images, targets = [], []
        for crop in crops:
            generator = torch.Generator().manual_seed(1000 * epoch + crop)
            images.append(torch.rand(1, *SHAPE, generator=generator))
            targets.append({"classes": torch.tensor([crop % 3]), "boxes": torch.zeros(1, 6)})
        image = torch.stack(images)
        if (epoch, position) == self.poison:
            image[0, 0, 0, 0, 0] = float("nan")
        return {"image": image, "targets": targets, "crop_id": crops}


class ToyVolume:
    """An in-memory volume with the face that evaluation uses."""

    def __init__(self, array):
        self.array = array[None]
        self.shape, self.dtype, self.spacing_um, self.path = self.array.shape, array.dtype, None, None

    def read(self, roi):
        z1, y1, x1, z2, y2, x2 = roi
        return self.array[:, z1:z2, y1:y2, x1:x2]

    def identity(self):
        return {"bytes": self.array.tobytes().hex()}


class ToyPredictor:
    """Finds exactly the labels that the image holds as voxel values; drops those above `largest`."""

    def __init__(self, largest=1_000):
        self.largest = largest

    def __call__(self, block, roi):
        labels = block[0].numpy().astype(int)
        boxes, masks = [], []
        for label in np.unique(labels[(labels > 0) & (labels <= self.largest)]):
            where = np.argwhere(labels == label)
            lower, upper = where.min(0), where.max(0) + 1
            boxes.append([*lower, *upper])
            masks.append(labels[tuple(map(slice, lower, upper))] == label)
        boxes = np.array(boxes, dtype=np.float32).reshape(-1, 6)
        return Instances(boxes=boxes, scores=np.ones(len(masks)), classes=np.zeros(len(masks), dtype=int), masks=masks)


def three_bars():
    """Labels 1, 2, 3: bars of 8, 12 and 16 voxels in a volume of 6 x 8 x 20."""
    labels = np.zeros((6, 8, 20), dtype=np.uint16)
    labels[0:2, 1:3, 2:4] = 1
    labels[2:4, 4:6, 5:8] = 2
    labels[4:6, 0:2, 10:14] = 3
    return labels


def toy_item(labels, name="toy"):
    """A validation item whose image holds the label ids as voxel values."""
    return {"volume": ToyVolume(labels), "label": ToyVolume(labels), "name": name}


class Scripted(ToyPredictor):
    """Gets better or worse from validation to validation: what it finds is set by a list."""

    def __init__(self, largest_each_time, look=lambda: None):
        super().__init__()
        self.script, self.look = list(largest_each_time), look

    def __call__(self, block, roi):
        self.largest = self.script.pop(0)
        self.look()
        return super().__call__(block, roi)


def evaluator_of(*script, look=lambda: None, volumes=1):
    """An evaluator that finds the bars up to 1, 2 or 3 at each validation: F1 of 0.5, 0.8 or 1."""
    return VolumeEvaluator(dataset=[toy_item(three_bars())] * volumes, predictor=Scripted(script, look))


def toy_items():
    """The validation set of the toy bundle."""
    return [toy_item(three_bars())]
