"""N5: single arrays, pyramids `s0`, `s1`, ..., and BigDataViewer's layout, read by the block through z5py.

https://github.com/saalfeldlab/n5. N5 counts axes from the fastest, (x, y, z, ...); here they are reversed. z5py
(https://github.com/constantinpape/z5, extra `formats`) keeps no thread, so a forked process may go on reading.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.bdv import BdvArray, read_bdv_xml, xml_of
from seg3d_monai.data.stored_array import (
    UNKNOWN_AXIS,
    StoredArray,
    StoredLevel,
    find_level,
    find_scene,
    micrometres,
)

ATTRIBUTES = "attributes.json"


def is_n5(path: str | Path) -> bool:
    """Whether a folder is an N5 container, group or array."""
    if os.path.isfile(os.path.join(path, ATTRIBUTES)):
        return True
    return any(os.path.isfile(os.path.join(path, name, ATTRIBUTES)) for name in _children(str(path)))


def open_n5(path: str, level: int | str = 0, scene: int | str | None = None) -> StoredArray:
    """The reader for an N5 folder, by what it holds.

    Raises:
        ValueError: it holds no image, or several and none was named.
        ImportError: z5py is not installed.
    """
    children = _children(path)
    if any(re.fullmatch(r"setup\d+", name) for name in children):
        return BdvN5Array(path, level, scene)
    if _is_array(path) or "s0" in children:
        if scene is not None:
            find_scene(scene, ["0"], path)
        return N5Array(path, level)
    found = [name for name in children if _is_array(_join(path, name)) or "s0" in _children(_join(path, name))]
    if not found:
        raise ValueError(f"{path}: an N5 group without an image; give the path of an array inside it")
    return N5Array(_join(path, found[find_scene(scene, found, path)]), level)


class N5Array(StoredArray):
    """An N5 array, or a level of a pyramid of arrays `s0`, `s1`, ....

    Voxel sizes come from `pixelResolution` or `resolution` with `units` (both x first) or from `transform`
    (COSEM: `axes`, `scale`, `units`), of the array or of the group around it.

    Args:
        path: folder of the array or of the pyramid.
        level: level of the pyramid, as `find_level` takes it.

    Raises:
        ValueError: the folder is no N5 image or damaged, or there is no such level.
    """

    def __init__(self, path: str, level: int | str = 0) -> None:
        self.location = path
        if _is_array(path):
            folders, names = [path], [os.path.basename(path)]
        else:
            names = sorted((n for n in _children(path) if re.fullmatch(r"s\d+", n)), key=lambda n: int(n[1:]))
            folders = [_join(path, name) for name in names]
        group = {} if _is_array(path) else _attributes(path)
        described = [_attributes(folder) for folder in folders]
        ndim = len(described[0]["dimensions"])
        letters = (UNKNOWN_AXIS * max(0, ndim - 3) + "ZYX")[-ndim:]
        base = _spacing_um(described[0]) or _spacing_um(group)
        levels = []
        for index, (name, one) in enumerate(zip(names, described, strict=True)):
            scales = group.get("scales", group.get("downsamplingFactors"))
            factors = one.get("downsamplingFactors") or (scales[index] if scales and index < len(scales) else None)
            if factors is None and index > 0:
                levels.append(StoredLevel(name, _spacing_um(one)))
                continue
            zyx = dict(zip("XYZ", factors or (1, 1, 1), strict=False))
            levels.append(StoredLevel(name, {axis: um * float(zyx.get(axis, 1)) for axis, um in base.items()}))
        self.levels = tuple(levels)
        self.level = find_level(level, self.levels, path)
        self.spacing_um = dict(self.levels[self.level].spacing_um)
        self._folder = folders[self.level]
        self.location = self._folder
        chosen = described[self.level]
        axes = chosen.get("transform", {}).get("axes") or group.get("transform", {}).get("axes")
        if axes and len(axes) == ndim:
            letters = "".join(a.upper() if a.upper() in tuple("TCZYX") else UNKNOWN_AXIS for a in map(str, axes))
        self.axes = letters
        self.shape = tuple(int(n) for n in reversed(chosen["dimensions"]))
        self.chunks = tuple(int(n) for n in reversed(chosen["blockSize"]))
        self.dtype = np.dtype(chosen["dataType"])
        self.num_bytes = None

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box, loading only the blocks that it touches."""
        return read_n5(self._folder, region, self.dtype, self.chunks)


class BdvN5Array(BdvArray):
    """A BigDataViewer N5 folder; the XML of the same name beside it gives voxel sizes and channels.

    Args:
        path: the .n5 folder.
        level: pyramid level, as `find_level` takes it.
        scene: number or name of the view, see `bdv.scenes_of`.

    Raises:
        ValueError: the folder is damaged, or has no such level or view.
    """

    def __init__(self, path: str, level: int | str = 0, scene: int | str | None = None) -> None:
        self._data = path
        self.num_bytes = None
        xml = xml_of(path)
        super().__init__(path, read_bdv_xml(xml).setups if xml else (), level, scene)

    def _contents(self) -> tuple[list[int], list[int]]:
        setups = _numbers(_children(self._data), "setup")
        times: set[int] = set()
        for setup in setups:
            times |= set(_numbers(_children(_join(self._data, f"setup{setup}")), "timepoint"))
        return setups, sorted(times)

    def _factors(self, setup: int) -> list[tuple[float, float, float]]:
        xyz = _attributes(_join(self._data, f"setup{setup}")).get("downsamplingFactors") or [[1, 1, 1]]
        return [(float(z), float(y), float(x)) for x, y, z in xyz]

    def _describe(self, time: int, setup: int) -> tuple[tuple[int, int, int], np.dtype, tuple[int, int, int]]:
        attributes = _attributes(self._folder(time, setup))
        (x, y, z), (chunk_x, chunk_y, chunk_z) = attributes["dimensions"], attributes["blockSize"]
        return (z, y, x), np.dtype(attributes["dataType"]), (chunk_z, chunk_y, chunk_x)

    def _read(self, time: int, setup: int, box: tuple[slice, ...]) -> np.ndarray:
        return read_n5(self._folder(time, setup), box, self.dtype, self.chunks[2:])

    def _folder(self, time: int, setup: int) -> str:
        return _join(self._data, f"setup{setup}", f"timepoint{time}", f"s{self.level}")


def read_n5(folder: str, region: Sequence[slice], dtype: np.dtype, chunks: Sequence[int]) -> np.ndarray:
    """Read a box of an N5 array, axes slowest first.

    Raises:
        ImportError: z5py is not installed.
        ValueError: a block is damaged; the message names it.
    """
    try:
        import z5py
    except ImportError as error:
        raise ImportError(f'{folder}: N5 needs z5py; pip install "seg3d_monai[formats]"') from error
    if any(part.stop == part.start for part in region):
        return np.empty([part.stop - part.start for part in region], dtype=dtype)
    container = _container(folder)
    name = os.path.relpath(folder, container).replace(os.sep, "/")

    def read(box: Sequence[slice]) -> np.ndarray:
        return np.asarray(z5py.N5File(container, mode="r")[name][tuple(box)])

    try:
        return read(region).astype(dtype, copy=False)
    except Exception as error:
        for index in product(*(range(p.start // n, -(-p.stop // n)) for p, n in zip(region, chunks, strict=True))):
            parts = [
                slice(max(p.start, i * n), min(p.stop, (i + 1) * n))
                for i, n, p in zip(index, chunks, region, strict=True)
            ]
            try:
                read(parts)
            except Exception:
                block = "/".join(str(i) for i in reversed(index))
                raise ValueError(f"{folder}: block {block} is damaged ({error}); write it again") from error
        raise ValueError(f"{folder}: cannot be read ({error}); write the array again") from error


def _container(folder: str) -> str:
    """The folder around an array whose attributes give the version of N5, as its root's do.

    Raises:
        ValueError: there is none.
    """
    path = os.path.dirname(folder)
    while path != os.path.dirname(path):
        if "n5" in _attributes(path):
            return path
        path = os.path.dirname(path)
    raise ValueError(
        f"{folder}: lies in no N5 container, no folder around it has {ATTRIBUTES} with the version; copy the whole "
        'container, or write {"n5": "2.0.0"} there'
    )


def _join(path: str, *names: str) -> str:
    return os.path.join(path, *names)


def _children(path: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except OSError:
        return []


def _numbers(names: Sequence[str], word: str) -> list[int]:
    found = (re.fullmatch(rf"{word}(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def _is_array(path: str) -> bool:
    return os.path.isfile(_join(path, ATTRIBUTES)) and "dimensions" in _attributes(path)


def _attributes(path: str) -> dict[str, Any]:
    file = _join(path, ATTRIBUTES)
    if not os.path.isfile(file):
        return {}
    try:
        content = json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); write the array again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no attributes; write the array again")
    missing = {"blockSize", "dataType"} - set(content) if "dimensions" in content else set()
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(sorted(missing))}; write the array again")
    return content


def _spacing_um(attributes: Mapping[str, Any]) -> dict[str, float]:
    """Micrometres per voxel along Z, Y, X as an array's or group's attributes give them; empty without a unit."""
    transform, pixel = attributes.get("transform"), attributes.get("pixelResolution")
    if isinstance(transform, Mapping) and "scale" in transform:
        axes = [str(axis).upper() for axis in transform.get("axes", ())]
        sizes, units = transform["scale"], transform.get("units", ())
    elif isinstance(pixel, Mapping) and "dimensions" in pixel:
        axes, sizes, units = list("XYZ"), pixel["dimensions"], [pixel.get("unit")] * 3
    elif "resolution" in attributes:
        unit = attributes.get("units", attributes.get("unit"))
        axes, sizes = list("XYZ"), attributes["resolution"]
        units = unit if isinstance(unit, list) else [unit] * 3
    else:
        return {}
    spacing_um = {}
    for axis, size, unit in zip(axes, sizes, units, strict=False):
        unit_um = micrometres(None if unit is None else str(unit))
        if axis in ("Z", "Y", "X") and unit_um is not None:
            spacing_um[axis] = float(size) * unit_um
    return spacing_um
