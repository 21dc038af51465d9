"""Tiny data sets on disk for the tests of the crop index and its datasets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tifffile

from seg3d_monai.data import Manifest, read_manifest


def write_dataset(
    folder: Path,
    volumes: Mapping[str, tuple[np.ndarray, np.ndarray]],
    columns: Mapping[str, Sequence[object]] | None = None,
) -> Manifest:
    """Write image and label TIFFs and a manifest.csv with further columns, and read it."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = dict(columns or {})
    lines = [",".join(["name", "image", "label", *columns])]
    for number, (name, (image, label)) in enumerate(volumes.items()):
        (folder / name).mkdir(exist_ok=True)
        tifffile.imwrite(folder / name / "image.tif", image, photometric="minisblack")
        tifffile.imwrite(folder / name / "labels.tif", label, photometric="minisblack")
        cells = [str(values[number]) for values in columns.values()]
        lines.append(",".join([name, f"{name}/image.tif", f"{name}/labels.tif", *cells]))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return read_manifest(folder / "manifest.csv")


def label_volume(
    shape: tuple[int, int, int], boxes: Mapping[int, Sequence[int]], dtype: type = np.uint16
) -> np.ndarray:
    """A label volume of solid boxes (z1, y1, x1, z2, y2, x2) by id."""
    label = np.zeros(shape, dtype)
    for number, (z1, y1, x1, z2, y2, x2) in boxes.items():
        label[z1:z2, y1:y2, x1:x2] = number
    return label


def image_volume(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Noise of 16 bits."""
    return np.random.default_rng(seed).integers(100, 4000, shape).astype(np.uint16)


def boxes_by_loop(label: np.ndarray) -> dict[int, list[int]]:
    """Box of each positive id, by looking at its voxels one id at a time."""
    found = {}
    for number in np.unique(label[label > 0]).tolist():
        places = np.argwhere(label == number)
        found[number] = [*places.min(axis=0).tolist(), *(places.max(axis=0) + 1).tolist()]
    return found
