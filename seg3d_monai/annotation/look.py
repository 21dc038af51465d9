"""Looks at regions of indexed volumes, one after the other: reads them with a margin, and predicts them.

One volume is open at a time, and what is kept of a region are a number and a vector.

Must not know: files that are written, how regions are chosen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from seg3d_monai.annotation.candidates import Candidate, grown
from seg3d_monai.annotation.scores import BackboneProbe, doubt
from seg3d_monai.data import CropIndex, Volume, VolumeRecord
from seg3d_monai.data.volume import Roi
from seg3d_monai.inference import Instances
from seg3d_monai.inference.blocks import roi_slices


class Windows:
    """Regions with their margins.

    Args:
        index: of the volumes.
        predictor: callable (block: float32 Tensor [C, d, h, w] of raw voxels, roi) -> Instances, with `for_volume` if
            it has one, which is then called once for all regions of a volume that come in a row.
        margin: voxels (z, y, x) on every side, clipped to the volume.
    """

    def __init__(self, index: CropIndex, predictor: Any, margin: Sequence[int]) -> None:
        self._index = index
        self._predictor = predictor
        self._margin = tuple(margin)
        self._opened: tuple[int, Volume] | None = None
        self._bound: tuple[int, Any] | None = None

    def roi(self, candidate: Candidate) -> Roi:
        """(z1, y1, x1, z2, y2, x2) of the window, volume frame."""
        return grown(candidate.roi, self._margin, candidate.volume.shape[1:])

    def voxels(self, candidate: Candidate) -> NDArray[Any]:
        """Raw voxels [C, d, h, w] of the window."""
        return self._image(candidate.volume).read(self.roi(candidate))

    def predict(self, candidate: Candidate, voxels: NDArray[Any]) -> Instances:
        """Instances of the window, in its frame."""
        volume = candidate.volume
        if self._bound is None or self._bound[0] != volume.id:
            image, predictor = self._image(volume), self._predictor
            bound = predictor.for_volume(image) if hasattr(predictor, "for_volume") else predictor
            self._bound = (volume.id, bound)
        found = self._bound[1](torch.from_numpy(voxels.astype(np.float32)), self.roi(candidate))
        if not isinstance(found, Instances):
            raise TypeError(f"the predictor returned {type(found).__name__}; return seg3d_monai.inference.Instances")
        return found

    def is_blank(self, candidate: Candidate, voxels: NDArray[Any]) -> bool:
        """Whether a region, without its margin, holds one grey value a channel, as where stitched stacks are padded."""
        place = roi_slices(candidate.roi, self.roi(candidate)[:3])
        channels = voxels[(slice(None), *place)].reshape(len(voxels), -1)
        return bool((channels.min(axis=1) == channels.max(axis=1)).all())

    def _image(self, volume: VolumeRecord) -> Volume:
        if self._opened is None or self._opened[0] != volume.id:
            self._opened = (volume.id, self._index.open_image(volume))
        return self._opened[1]


@dataclass(frozen=True)
class Look:
    """What is kept of a region.

    Args:
        candidate: the region.
        doubt: number of objects that are expected to be wrong.
        features: float32 [F], pooled from the backbone.
    """

    candidate: Candidate
    doubt: float
    features: NDArray[np.float32]


def look_at(
    windows: Windows,
    candidates: Sequence[Candidate],
    annotated: Sequence[Candidate],
    backbone: nn.Module,
    *,
    progress: bool = False,
) -> tuple[list[Look], NDArray[np.float32]]:
    """Predict every candidate; of annotated regions only the features are looked at.

    Returns:
        One look for each candidate that holds more than one grey value, and the features [M, F] of such annotated ones.
    """
    probe = BackboneProbe(backbone)
    looks: list[Look] = []
    centres: list[NDArray[np.float32]] = []
    jobs = [(one, True) for one in candidates] + [(one, False) for one in annotated]
    jobs.sort(key=lambda job: job[0].volume.id)  # stable: within a volume candidates stay in their order
    with tqdm(total=len(jobs), desc="look", unit="region", disable=not progress) as bar:
        for one, is_candidate in jobs:
            bar.update()
            voxels = windows.voxels(one)
            if windows.is_blank(one, voxels):
                continue
            predict = partial(windows.predict, one, voxels)
            if not is_candidate:
                centres.append(probe.features(predict))
                continue
            found, features = probe.watch(predict)
            low = windows.roi(one)[:3]
            z1, y1, x1, z2, y2, x2 = (a - b for a, b in zip(one.roi, (*low, *low), strict=True))
            looks.append(Look(one, doubt(found, (z1, y1, x1, z2, y2, x2)), features))
    width = len(looks[0].features) if looks else 0
    return looks, np.stack(centres) if centres else np.zeros((0, width), np.float32)


def without_blanks(windows: Windows, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Candidates that hold more than one grey value."""
    return (one for one in candidates if not windows.is_blank(one, windows.voxels(one)))
