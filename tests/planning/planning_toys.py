"""Fingerprints and indices with objects that are counted by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tifffile

from seg3d_monai.data import CropIndex, DataConfig, build_index, read_manifest
from seg3d_monai.planning import Fingerprint, VolumeFacts

Box = tuple[int, int, int, int, int, int]

# Two that touch along y, one that the volume cuts, one alone: extents (4, 6, 8), (3, 6, 6), (2, 2, 3), (2, 4, 4).
SHAPE = (12, 20, 24)
BOXES: dict[int, Box] = {
    7: (2, 3, 4, 6, 9, 12),
    9: (2, 9, 4, 5, 15, 10),
    20: (0, 0, 0, 2, 2, 3),
    31: (8, 14, 16, 10, 18, 20),
}


def volume_facts(
    name: str = "a",
    shape: tuple[int, int, int] = SHAPE,
    spacing_um: tuple[float, float, float] | None = (2.0, 1.0, 1.0),
    num_objects: int = 1,
    **changes: object,
) -> VolumeFacts:
    """One volume of a fingerprint."""
    values = {
        "name": name,
        "specimen": name,
        "shape": shape,
        "channels": 1,
        "spacing_um": spacing_um,
        "low": (100.0,),
        "high": (900.0,),
        "num_objects": num_objects,
        "part": (0, 0, 0, *shape),
        "num_read": num_objects,
        "foreground": 0.1,
    }
    return VolumeFacts(**{**values, **changes})  # type: ignore[arg-type]


def fingerprint_of(
    boxes: Sequence[Box],
    volumes: Sequence[VolumeFacts] | None = None,
    volume: Sequence[int] | None = None,
) -> Fingerprint:
    """A fingerprint of solid boxes, by default all in one volume."""
    array = np.array(boxes, np.int64).reshape(-1, 6)
    return Fingerprint(
        volumes=tuple(volumes or [volume_facts(num_objects=len(array))]),
        boxes=array,
        voxels=(array[:, 3:] - array[:, :3]).prod(axis=1),
        classes=np.zeros(len(array), np.int64),
        volume=np.zeros(len(array), np.int64) if volume is None else np.array(volume, np.int64),
    )


def write_index(
    folder: Path,
    volumes: Mapping[str, tuple[tuple[int, int, int], Mapping[int, Box]]],
    columns: Mapping[str, Sequence[object]] | None = None,
    spacings: Sequence[tuple[float, float, float] | None] | None = None,
) -> CropIndex:
    """Volumes of solid boxes by id, bright in noise, on disk, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    columns = {"split": ["train"] * len(volumes), **(columns or {})}
    lines = [",".join(["name", "image", "label", "spacing_z_um", "spacing_y_um", "spacing_x_um", *columns])]
    for place, (name, (shape, boxes)) in enumerate(volumes.items()):
        label = np.zeros(shape, np.uint16)
        for number, (z1, y1, x1, z2, y2, x2) in boxes.items():
            label[z1:z2, y1:y2, x1:x2] = number
        image = rng.normal(200, 10, shape) + 300 * (label > 0)
        tifffile.imwrite(folder / f"{name}.tif", image.astype(np.uint16), photometric="minisblack")
        tifffile.imwrite(folder / f"{name}_label.tif", label, photometric="minisblack")
        spacing = ((2.0, 1.0, 1.0),) * len(volumes) if spacings is None else spacings
        cells = ["" if n is None else n for n in spacing[place] or (None,) * 3]
        cells += [values[place] for values in columns.values()]
        lines.append(",".join([name, f"{name}.tif", f"{name}_label.tif", *map(str, cells)]))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return build_index(
        read_manifest(folder / "manifest.csv"), folder / "i.sqlite", DataConfig(crop_size=(8, 16, 16)), progress=False
    )


def rows_of_boxes(shape: tuple[int, int, int], extent: tuple[int, int, int], gap: int = 2) -> dict[int, Box]:
    """Boxes of one extent in rows through a volume, `gap` voxels apart and from its faces."""
    starts = [range(gap, n - e - gap + 1, e + gap) for n, e in zip(shape, extent, strict=True)]
    corners = [(z, y, x) for z in starts[0] for y in starts[1] for x in starts[2]]
    return {
        number: (z, y, x, z + extent[0], y + extent[1], x + extent[2])
        for number, (z, y, x) in enumerate(corners, start=1)
    }
