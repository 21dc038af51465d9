"""Imaris (.ims) and BigDataViewer HDF5 files, read by the chunk through h5py (extra `formats`).

A file is opened for each read and closed after it, so nothing is shared with a forked process. The layout of Imaris 5.5
files: https://imaris.oxinst.com/support/imaris-file-format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.bdv import BdvArray, read_bdv_xml, xml_of
from seg3d_monai.data.stored_array import StoredArray, StoredLevel, find_level, find_scene, micrometres


@contextmanager
def hdf5(path: str | Path) -> Iterator[Any]:
    """A file, open for reading.

    Raises:
        ImportError: h5py is not installed.
        ValueError: the file is no HDF5, or damaged.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'{path}: HDF5 needs h5py; pip install "seg3d_monai[formats]"') from error
    with suppress(ImportError):
        import hdf5plugin  # noqa: F401  (registers the codecs lz4, zstd, blosc)
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as HDF5 ({error}); copy or write the file again") from error
    with file:
        yield file


def open_hdf5(path: str, level: int | str = 0, scene: int | str | None = None) -> StoredArray:
    """The reader for an HDF5 file, by what it holds.

    Raises:
        ValueError: it is neither an Imaris nor a BigDataViewer file.
    """
    with hdf5(path) as file:
        is_imaris = "DataSetInfo" in file or "DataSet" in file
        is_bdv = any(re.fullmatch(r"t\d{5,}", name) for name in file)
    if is_imaris:
        return ImarisArray(path, level, scene)
    if is_bdv:
        return BdvHdf5Array(path, level, scene)
    raise ValueError(f"{path}: HDF5 that is neither Imaris nor BigDataViewer; convert it to OME-Zarr or TIFF")


class ImarisArray(StoredArray):
    """An Imaris file, axes TCZYX; its chunks are padded at the end, which is cut off.

    Args:
        path: the .ims file.
        level: resolution level, as `find_level` takes it.
        scene: number or name of the dataset in a file with several ("DataSet", "DataSet1", ...).

    Raises:
        ValueError: the file is damaged, or has no such level or dataset.
    """

    axes = "TCZYX"

    def __init__(self, path: str, level: int | str = 0, scene: int | str | None = None) -> None:
        self.location = str(path)
        self.num_bytes = os.path.getsize(path)
        with hdf5(path) as file:
            names = sorted((name for name in file if re.fullmatch(r"DataSet\d*", name)), key=_number)
            self._name = names[find_scene(0 if scene is None else scene, names, self.location)] if names else "DataSet"
            try:
                self._parse(file, level)
            except (KeyError, IndexError, AttributeError) as error:
                raise ValueError(
                    f"{path}: not laid out as Imaris files are ({error}); save it again from Imaris"
                ) from error

    def _parse(self, file: Any, level: int | str) -> None:
        dataset = file[self._name]
        extent_um, unit_um = _extent(file[self._name.replace("DataSet", "DataSetInfo")]["Image"].attrs)
        sizes = []
        level_names = sorted(dataset, key=_number)
        for name in level_names:
            channel = _first_channel(dataset[name])
            sizes.append(tuple(_integer(channel.attrs[f"ImageSize{axis}"]) for axis in "ZYX"))
        self.levels = tuple(
            StoredLevel(
                str(index),
                {} if unit_um is None else {a: extent_um[a] * unit_um / n for a, n in zip("ZYX", size, strict=True)},
            )
            for index, size in enumerate(sizes)
        )
        self.level = find_level(level, self.levels, self.location)
        self.spacing_um = dict(self.levels[self.level].spacing_um)
        resolution = dataset[level_names[self.level]]
        self._path = f"{self._name}/{level_names[self.level]}"
        times = sorted((name for name in resolution if name.startswith("TimePoint ")), key=_number)
        channels = sorted((name for name in resolution[times[0]] if name.startswith("Channel ")), key=_number)
        data = resolution[times[0]][channels[0]]["Data"]
        self._times, self._channels = times, channels
        self.dtype = np.dtype(data.dtype).newbyteorder("=")
        extents = sizes[self.level]
        if any(n > stored for n, stored in zip(extents, data.shape, strict=True)):
            raise ValueError(f"{self.location}: names an image of (z, y, x) = {extents} and stores {data.shape}")
        self.shape = (len(times), len(channels), *extents)
        self.chunks = (1, 1, *(min(a, b) for a, b in zip(data.chunks or data.shape, extents, strict=True)))

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box, loading only the chunks that it touches."""
        times, channels, *box = region
        result = np.empty([part.stop - part.start for part in region], dtype=self.dtype)
        if result.size == 0:
            return result
        with hdf5(self.location) as file:
            for i, time in enumerate(self._times[times]):
                for j, channel in enumerate(self._channels[channels]):
                    name = f"{self._path}/{time}/{channel}/Data"
                    try:
                        result[i, j] = file[name][tuple(box)]
                    except (OSError, KeyError, ValueError) as error:
                        raise ValueError(f"{self.location}: {name} cannot be read ({_cause(error)})") from error
        return result


class BdvHdf5Array(BdvArray):
    """A BigDataViewer HDF5 file; the XML of the same name beside it gives voxel sizes and channels.

    Args:
        path: the .h5 file.
        level: pyramid level, as `find_level` takes it.
        scene: number or name of the view, see `bdv.scenes_of`.

    Raises:
        ValueError: the file is damaged, or has no such level or view.
    """

    def __init__(self, path: str, level: int | str = 0, scene: int | str | None = None) -> None:
        self.num_bytes = os.path.getsize(path)
        xml = xml_of(path)
        super().__init__(path, read_bdv_xml(xml).setups if xml else (), level, scene)
        self._data = str(path)

    def _contents(self) -> tuple[list[int], list[int]]:
        with hdf5(self.location) as file:
            times = sorted(int(name[1:]) for name in file if re.fullmatch(r"t\d{5,}", name))
            setups = sorted(int(name[1:]) for name in file if re.fullmatch(r"s\d{2,}", name))
        self._data = self.location
        return setups, times

    def _factors(self, setup: int) -> list[tuple[float, float, float]]:
        with hdf5(self._data) as file:
            xyz = np.asarray(file[f"s{setup:02d}/resolutions"], dtype=float)
        return [(float(z), float(y), float(x)) for x, y, z in np.atleast_2d(xyz)]

    def _describe(self, time: int, setup: int) -> tuple[tuple[int, int, int], np.dtype, tuple[int, int, int]]:
        with hdf5(self._data) as file:
            name = self._cells(time, setup)
            if name not in file:
                raise ValueError(f"{self.location}: {name} is missing; copy or export the dataset again")
            cells = file[name]
            z, y, x = cells.shape
            chunk_z, chunk_y, chunk_x = cells.chunks or cells.shape
            dtype = np.dtype(cells.dtype).newbyteorder("=")
        # BigDataViewer keeps uint16 in HDF5's int16 and has no signed voxels.
        return (z, y, x), np.dtype(np.uint16) if dtype == np.int16 else dtype, (chunk_z, chunk_y, chunk_x)

    def _read(self, time: int, setup: int, box: tuple[slice, ...]) -> np.ndarray:
        with hdf5(self._data) as file:
            try:
                voxels = np.asarray(file[self._cells(time, setup)][box])
            except (OSError, KeyError) as error:
                raise ValueError(_cause(error)) from error
        native = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
        return native.view(np.uint16) if native.dtype == np.int16 else native

    def _cells(self, time: int, setup: int) -> str:
        return f"t{time:05d}/s{setup:02d}/{self.level}/cells"


def _cause(error: Exception) -> str:
    if "filter" in str(error) or "plugin" in str(error):
        return f'{error}; pip install "seg3d_monai[formats]" brings the codecs'
    return f"{error}; copy or write the file again"


def _number(name: str) -> int:
    """The number at the end of a name, -1 without one."""
    found = re.search(r"(\d+)$", name)
    return int(found[1]) if found else -1


def _first_channel(resolution: Any) -> Any:
    time = resolution[min((name for name in resolution if name.startswith("TimePoint ")), key=_number)]
    return time[min((name for name in time if name.startswith("Channel ")), key=_number)]


def _text(value: Any) -> str:
    """An attribute of Imaris: an array of single characters."""
    return b"".join(np.asarray(value).astype("S").ravel().tolist()).decode("utf-8", "replace").strip()


def _integer(value: Any) -> int:
    return int(float(_text(value)))


def _extent(attributes: Any) -> tuple[dict[str, float], float | None]:
    """Extent of the image along Z, Y, X in the file's unit, and the micrometres in that unit."""
    extent = {
        axis: float(_text(attributes[f"ExtMax{i}"])) - float(_text(attributes[f"ExtMin{i}"]))
        for i, axis in enumerate("XYZ")
    }
    return extent, micrometres(_text(attributes["Unit"])) if "Unit" in attributes else None
