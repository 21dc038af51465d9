"""How many objects a region of a given size holds: regions are drawn around objects, as training draws its crops.

Must not know: rules, bundles, torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data.volume import Spacing
from seg3d_monai.planning.fingerprint import Fingerprint

NUM_REGIONS = 400
LEAST_VISIBLE = 0.1
"""Share of an object's box that a region must show; with less a crop ignores it (min_visible of `CropDataset`)."""


@dataclass(frozen=True)
class Counts:
    """Objects of each drawn region, int64 [NUM_REGIONS].

    Args:
        visible: objects that it shows enough of.
        whole: objects that it does not cut.
    """

    visible: NDArray[np.int64]
    whole: NDArray[np.int64]


def objects_in_regions(
    fingerprint: Fingerprint,
    size: Sequence[float],
    target_um: Spacing | None = None,
    *,
    seed: int = 0,
) -> Counts:
    """Count objects in regions around objects, each of which is as likely as any other.

    Args:
        fingerprint: the data.
        size: extent of the regions, (z, y, x) voxels of the target.
        target_um: voxel size of the target; None where nothing is resampled.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    scales = fingerprint.scales(target_um)
    weights = np.array([volume.num_objects * (volume.num_read > 0) for volume in fingerprint.volumes], float)
    drawn = rng.choice(len(weights), NUM_REGIONS, p=weights / weights.sum())
    visible, whole = [], []
    for place in np.unique(drawn):
        boxes = fingerprint.boxes[fingerprint.volume == place] * np.tile(scales[place], 2)
        extents = boxes[:, 3:] - boxes[:, :3]
        low, high = np.reshape(fingerprint.volumes[place].part, (2, 3)) * scales[place]
        inside = np.minimum(size, high - low)
        for _ in range(int((drawn == place).sum())):
            box = boxes[rng.integers(len(boxes))]
            # Where the region may begin: it holds the object, or lies in it where that is longer.
            ends = np.sort([box[:3], box[3:] - inside], axis=0)
            start = rng.uniform(*np.clip(ends, low, high - inside))
            overlap = np.minimum(boxes[:, 3:], start + inside) - np.maximum(boxes[:, :3], start)
            seen = (overlap.clip(0) / extents).prod(axis=1)
            visible.append(int((seen >= LEAST_VISIBLE).sum()))
            whole.append(int((seen > 1 - 1e-9).sum()))
    return Counts(visible=np.array(visible), whole=np.array(whole))
