"""What the crop index says of a volume, of a crop, and of the instances in either.

Must not know: SQLite, how an index is stored.
"""

from dataclasses import dataclass

import numpy as np

from seg3d_monai.data.intensity import Intensity


@dataclass(frozen=True)
class VolumeRecord:
    """One volume of the index.

    Args:
        id: from 1, in the order of the manifest.
        name: unique name.
        image: path of the image.
        label: path of the label volume, None where there is none.
        ignore: path of a mask of voxels to ignore, None where there is none.
        axes: axes of the image as the manifest gives them.
        shape: (C, Z, Y, X) voxels.
        spacing_um: (z, y, x) micrometres per voxel, None when unknown.
        specimen: what the split must not cut.
        split: "train", "val", "test" or None.
        intensity: normalisation measured on the whole image.
        num_instances: instances, whose ids are 1..num_instances.
        first_crop: id of its first crop.
        num_crops: crops on its grid, with consecutive ids.
        unreadable: regions (z1, y1, x1, z2, y2, x2) whose labels are damaged, and ignored.
        attributes: quality_* and free columns of the manifest.
    """

    id: int
    name: str
    image: str
    label: str | None
    ignore: str | None
    axes: str | None
    shape: tuple[int, int, int, int]
    spacing_um: tuple[float, float, float] | None
    specimen: str
    split: str | None
    intensity: Intensity
    num_instances: int
    first_crop: int
    num_crops: int
    unreadable: tuple[tuple[int, int, int, int, int, int], ...]
    attributes: dict[str, str | float | int]


@dataclass(frozen=True)
class CropRecord:
    """One crop of the grid.

    Args:
        id: from 1.
        volume_id: its volume.
        roi: (z1, y1, x1, z2, y2, x2) in the volume frame; smaller than the crop size only where the volume is.
        num_instances: instances of at least min_object_voxels that are no fragments (whole, or min_voxels visible).
        foreground_fraction: labelled voxels over all voxels.
        ignore_fraction: ignored voxels over all voxels.
    """

    id: int
    volume_id: int
    roi: tuple[int, int, int, int, int, int]
    num_instances: int
    foreground_fraction: float
    ignore_fraction: float


@dataclass(frozen=True)
class InstanceTable:
    """Instances of a volume or of a crop, n rows by ascending id.

    Args:
        ids: int64 [n], compact within the volume, from 1.
        labels: int64 [n], the ids on disk.
        classes: int64 [n], from 0.
        boxes: int64 [n, 6], half-open, in the volume frame or the crop frame.
        voxels: int64 [n], all of them or those visible in the crop.
        truncated: bool [n], whether the crop cuts the instance; all False for a volume.
    """

    ids: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    voxels: np.ndarray
    truncated: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)
