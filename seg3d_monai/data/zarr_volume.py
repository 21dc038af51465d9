"""Zarr v2 and v3 arrays, and OME-Zarr 0.4 / 0.5 images and labels, read by the chunk, from disk or behind a URL.

OME-Zarr: https://ngff.openmicroscopy.org/0.5/ (0.4 keeps `multiscales` at the top of the attributes, 0.5 under `ome`).
A chunk that was never written is the fill value; one that cannot be decoded is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from seg3d_monai.data.remote import Folder, is_url
from seg3d_monai.data.stored_array import (
    UNKNOWN_AXIS,
    StoredArray,
    StoredLevel,
    find_level,
    find_scene,
    micrometres,
)

METADATA_FILES = ("zarr.json", ".zarray", ".zgroup")
UNFINISHED = ".partial"
"""How the name of an OME-Zarr ends that is being written: it gets its own name once it is complete."""


class ZarrArray(StoredArray):
    """A Zarr array, or the array of one level of an OME-Zarr image or label.

    Args:
        path: folder of the array or group, or its URL.
        level: multiscale level, as `find_level` takes it; arrays outside a multiscale have only level 0.
        scene: which image of a group that holds several.

    Raises:
        ValueError: the folder is no Zarr, is unfinished, holds several arrays, has damaged metadata, or has no such
            level.
    """

    def __init__(self, path: str | Path, level: int | str = 0, scene: int | str | None = None) -> None:
        self._root = Folder(path)
        self.survives_fork = not is_url(str(path))
        _refuse_unfinished(str(path))
        node = _open_node(self._root)
        folder = self._root
        if isinstance(node, zarr.Group):
            node, folder = _choose_image(node, self._root, scene)
        elif scene is not None:
            find_scene(scene, ["0"], str(folder))
        units: list[str | None] = []
        if isinstance(node, zarr.Group):
            multiscale = _multiscale(node)
            assert multiscale is not None
            axes, units, described = _read_multiscale(multiscale, folder)
            letters = _letters(axes)
            self.levels = tuple(StoredLevel(one.name, _micrometres(letters, units, one.scale)) for one in described)
            self.level = find_level(level, self.levels, str(folder))
            chosen = described[self.level]
            folder = folder / chosen.name
            node = _open_node(folder)
            if not isinstance(node, zarr.Array):
                raise ValueError(f"{folder}: the multiscale metadata name it as an array and it is a group")
            if len(axes) != node.ndim:
                raise ValueError(f"{folder}: has shape {node.shape} and the metadata name {len(axes)} axes {axes}")
            if len(chosen.scale) != len(axes):
                raise ValueError(f"{folder}: the metadata give a scale {chosen.scale} for {len(axes)} axes {axes}")
        else:
            axes = list(_dimension_names(node))
            letters = _letters(axes) if axes else UNKNOWN_AXIS * node.ndim
            self.levels = (StoredLevel("0", {}),)
            self.level = find_level(level, self.levels, str(folder))
        self._array = node
        self._folder = folder
        self.location = str(folder)
        self.shape = tuple(int(n) for n in node.shape)
        self.dtype = np.dtype(node.dtype)
        if self.dtype.kind in "iufb":
            self.dtype = self.dtype.newbyteorder("=")
        self.chunks = tuple(max(1, int(n)) for n in node.chunks)
        self.num_bytes = None
        self.axes = letters
        self.spacing_um = dict(self.levels[self.level].spacing_um)

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box, loading only the chunks that it touches."""
        try:
            return self._read(tuple(region))
        except Exception as error:
            if not self.survives_fork:
                raise ValueError(
                    f"{self._root}: array '{self._name()}': {self._damaged_chunk(region)} ({error!r}); see whether the "
                    "server is still there and the chunk sound"
                ) from error
            raise ValueError(
                f"{self._root}: array '{self._name()}': {self._damaged_chunk(region)} ({error}); write that chunk "
                "again, or delete it to read the fill value"
            ) from error

    def _read(self, region: tuple[slice, ...]) -> np.ndarray:
        return np.array(self._array[region], dtype=self.dtype, ndmin=len(self.shape))

    def _name(self) -> str:
        return self._folder.place.removeprefix(self._root.place).strip("/\\") or self._root.name

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
    """Whether a folder, or a URL, holds the metadata of a Zarr array or group."""
    folder = Folder(path)
    return any(folder.holds(name) for name in METADATA_FILES)


def _refuse_unfinished(path: str) -> None:
    for part in path.replace("\\", "/").split("/"):
        if part.endswith(f".zarr{UNFINISHED}"):
            raise ValueError(
                f"{path}: unfinished, {part} was being written when its `seg3d convert` or `seg3d predict` ended; "
                f"give that command once more and it goes on, then open {part.removesuffix(UNFINISHED)}"
            )


def _open_node(folder: Folder) -> zarr.Array | zarr.Group:
    for name in METADATA_FILES:
        if folder.holds(name):
            try:
                place: Any = folder.place if is_url(folder.place) else Path(folder.place)
                # Consolidated metadata can be stale; the node's own file is the truth.
                if name == ".zarray":
                    return zarr.open_array(place, mode="r", zarr_format=2)
                if name == ".zgroup":
                    return zarr.open_group(place, mode="r", zarr_format=2, use_consolidated=False)
                return zarr.open(place, mode="r", zarr_format=3, use_consolidated=False)
            except Exception as error:
                raise ValueError(
                    f"{folder}: its metadata file {name} cannot be read ({error}); write or copy it again"
                ) from error
    if not is_url(folder.place) and not Path(folder.place).is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder")
    raise ValueError(f"{folder}: no Zarr array or group (none of {', '.join(METADATA_FILES)} is in it)")


def _choose_image(
    group: zarr.Group, folder: Folder, scene: int | str | None = None
) -> tuple[zarr.Array | zarr.Group, Folder]:
    """The image of a group: itself, its only or named array or image, or, with no image at all, its labels."""
    if _multiscale(group) is not None:
        if scene is not None:
            find_scene(scene, ["0"], str(folder))
        return group, folder
    found: dict[str, zarr.Array | zarr.Group] = {}
    for name in _child_names(group, folder):
        if is_zarr((folder / name).place):
            node = _open_node(folder / name)
            if isinstance(node, zarr.Array) or _multiscale(node) is not None:
                found[name] = node
    if found and scene is not None:
        name = list(found)[find_scene(scene, list(found), str(folder))]
        return found[name], folder / name
    if len(found) == 1:
        name, node = next(iter(found.items()))
        return node, folder / name
    if "instances" in found and folder.name == "labels":
        return found["instances"], folder / "instances"
    if found:
        raise ValueError(
            f"{folder}: holds several images; name one of them: {', '.join(f'{folder}/{n}' for n in found)}, or pass "
            "scene"
        )
    if is_zarr((folder / "labels").place):
        labels = _open_node(folder / "labels")
        if isinstance(labels, zarr.Group):
            return _choose_image(labels, folder / "labels", scene)
    raise ValueError(f"{folder}: a Zarr group with neither an image nor labels; give the path of an array inside it")


def _child_names(group: zarr.Group, folder: Folder) -> list[str]:
    """Names of what may be images in a group, as far as it, its metadata or a listing tell."""
    attributes: dict[str, Any] = dict(group.attrs)
    attributes |= attributes["ome"] if isinstance(attributes.get("ome"), dict) else {}
    if "bioformats2raw.layout" in attributes:
        names: list[str] = []
        while is_zarr((folder / str(len(names))).place):
            names.append(str(len(names)))
        return names
    if isinstance(attributes.get("labels"), list):
        return [str(name) for name in attributes["labels"]]
    return folder.folders()


def _multiscale(group: zarr.Group) -> Mapping[str, Any] | None:
    attributes = dict(group.attrs)
    ome = attributes.get("ome")
    entries = ome.get("multiscales") if isinstance(ome, Mapping) else None
    if entries is None:
        entries = attributes.get("multiscales")
    if isinstance(entries, Sequence) and not isinstance(entries, str) and entries and isinstance(entries[0], Mapping):
        return entries[0]
    return None


@dataclass(frozen=True)
class _Level:
    """Path of a level's array, and its voxel size in the units of the axes."""

    name: str
    scale: list[float]


def _read_multiscale(multiscale: Mapping[str, Any], folder: Folder) -> tuple[list[str], list[str | None], list[_Level]]:
    """Names and units of the axes, and the levels."""
    try:
        axes: list[str] = []
        units: list[str | None] = []
        for axis in multiscale.get("axes", ()):
            is_named = isinstance(axis, Mapping)
            axes.append(str(axis["name"] if is_named else axis))
            units.append(axis.get("unit") if is_named else None)
        if not axes:
            axes, units = list("tczyx"), [None] * 5  # OME-Zarr before 0.3 had these five and did not say so
        levels = []
        for dataset in multiscale["datasets"]:
            scale: list[float] = []
            transforms = (dataset.get("coordinateTransformations", ()), multiscale.get("coordinateTransformations", ()))
            for transform in (*transforms[0], *transforms[1]):
                if transform.get("type") == "scale" and "scale" in transform:
                    factors = [float(factor) for factor in transform["scale"]]
                    scale = [a * b for a, b in zip(scale, factors, strict=True)] if scale else factors
            levels.append(_Level(str(dataset["path"]), scale or [1.0] * len(axes)))
        return axes, units, levels
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: its multiscales metadata are not OME-Zarr 0.4 or 0.5 ({error!r})") from error


def _letters(axes: Sequence[str]) -> str:
    return "".join(name.upper() if name.upper() in tuple("TCZYX") else UNKNOWN_AXIS for name in axes)


def _micrometres(letters: str, units: Sequence[str | None], scale: Sequence[float]) -> dict[str, float]:
    """Micrometres per voxel along those of Z, Y, X whose unit is a length."""
    spacing_um = {}
    for axis, unit, step in zip(letters, units, scale, strict=False):
        unit_um = micrometres(unit)
        if axis in "ZYX" and unit_um is not None:
            spacing_um[axis] = step * unit_um
    return spacing_um


def _dimension_names(array: zarr.Array) -> Sequence[str]:
    """Axis names of a bare array, empty where it has none (v3 `dimension_names`, xarray's attribute in v2)."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if not isinstance(names, Sequence) or len(names) != array.ndim:
        return ()
    return [str(name) for name in names]
