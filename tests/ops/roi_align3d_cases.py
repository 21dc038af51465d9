"""Poolings for the tests of the CUDA kernels, with their true results from the naive loops in float64."""

import functools
import math
from dataclasses import dataclass

import naive_oracle
import numpy as np
import pytest
import torch

BOXES = torch.tensor(
    [
        [0.0, 0.0, 0.0, 4.0, 5.0, 7.0],  # the whole volume
        [0.7, 1.2, 2.9, 3.1, 4.8, 5.3],
        [-2.5, -3.0, -1.6, 2.0, 6.9, 9.2],  # over the border
        [1.3, 2.2, 3.1, 1.6, 2.3, 3.15],  # smaller than a voxel
        [2.0, 2.0, 2.0, 2.0, 4.0, 4.0],  # empty
        [3.0, 1.0, 2.0, 1.0, 4.0, 5.0],  # corners swapped on z
        [1.0, 1.0, 6.0, 3.0, 4.0, 2.0],  # corners swapped on x
        [20.0, 1.0, 1.0, 24.0, 3.0, 3.0],  # far outside
    ],
    dtype=torch.float64,
)
IMAGES = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
SIZE = (4, 5, 7)


@dataclass(frozen=True)
class Pooling:
    """Everything but the tensors' formats and dtypes."""

    out: tuple[int, int, int]
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    sampling_ratio: int = 0
    aligned: bool = True
    channels: int = 5

    def __str__(self):
        words = ["x".join(map(str, self.out)), f"ratio{self.sampling_ratio}", f"c{self.channels}"]
        return "-".join(words + ([] if self.aligned else ["unaligned"]))

    def features(self):
        return torch.randn((2, self.channels, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def grad(self):
        shape = (len(BOXES), self.channels, *self.out)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def pooled(self, features, boxes=BOXES, images=IMAGES):
        """features [2, C, *SIZE] -> [K, C, *out], float64."""
        return torch.einsum("kvpqr,kcv->kcpqr", self.matrix(boxes), features.double().flatten(2)[images])

    def gradient(self, grad, boxes=BOXES, images=IMAGES):
        """grad [K, C, *out] -> gradient of the features [2, C, *SIZE], float64."""
        of_boxes = torch.einsum("kvpqr,kcpqr->kcv", self.matrix(boxes), grad.double())
        return of_boxes.new_zeros(2, *of_boxes.shape[1:]).index_add_(0, images, of_boxes).unflatten(2, SIZE)

    def matrix(self, boxes):
        return pooling_matrix(self, tuple(map(tuple, boxes.tolist())))


@functools.cache
def pooling_matrix(pooling, boxes):
    """What each voxel gives to each bin of each box, [K, voxels, *out]: the naive loop's pooling of one-hot volumes."""
    voxels = math.prod(SIZE)
    one_hot = np.eye(voxels).reshape(1, voxels, *SIZE)
    settings = (pooling.out, pooling.scale, pooling.sampling_ratio, pooling.aligned)
    return torch.from_numpy(naive_oracle.roi_align(one_hot, boxes, [0] * len(boxes), *settings))


POOLINGS = [
    Pooling((2, 3, 4)),
    Pooling((2, 3, 4), sampling_ratio=2),
    Pooling((3, 1, 2), (0.5, 0.8, 1.3), sampling_ratio=3, aligned=False),
    Pooling((3, 1, 2), (0.5, 0.8, 1.3), sampling_ratio=0, aligned=False, channels=1),
    Pooling((1, 1, 1), (2.0, 0.25, 0.6), sampling_ratio=1),
    Pooling((5, 6, 9), (1.0, 0.7, 1.1), sampling_ratio=2, channels=2),  # more bins than a tile on every axis
    Pooling((1, 1, 1), sampling_ratio=17, channels=3),  # more samples a bin than a list of taps holds
    Pooling((1, 1, 1), (9.1, 2.3, 5.2), channels=2),  # adaptive, with many samples a bin, most of them outside
    Pooling((2, 3, 2), sampling_ratio=2, channels=64),  # rows of four channels
]
poolings = pytest.mark.parametrize("pooling", POOLINGS, ids=str)


def tolerance(dtype):
    """What a result in `dtype` may differ from the exact one: its own rounding, and float32 coordinates."""
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
