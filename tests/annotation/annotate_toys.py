"""A data set, a backbone and a predictor whose answers can be worked out by hand.

Images are a faint background with bright boxes. The predictor finds boxes above a grey value; a box of the grey value
g has the score g / 1000. The backbone hands images on as they are, so pooled features are mean grey values.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from scipy import ndimage
from torch import nn

from seg3d_monai.data import CropIndex, DataConfig, build_index
from seg3d_monai.inference import Instances

SHAPE = (12, 40, 64)
CROP = (6, 20, 16)
SPACING = (2.0, 0.5, 0.25)
Box = tuple[int, int, int, int, int, int]


def image_of(shape: Sequence[int], boxes: Mapping[Box, int], background: int = 10, channels: int = 1) -> np.ndarray:
    """uint16 [Z, Y, X], or [C, Z, Y, X]: boxes by grey value over a background that is nowhere constant."""
    grid = np.indices(shape).sum(axis=0) % 2
    image = (background + grid).astype(np.uint16)
    for (z1, y1, x1, z2, y2, x2), grey in boxes.items():
        image[z1:z2, y1:y2, x1:x2] = grey
    return image if channels == 1 else np.stack([image + n for n in range(channels)])


def labels_of(shape: Sequence[int], boxes: Sequence[Box], dtype: Any = np.uint16) -> np.ndarray:
    """Boxes with the ids 1, 2, …"""
    labels = np.zeros(shape, dtype)
    for number, (z1, y1, x1, z2, y2, x2) in enumerate(boxes, start=1):
        labels[z1:z2, y1:y2, x1:x2] = number
    return labels


def write_manifest(folder: Path, volumes: Mapping[str, Mapping[str, Any]], suffix: str = ".csv") -> Path:
    """Write volumes {name: {"image": array, "label": array or None, further columns}} and their manifest.csv."""
    columns = list(dict.fromkeys(name for row in volumes.values() for name in row if name not in ("image", "label")))
    lines = [",".join(["name", "image", "label", "spacing_z_um", "spacing_y_um", "spacing_x_um", *columns])]
    for name, row in volumes.items():
        (folder / name).mkdir(parents=True)
        tifffile.imwrite(folder / name / "image.tif", row["image"], photometric="minisblack")
        label = ""
        if row.get("label") is not None:
            label = f"{name}/labels.tif"
            tifffile.imwrite(folder / label, row["label"], photometric="minisblack")
        cells = [str(row.get(column, "")) for column in columns]
        lines.append(",".join([name, f"{name}/image.tif", label, *map(str, SPACING), *cells]))
    path = folder / f"manifest{suffix}"
    path.write_text("\n".join(lines) + "\n")
    return path


def index_of(manifest: Path, **config: Any) -> CropIndex:
    """The manifest's index beside it, with crops that do not overlap."""
    settings = {"crop_size": CROP, "stride": CROP, "min_voxels": 1} | config
    return build_index(manifest, manifest.with_suffix(".sqlite"), DataConfig(**settings), progress=False)


class Grey(nn.Module):
    """A backbone of one level, the image itself."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"p1": images}


class BrightBoxes:
    """Connected voxels above a grey value; the score is the largest grey value over 1000."""

    def __init__(self, backbone: nn.Module, above: float = 90.0, classes: int = 1) -> None:
        self.backbone, self.above, self.classes = backbone, above, classes
        self.rois: list[tuple[int, ...]] = []

    def __call__(self, block: torch.Tensor, roi: Sequence[int]) -> Instances:
        assert block.dtype == torch.float32
        assert block.shape[1:] == tuple(b - a for a, b in zip(roi[:3], roi[3:], strict=True))
        self.backbone(block[None])
        self.rois.append(tuple(roi))
        voxels = block[0].numpy()
        found, count = ndimage.label(voxels > self.above)
        places = ndimage.find_objects(found)
        corners = [[side.start for side in place] + [side.stop for side in place] for place in places]
        return Instances(
            boxes=np.array(corners, float).reshape(-1, 6),
            scores=np.array([voxels[place].max() / 1000 for place in places]),
            classes=np.arange(count, dtype=np.int64) % self.classes,
            masks=[found[place] == number for number, place in enumerate(places, start=1)],
        )
