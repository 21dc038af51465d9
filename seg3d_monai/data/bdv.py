"""What BigDataViewer says of a dataset in its XML: voxel sizes, and which setups are the channels of one view.

A dataset is a set of *setups* (each a channel of an angle, tile or illumination) at time points. Setups that differ in
nothing but their channel make up one scene. Registrations are not applied: voxels stay as stored. The format:
https://imagej.net/plugins/bdv/, for N5 `BDV N5 format.md` of https://github.com/bigdataviewer/bigdataviewer-core.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from seg3d_monai.data.stored_array import StoredArray, StoredLevel, find_level, find_scene, micrometres


@dataclass(frozen=True)
class ViewSetup:
    """One setup.

    Attributes:
        number: its id.
        spacing_um: micrometres per voxel for Z, Y, X, empty where the XML does not give them in a length.
        attributes: angle, tile, illumination, channel -> id.
    """

    number: int
    spacing_um: Mapping[str, float] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BdvXml:
    """A dataset's XML.

    Attributes:
        loader: format of the data, "bdv.hdf5" or "bdv.n5".
        data: absolute path of the HDF5 file or N5 folder.
        setups: all of them.
    """

    loader: str
    data: str
    setups: tuple[ViewSetup, ...]


def read_bdv_xml(path: str | Path) -> BdvXml:
    """Read the XML of a dataset.

    Raises:
        ValueError: it is damaged, or its data are in a format other than HDF5 and N5.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: cannot be read as XML ({error}); write the file again") from error
    loader = root.find("SequenceDescription/ImageLoader")
    kind = "" if loader is None else loader.get("format", "")
    place = None if loader is None else loader.find({"bdv.hdf5": "hdf5", "bdv.n5": "n5"}.get(kind, "none"))
    if place is None or not place.text:
        raise ValueError(
            f"{path}: no BigDataViewer dataset with its data in HDF5 or N5 (its image loader is "
            f"{kind or 'missing'!r}); re-save it as one of these"
        )
    setups = []
    for setup in root.iterfind("SequenceDescription/ViewSetups/ViewSetup"):
        size, unit = setup.findtext("voxelSize/size", ""), setup.findtext("voxelSize/unit")
        values, unit_um = size.split(), micrometres(unit)
        spacing_um = {}
        if len(values) == 3 and unit_um is not None:
            spacing_um = {axis: float(value) * unit_um for axis, value in zip("XYZ", values, strict=True)}
        attributes = {child.tag: (child.text or "").strip() for child in setup.find("attributes") or ()}
        setups.append(ViewSetup(int(setup.findtext("id", "0")), spacing_um, attributes))
    data = place.text.strip()
    if place.get("type", "absolute") == "relative":
        data = os.path.join(os.path.dirname(os.path.abspath(path)), data)
    return BdvXml(kind, os.path.abspath(data), tuple(setups))


def xml_of(data: str | Path) -> str | None:
    """The XML beside an HDF5 file or N5 folder that describes it, None where there is none of the same name."""
    path = os.path.splitext(str(data))[0] + ".xml"
    return path if os.path.isfile(path) else None


def scenes_of(setups: Sequence[ViewSetup]) -> list[tuple[str, list[ViewSetup]]]:
    """The views of a dataset, each with the setups that are its channels.

    Returns:
        (name, setups in the order of their channels) for each view. Setups without attributes are each a view.
    """
    scenes: dict[tuple[object, ...], list[ViewSetup]] = {}
    for setup in setups:
        rest = tuple(sorted((k, v) for k, v in setup.attributes.items() if k != "channel"))
        key: tuple[object, ...] = (setup.number,)
        if setup.attributes:
            key = (rest, tuple(sorted(setup.spacing_um.items())))
        scenes.setdefault(key, []).append(setup)
    named = []
    for members in scenes.values():
        channels = [setup.attributes.get("channel") for setup in members]
        if len(set(channels)) < len(members):  # the same channel twice: they differ in something that is not written
            named += [(f"setup {setup.number}", [setup]) for setup in members]
            continue
        members.sort(key=lambda setup: (_number(setup.attributes.get("channel", "")), setup.number))
        common = sorted((k, v) for k, v in members[0].attributes.items() if k != "channel")
        name = ", ".join(f"{k} {v}" for k, v in common) or f"setup {members[0].number}"
        named.append((name, members))
    return named


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


class BdvArray(StoredArray):
    """One view of a BigDataViewer dataset, axes TCZYX. The readers of HDF5 and N5 fill in where a block lies.

    Args:
        data: the HDF5 file or N5 folder.
        setups: what the XML says, empty without one.
        level: pyramid level, as `find_level` takes it.
        scene: number or name of the view, see `scenes_of`; None where there is one only.
    """

    axes = "TCZYX"

    def __init__(
        self, data: str, setups: Sequence[ViewSetup], level: int | str = 0, scene: int | str | None = None
    ) -> None:
        self.location = str(data)
        numbers, self._times = self._contents()
        if not numbers or not self._times:
            raise ValueError(f"{data}: no BigDataViewer dataset, it holds no setup or no time point")
        known = {setup.number: setup for setup in setups}
        scenes = scenes_of([known.get(number, ViewSetup(number)) for number in numbers])
        name, members = scenes[find_scene(scene, [name for name, _ in scenes], self.location)]
        self._setups = [setup.number for setup in members]
        self.location = f"{data} ({name})"
        factors = self._factors(self._setups[0])
        spacing_um = members[0].spacing_um
        levels = [
            {axis: um * factor for (axis, factor) in zip("ZYX", zyx, strict=True) if (um := spacing_um.get(axis))}
            for zyx in factors
        ]
        self.levels = tuple(StoredLevel(str(index), sizes) for index, sizes in enumerate(levels))
        self.level = find_level(level, self.levels, self.location)
        self.spacing_um = dict(self.levels[self.level].spacing_um)
        described = [self._describe(self._times[0], setup) for setup in self._setups]
        shapes = {(extent, dtype) for extent, dtype, _ in described}
        if len(shapes) > 1:
            raise ValueError(
                f"{self.location}: its channels differ in shape or type: {sorted(map(str, shapes))}; give the XML, or "
                "re-save them as one size"
            )
        extent, self.dtype, chunks = described[0]
        self.shape = (len(self._times), len(self._setups), *extent)
        self.chunks = (1, 1, *chunks)

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box, block by block."""
        times, setups, *box = region
        result = np.empty([part.stop - part.start for part in region], dtype=self.dtype)
        if result.size == 0:
            return result
        for i, time in enumerate(self._times[times]):
            for j, setup in enumerate(self._setups[setups]):
                try:
                    result[i, j] = self._read(time, setup, tuple(box))
                except ImportError:
                    raise
                except Exception as error:
                    raise ValueError(
                        f"{self.location}: setup {setup}, time point {time}, level {self.level} cannot be read "
                        f"({error}); copy or write the file again"
                    ) from error
        return result

    @abstractmethod
    def _contents(self) -> tuple[list[int], list[int]]:
        """Setups and time points that are stored, ascending."""

    @abstractmethod
    def _factors(self, setup: int) -> list[tuple[float, float, float]]:
        """Downsampling factors (z, y, x) of each level."""

    @abstractmethod
    def _describe(self, time: int, setup: int) -> tuple[tuple[int, int, int], np.dtype, tuple[int, int, int]]:
        """Shape (z, y, x), dtype and chunk shape of a setup at the chosen level."""

    @abstractmethod
    def _read(self, time: int, setup: int, box: tuple[slice, ...]) -> np.ndarray:
        """Voxels [d, h, w] of a setup at the chosen level."""
