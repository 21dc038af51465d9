"""Zarr v2 and v3 arrays, and OME-Zarr 0.4 / 0.5 images and labels, read by the chunk.

OME-Zarr: https://ngff.openmicroscopy.org/0.5/ (0.4 keeps `multiscales` at the top of the attributes, 0.5 under `ome`).
A chunk that was never written is the fill value; one that cannot be decoded is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from seg3d_monai.data.stored_array import UNKNOWN_AXIS, StoredArray, micrometres

METADATA_FILES = ("zarr.json", ".zarray", ".zgroup")


class ZarrArray(StoredArray):
    """A Zarr array, or the array of one level of an OME-Zarr image or label.

    Args:
        path: folder of the array or group.
        level: multiscale level, 0 is full resolution; arrays outside a multiscale have only level 0.

    Raises:
        ValueError: the folder is no Zarr, holds several arrays, has damaged metadata, or has no such level.
    """

    def __init__(self, path: str | Path, level: int = 0) -> None:
        self._root = Path(path)
        node = _open_node(self._root)
        node, folder = _choose_image(node, self._root) if isinstance(node, zarr.Group) else (node, self._root)
        scale: list[float] = []
        units: list[str | None] = []
        axes: list[str] = []
        if isinstance(node, zarr.Group):
            multiscale = _multiscale(node)
            assert multiscale is not None
            axes, units, scale, name = _read_multiscale(multiscale, level, folder)
            folder = folder / name
            node = _open_node(folder)
            if not isinstance(node, zarr.Array):
                raise ValueError(f"{folder}: the multiscale metadata name it as an array and it is a group")
            if len(axes) != node.ndim:
                raise ValueError(f"{folder}: has shape {node.shape} and the metadata name {len(axes)} axes {axes}")
            if len(scale) != len(axes):
                raise ValueError(f"{folder}: the metadata give a scale {scale} for {len(axes)} axes {axes}")
        elif level != 0:
            raise ValueError(f"{folder}: level={level} is not there; a single array has only level 0")
        else:
            axes = list(_dimension_names(node))
        self._array = node
        self._folder = folder
        self.location = str(folder)
        self.shape = tuple(int(n) for n in node.shape)
        self.dtype = np.dtype(node.dtype)
        if self.dtype.kind in "iufb":
            self.dtype = self.dtype.newbyteorder("=")
        self.chunks = tuple(max(1, int(n)) for n in node.chunks)
        self.num_bytes = None
        letters = [name.upper() if name.upper() in tuple("TCZYX") else UNKNOWN_AXIS for name in axes]
        self.axes = "".join(letters) if axes else UNKNOWN_AXIS * node.ndim
        self.spacing_um = {}
        for axis, unit, step in zip(self.axes, units, scale, strict=bool(scale)):
            unit_um = micrometres(unit)
            if axis in "ZYX" and unit_um is not None:
                self.spacing_um[axis] = step * unit_um

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box, loading only the chunks that it touches."""
        try:
            return self._read(tuple(region))
        except Exception as error:
            raise ValueError(
                f"{self._root}: array '{self._name()}': {self._damaged_chunk(region)} ({error}); write that chunk "
                "again, or delete it to read the fill value"
            ) from error

    def _read(self, region: tuple[slice, ...]) -> np.ndarray:
        return np.array(self._array[region], dtype=self.dtype, ndmin=len(self.shape))

    def _name(self) -> str:
        return self._folder.relative_to(self._root).as_posix() if self._folder != self._root else self._root.name

    def _damaged_chunk(self, region: Sequence[slice]) -> str:
        """Find the first chunk of the region that fails when read alone."""
        ranges = [range(part.start // n, -(-part.stop // n)) for part, n in zip(region, self.chunks, strict=True)]
        for index in product(*ranges):
            corner = [i * n for i, n in zip(index, self.chunks, strict=True)]
            ends = [min(low + n, size) for low, n, size in zip(corner, self.chunks, self.shape, strict=True)]
            try:
                self._read(tuple(slice(low, high) for low, high in zip(corner, ends, strict=True)))
            except Exception:
                return f"chunk {index} is damaged"
        return "no single chunk is damaged"


def is_zarr(path: str | Path) -> bool:
    """Whether a folder holds the metadata of a Zarr array or group."""
    return any((Path(path) / name).is_file() for name in METADATA_FILES)


def _open_node(folder: Path) -> zarr.Array | zarr.Group:
    for name in METADATA_FILES:
        if (folder / name).is_file():
            try:
                # Consolidated metadata can be stale; the node's own file is the truth.
                if name == ".zarray":
                    return zarr.open_array(folder, mode="r", zarr_format=2)
                if name == ".zgroup":
                    return zarr.open_group(folder, mode="r", zarr_format=2, use_consolidated=False)
                return zarr.open(folder, mode="r", zarr_format=3, use_consolidated=False)
            except Exception as error:
                raise ValueError(f"{folder}: its metadata file {name} cannot be read ({error})") from error
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder")
    raise ValueError(f"{folder}: no Zarr array or group (none of {', '.join(METADATA_FILES)} is in it)")


def _choose_image(group: zarr.Group, folder: Path) -> tuple[zarr.Array | zarr.Group, Path]:
    """The image of a group: itself, its only array or image, or, with no image at all, its labels."""
    if _multiscale(group) is not None:
        return group, folder
    children = sorted(child for child in folder.iterdir() if child.is_dir() and is_zarr(child))
    found: dict[str, zarr.Array | zarr.Group] = {}
    for child in children:
        node = _open_node(child)
        if isinstance(node, zarr.Array) or _multiscale(node) is not None:
            found[child.name] = node
    if len(found) == 1:
        name, node = next(iter(found.items()))
        return node, folder / name
    if "instances" in found and folder.name == "labels":
        return found["instances"], folder / "instances"
    if found:
        raise ValueError(
            f"{folder}: holds several images; name one of them: {', '.join(f'{folder}/{n}' for n in found)}"
        )
    if is_zarr(folder / "labels"):
        labels = _open_node(folder / "labels")
        if isinstance(labels, zarr.Group):
            return _choose_image(labels, folder / "labels")
    raise ValueError(f"{folder}: a Zarr group with neither an image nor labels; give the path of an array inside it")


def _multiscale(group: zarr.Group) -> Mapping[str, Any] | None:
    attributes = dict(group.attrs)
    ome = attributes.get("ome")
    entries = ome.get("multiscales") if isinstance(ome, Mapping) else None
    if entries is None:
        entries = attributes.get("multiscales")
    if isinstance(entries, Sequence) and not isinstance(entries, str) and entries and isinstance(entries[0], Mapping):
        return entries[0]
    return None


def _read_multiscale(
    multiscale: Mapping[str, Any], level: int, folder: Path
) -> tuple[list[str], list[str | None], list[float], str]:
    """Names and units of the axes, voxel size in those units, and array name of one level."""
    datasets = multiscale.get("datasets")
    num_levels = len(datasets) if isinstance(datasets, Sequence) else 0
    if not 0 <= level < num_levels:
        raise ValueError(f"{folder}: level={level} is not there; it has {num_levels} level(s), counted from 0")
    try:
        dataset = datasets[level]  # type: ignore[index]
        axes: list[str] = []
        units: list[str | None] = []
        for axis in multiscale.get("axes", ()):
            is_named = isinstance(axis, Mapping)
            axes.append(str(axis["name"] if is_named else axis))
            units.append(axis.get("unit") if is_named else None)
        if not axes:
            axes, units = list("tczyx"), [None] * 5  # OME-Zarr before 0.3 had these five and did not say so
        scale: list[float] = []
        transforms = (dataset.get("coordinateTransformations", ()), multiscale.get("coordinateTransformations", ()))
        for transform in (*transforms[0], *transforms[1]):
            if transform.get("type") == "scale" and "scale" in transform:
                factors = [float(factor) for factor in transform["scale"]]
                scale = [a * b for a, b in zip(scale, factors, strict=True)] if scale else factors
        scale = scale or [1.0] * len(axes)
        return axes, units, scale, str(dataset["path"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: its multiscales metadata are not OME-Zarr 0.4 or 0.5 ({error!r})") from error


def _dimension_names(array: zarr.Array) -> Sequence[str]:
    """Axis names of a bare array, empty where it has none (v3 `dimension_names`, xarray's attribute in v2)."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if not isinstance(names, Sequence) or len(names) != array.ndim:
        return ()
    return [str(name) for name in names]
