"""A stack in many TIFF files: a folder, a glob pattern, or a list of them.

What a file stands for is read from the numbers in its name. A number that follows `z`, `c`, `t` or a word for them
(`slice`, `ch`, `time`, ...) counts planes, channels or time points; the only other number that differs counts planes.
Every combination must be there and the numbers must be evenly spaced, so a lost plane is an error and no shift of all
that lie behind it. The files of a list are taken in the order that was given, whatever their names.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import numpy as np

from seg3d_monai.data.stored_array import UNKNOWN_AXIS, StoredArray
from seg3d_monai.data.tiff import TiffArray

AXIS_WORDS = {
    "t": "T",
    "tp": "T",
    "time": "T",
    "timepoint": "T",
    "frame": "T",
    "c": "C",
    "ch": "C",
    "channel": "C",
    "z": "Z",
    "slice": "Z",
    "plane": "Z",
    "section": "Z",
}
_PARSED_FILES = 512  # whose tables of pages are kept

Grid = Mapping[tuple[int, ...], str]


class TiffSeries(StoredArray):
    """Files of equal shape and dtype as one array, whose first axes number the files.

    Only the first file is looked into when the series is opened; the others are when they are read.

    Args:
        files: absolute paths, at least one.
        location: what to call the series in messages.
        is_ordered: the files are planes in this order, or whatever the user's axes say; else their names are read.
        first: the first of them, opened at the level that is wanted.
        scene: image series inside each file.

    Raises:
        ValueError: the names do not say which file is what, files are missing, or one is truncated or of another size.
    """

    def __init__(
        self,
        files: Sequence[str],
        location: str,
        *,
        is_ordered: bool,
        first: TiffArray,
        scene: int | str | None = None,
    ) -> None:
        self.location = f"{location} ({len(files)} TIFF files)"
        self._scene = scene
        sizes = [os.path.getsize(file) for file in files]
        self._first = first
        self.is_mapped = first.is_mapped
        self._parsed: OrderedDict[str, TiffArray] = OrderedDict()
        self.level, self.levels = self._first.level, self._first.levels
        # Axes of one file, without those of length 1 that are no plane's.
        self._inner = [i for i, letter in enumerate(self._first.axes) if letter in "YX" or self._first.shape[i] > 1]
        letters = [self._first.axes[i] for i in self._inner]
        is_plane = {"Y", "X"} <= set(letters) <= set("YXCS")
        grid: Grid
        if is_ordered:
            axes, grid = ("Z" if is_plane else UNKNOWN_AXIS), {(i,): file for i, file in enumerate(files)}
        else:
            axes, grid = sort_files(files, location, other="Z" if is_plane else UNKNOWN_AXIS)
        if set(axes) & set(letters) - {UNKNOWN_AXIS}:
            raise ValueError(
                f"{location}: the names number the files by {axes} and each file holds axes {''.join(letters)}; pass "
                "the list of files, and axes"
            )
        counts = tuple(1 + max(index[i] for index in grid) for i in range(len(axes)))
        self._grid = [grid[index] for index in np.ndindex(counts)]
        self.axes = axes + "".join(letters)
        self.shape = counts + tuple(self._first.shape[i] for i in self._inner)
        self.dtype = self._first.dtype
        self.chunks = (1,) * len(counts) + tuple(self._first.chunks[i] for i in self._inner)
        self.num_bytes = sum(sizes)
        self._num_grid = len(counts)
        spacing_um = self._first.levels[self.level].spacing_um
        self.spacing_um = {axis: um for axis, um in spacing_um.items() if axis in self.axes}
        least = self._first.least_bytes
        for file, size in zip(files, sizes, strict=True):
            if size < least:
                raise ValueError(
                    f"{file}: truncated, it has {size} bytes and its voxels alone take {least}; copy or write it again"
                )

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box, opening only the files that it touches."""
        outer, inner = region[: self._num_grid], region[self._num_grid :]
        result = np.empty([part.stop - part.start for part in region], dtype=self.dtype)
        if result.size == 0:
            return result
        box = [slice(0, 1)] * len(self._first.shape)
        for axis, part in zip(self._inner, inner, strict=True):
            box[axis] = part
        flat = result.reshape(prod(result.shape[: self._num_grid]), *result.shape[self._num_grid :])
        counts = self.shape[: self._num_grid]
        for out, index in zip(flat, product(*(range(part.start, part.stop) for part in outer)), strict=True):
            stored = self._open(self._grid[int(np.ravel_multi_index(index, counts))])
            out[...] = stored.read_region(box).reshape(out.shape)
        return result

    def _open(self, file: str) -> TiffArray:
        if file == self._first.location:
            return self._first
        stored = self._parsed.get(file)
        if stored is None:
            stored = TiffArray(file, self.level, self._scene)
            if stored.shape != self._first.shape or stored.dtype != self._first.dtype:
                raise ValueError(
                    f"{file}: has shape {stored.shape} and type {stored.dtype}, and the first file of the series "
                    f"{self._first.shape} and {self._first.dtype}; all must be alike"
                )
            self._parsed[file] = stored
            while len(self._parsed) > _PARSED_FILES:
                self._parsed.popitem(last=False)
        return stored


def open_tiff_files(
    files: Sequence[str],
    location: str,
    *,
    is_ordered: bool,
    level: int | str = 0,
    scene: int | str | None = None,
) -> StoredArray:
    """One array from one or many TIFF files; see `TiffSeries`.

    An OME-TIFF that itself names all the files of the series is read as it says.
    """
    if not is_ordered:
        files = sorted(files, key=natural_key)
    first = TiffArray(files[0], level, scene)
    if len(files) == 1:
        return first
    if not is_ordered and len(first.files) > 1 and _real(files) <= _real(first.files):
        return first
    return TiffSeries(files, location, is_ordered=is_ordered, first=first, scene=scene)


def sort_files(files: Sequence[str], location: str, *, other: str = "Z") -> tuple[str, Grid]:
    """Read from their names which file is which.

    Args:
        files: paths; their names differ in numbers only.
        location: what to call them together in messages.
        other: axis of a number that no word names.

    Returns:
        (axes, place -> file): letters out of T, C, Z or `other`, and for every place on the grid of these axes a file.

    Raises:
        ValueError: names differ in more than numbers, or do not say what a number counts; a file is missing or there
            twice.
    """
    names = [re.split(r"(\d+)", _stem(file)) for file in files]
    for name, file in zip(names, files, strict=True):
        if name[::2] != names[0][::2]:
            raise ValueError(
                f"{location}: {os.path.basename(files[0])} and {os.path.basename(file)} differ in more than numbers; "
                "choose the files of one stack by a pattern such as 'FOLDER/img_*.tif', or pass their list"
            )
    numbers = np.array([[int(part) for part in name[1::2]] for name in names], dtype=np.int64)
    varying = [i for i in range(numbers.shape[1]) if (numbers[:, i] != numbers[0, i]).any()]
    letters = {i: _axis_word(names[0][2 * i]) for i in varying}
    unnamed = [i for i in varying if letters[i] is None]
    if len(unnamed) == 1 and other not in letters.values():
        letters[unnamed[0]] = other
    found = [letters[i] for i in varying]
    if not varying or None in found or len(set(found)) < len(found):
        raise ValueError(
            f"{location}: the names, such as {os.path.basename(files[0])}, do not say which number counts planes, "
            "channels or time points; write z, c or t before it, or pass the list of files in their order"
        )
    order = sorted(varying, key=lambda i: "TC?Z".index(str(letters[i])))
    axes = "".join(str(letters[i]) for i in order)
    values = [np.unique(numbers[:, i]) for i in order]
    for letter, value in zip(axes, values, strict=True):
        steps = np.diff(value)
        if steps.size and steps.min() != steps.max():
            gap = int(np.argmax(steps > steps.min()))
            raise ValueError(
                f"{location}: the numbers of axis {letter} jump from {value[gap]} to {value[gap + 1]}, the others are "
                f"{steps.min()} apart: files are missing; copy them, or pass the list of files if these are all"
            )
    grid: dict[tuple[int, ...], str] = {}
    for row, file in zip(numbers, files, strict=True):
        place = tuple(int(np.searchsorted(value, row[i])) for i, value in zip(order, values, strict=True))
        if place in grid:
            raise ValueError(f"{location}: {grid[place]} and {file} have the same numbers; leave one of them out")
        grid[place] = file
    for place in np.ndindex(*(len(value) for value in values)):
        if place not in grid:
            lacking = ", ".join(f"{a}={value[i]}" for a, value, i in zip(axes, values, place, strict=True))
            raise ValueError(f"{location}: there is no file for {lacking}; copy it, or choose files by a pattern")
    return axes, grid


def natural_key(path: str) -> list[tuple[int, str | int]]:
    """A key that sorts `a2` before `a10`."""
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path) if part]


def _real(files: Sequence[str]) -> set[str]:
    return {os.path.realpath(file) for file in files}


def _stem(file: str) -> str:
    """The name of a file without its suffixes, whose digits mean nothing (`.tf8`)."""
    return re.sub(r"(\.ome)?\.\w+$", "", os.path.basename(file), flags=re.IGNORECASE)


def _axis_word(text: str) -> str | None:
    """The axis that the text before a number names, None if it names none."""
    word = re.search(r"([A-Za-z]+)[^A-Za-z0-9]*$", text)
    return AXIS_WORDS.get(word[1].lower()) if word else None
