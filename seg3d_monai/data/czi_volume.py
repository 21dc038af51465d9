"""Zeiss CZI files, read by the plane and region through pylibCZIrw (extra `formats`).

https://github.com/ZEISS/pylibczirw. Tiles of a mosaic come back joined, as libCZI joins them. A file is opened for each
read and closed after it, so nothing is shared with a forked process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.stored_array import StoredArray, StoredLevel, find_level, find_scene

PIXEL_TYPES = {
    "Gray8": (np.uint8, 1),
    "Gray16": (np.uint16, 1),
    "Gray32Float": (np.float32, 1),
    "Bgr24": (np.uint8, 3),
    "Bgr48": (np.uint16, 3),
}
CZI_MAGIC = b"ZISRAWFILE"


@contextmanager
def czi(path: str | Path) -> Iterator[Any]:
    """A file, open for reading.

    Raises:
        ImportError: pylibCZIrw is not installed.
        ValueError: the file is no CZI, or damaged.
    """
    try:
        from pylibCZIrw import czi as pyczi
    except ImportError as error:
        raise ImportError(f'{path}: CZI needs pylibCZIrw; pip install "seg3d_monai[formats]"') from error
    with open(path, "rb") as file:
        if file.read(10) != CZI_MAGIC:
            raise ValueError(f"{path}: is no CZI file, or cut off within its first bytes; copy or export it again")
    try:
        document = pyczi.CziReader(str(path))
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as CZI ({error}); copy or export the file again") from error
    try:
        yield document
    finally:
        document.close()


class CziArray(StoredArray):
    """One scene of a CZI file, axes TCZYX; the colours of a camera (BGR) become three channels, red first.

    Args:
        path: the file.
        level: 0; the pyramid inside is that of the viewer and not offered.
        scene: number of the scene; None where there is one only.

    Raises:
        ValueError: the file is damaged, or has no such scene or level.
    """

    axes = "TCZYX"

    def __init__(self, path: str | Path, level: int | str = 0, scene: int | str | None = None) -> None:
        self.location = str(path)
        self.num_bytes = os.path.getsize(path)
        with czi(path) as document:
            scenes = dict(sorted(document.scenes_bounding_rectangle.items()))
            numbers: list[int | None] = list(scenes) or [None]
            names = ["0" if number is None else str(number) for number in numbers]
            self._scene = numbers[find_scene(scene, names, self.location)]
            box = document.total_bounding_rectangle if self._scene is None else scenes[self._scene]
            self._origin = (int(box.y), int(box.x))
            spans = {axis: (int(span[0]), int(span[1])) for axis, span in document.total_bounding_box.items()}
            extents = {axis: last - first for axis, (first, last) in spans.items()}
            self._starts = _first_indices(document)
            others = [axis for axis, n in extents.items() if axis not in "TCZYX" and n > 1]
            if others:
                raise ValueError(
                    f"{path}: has the axes {', '.join(others)} (views, phases or the like) beside T, C, Z, Y, X; "
                    "export one of them, or the fused image"
                )
            kinds = set(document.pixel_types.values())
            if len(kinds) != 1 or not kinds <= PIXEL_TYPES.keys():
                raise ValueError(
                    f"{path}: pixels of type {', '.join(sorted(kinds))} are not supported; export OME-TIFF"
                )
            dtype, self._samples = PIXEL_TYPES[kinds.pop()]
            self.spacing_um = _spacing_um(document.metadata)
        self.dtype = np.dtype(dtype)
        self.levels = (StoredLevel("0", self.spacing_um),)
        self.level = find_level(level, self.levels, self.location)
        channels = extents.get("C", 1) * self._samples
        self.shape = (extents.get("T", 1), channels, extents.get("Z", 1), int(box.h), int(box.w))
        self.chunks = (1, 1, 1, int(box.h), int(box.w))

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box, plane by plane."""
        times, channels, planes, rows, columns = region
        result = np.empty([part.stop - part.start for part in region], dtype=self.dtype)
        if result.size == 0:
            return result
        roi = (
            self._origin[1] + columns.start,
            self._origin[0] + rows.start,
            columns.stop - columns.start,
            rows.stop - rows.start,
        )
        options: dict[str, Any] = {} if self._scene is None else {"scene": self._scene}
        with czi(self.location) as document:
            for i, time in enumerate(range(times.start, times.stop)):
                for k, plane in enumerate(range(planes.start, planes.stop)):
                    for stored in sorted({c // self._samples for c in range(channels.start, channels.stop)}):
                        wanted = {"T": time, "C": stored, "Z": plane}
                        place = {axis: wanted[axis] + start for axis, start in self._starts.items()}
                        try:
                            pixels = document.read(roi=roi, plane=place, **options)
                        except Exception as error:
                            raise ValueError(
                                f"{self.location}: plane {place} is damaged ({error}); copy or export the file again"
                            ) from error
                        for sample in range(self._samples):
                            channel = stored * self._samples + sample
                            if channels.start <= channel < channels.stop:
                                # BGR: the last sample is red.
                                result[i, channel - channels.start, k] = pixels[..., self._samples - 1 - sample]
        return result


def _first_indices(document: Any) -> dict[str, int]:
    """The lowest index along T, C and Z, of those that the file counts: a part of a larger file keeps its numbers."""
    first: dict[str, int] = {}

    def look(_: int, block: Any) -> bool:
        for axis, index in block.coordinate.to_dict().items():
            if str(axis) in ("T", "C", "Z"):
                first[str(axis)] = min(int(index), first.get(str(axis), int(index)))
        return True

    document.enumerate_subblocks(look)
    return first


def _spacing_um(metadata: Any) -> dict[str, float]:
    """Micrometres per voxel; CZI gives metres along X, Y and, for a stack, Z."""
    node: Any = metadata
    for key in ("ImageDocument", "Metadata", "Scaling", "Items", "Distance"):
        node = node.get(key) if isinstance(node, Mapping) else None
    spacing_um = {}
    for distance in node if isinstance(node, list) else [node]:
        if isinstance(distance, Mapping) and re.fullmatch("[XYZ]", str(distance.get("@Id", ""))):
            try:
                metres = float(distance.get("Value") or 0)
            except (TypeError, ValueError):
                continue
            if metres > 0:
                spacing_um[str(distance["@Id"])] = metres * 1e6
    return spacing_um
