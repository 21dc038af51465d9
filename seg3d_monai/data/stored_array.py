"""An n-dimensional array in a file, with what its metadata say about axes and voxel size.

The readers of one format each (TIFF, Zarr, NIfTI, ...) give a `StoredArray`; `volume.py` turns it into (C, Z, Y, X).
Here live the rules on axis names, units, levels and scenes that all formats share. Nothing here may know a format.
"""

from __future__ import annotations

import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN_AXIS = "?"

MICROMETRES = {
    "m": 1e6,
    "meter": 1e6,
    "metre": 1e6,
    "cm": 1e4,
    "centimeter": 1e4,
    "centimetre": 1e4,
    "mm": 1e3,
    "millimeter": 1e3,
    "millimetre": 1e3,
    "um": 1.0,
    "µm": 1.0,  # micro sign
    "μm": 1.0,  # Greek mu
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "nanometre": 1e-3,
    "å": 1e-4,
    "angstrom": 1e-4,
    "pm": 1e-6,
    "picometer": 1e-6,
    "picometre": 1e-6,
    "in": 25400.0,
    "inch": 25400.0,
}

AXES_CHOICES = {
    2: ("YX",),
    3: ("ZYX",),
    4: ("CZYX", "ZYXC", "ZCYX", "TZYX"),
    5: ("TCZYX", "TZCYX", "TZYXC"),
}


@dataclass(frozen=True)
class StoredLevel:
    """One level of a pyramid.

    Attributes:
        name: what the file calls it: "0", "s1".
        spacing_um: micrometres per voxel for those of Z, Y, X that the file gives.
    """

    name: str
    spacing_um: Mapping[str, float]


class StoredArray(ABC):
    """An array on disk whose regions can be read without reading the rest.

    Attributes:
        location: what to call the array in messages (file, and array inside it).
        shape: extent of every stored axis.
        axes: one letter of TCZYXS per stored axis, `?` where the file does not say.
        dtype: native-endian numpy dtype of what `read_region` returns.
        chunks: extent of the stored pieces (chunk, tile, strip or page) along every axis.
        spacing_um: micrometres per voxel for those of Z, Y, X that the file gives.
        num_bytes: size of the file, None where that is not one number.
        levels: the levels of the pyramid, finest first.
        level: which of them this is, from 0.
        survives_fork: whether a forked child may go on using this object.
        is_mapped: whether a part of a stored piece is read without the rest of it.
    """

    location: str
    shape: tuple[int, ...]
    axes: str
    dtype: np.dtype
    chunks: tuple[int, ...]
    spacing_um: dict[str, float]
    num_bytes: int | None
    levels: tuple[StoredLevel, ...]
    level: int
    survives_fork = True
    is_mapped = False

    @abstractmethod
    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box.

        Args:
            region: one slice per stored axis, with start and stop inside the array, no step.

        Returns:
            A new array of the region's extents, native-endian.

        Raises:
            ValueError: the stored data are damaged.
        """


def micrometres(unit: str | None) -> float | None:
    """Micrometres in one `unit`; None for a unit that is missing or no length (pixel, reference frame)."""
    if not unit:
        return None
    name = unit.strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ")
    return MICROMETRES.get(name.lower())


def spacing_zyx(spacing_um: Mapping[str, float]) -> tuple[float, float, float] | None:
    """The (z, y, x) spacing in micrometres, None unless all three are known, positive and finite."""
    values = [float(spacing_um.get(axis, 0.0)) for axis in "ZYX"]
    if not all(np.isfinite(value) and value > 0 for value in values):
        return None
    return values[0], values[1], values[2]


def find_level(level: int | str, levels: Sequence[StoredLevel], location: str) -> int:
    """Which level of a pyramid is meant.

    Args:
        level: its number from 0; its name; or a voxel size, "2um" or "4,1,1um" (z, y, x; any unit of length), for the
            level whose voxels come nearest to it.
        levels: what there is, finest first.
        location: what to call the array in messages.

    Returns:
        The number of the level. Nearest is the least sum over the axes of |log(size / asked)|, the finer one of two.

    Raises:
        ValueError: there is no such level, or the file does not know its voxel sizes.
        TypeError: `level` is neither an integer nor text.
    """
    names = [stored.name for stored in levels]
    if isinstance(level, str):
        if level in names:
            return names.index(level)
        number = re.fullmatch(r"[\[(]?\s*([\d.]+(?:\s*,\s*[\d.]+){2}|[\d.]+)\s*[\])]?\s*([^\W\d_]+)", level.strip())
        unit_um = micrometres(number[2]) if number else None
        if number and unit_um is not None:
            asked = [float(value) * unit_um for value in number[1].split(",")]
            if min(asked) > 0:
                return _nearest_level(asked if len(asked) == 3 else asked * 3, levels, level, location)
        if re.fullmatch(r"-?\d+", level.strip()):
            level = int(level)
    else:
        try:
            level = operator.index(level)
        except TypeError:
            raise TypeError(f"level={level!r} must be a number, a name, or a voxel size such as '2um'") from None
    if isinstance(level, str) or not 0 <= level < len(levels):
        raise ValueError(
            f"{location}: level={level!r} is not there; it has {len(levels)} level(s), counted from 0"
            f"{_level_list(levels)}"
        )
    return level


def _nearest_level(asked_um: Sequence[float], levels: Sequence[StoredLevel], level: str, location: str) -> int:
    sizes = [spacing_zyx(stored.spacing_um) for stored in levels]
    far = [
        math.inf if size is None else sum(abs(math.log(s / a)) for s, a in zip(size, asked_um, strict=True))
        for size in sizes
    ]
    if not far or min(far) == math.inf:
        raise ValueError(
            f"{location}: level={level!r} asks for a voxel size, and the file gives none; choose a level by number, 0 "
            f"to {len(levels) - 1}"
        )
    # Sizes that differ by rounding only count as the same.
    return next(i for i, distance in enumerate(far) if distance <= min(far) + 1e-6)


def _level_list(levels: Sequence[StoredLevel]) -> str:
    """The levels of a pyramid with their voxel sizes, for a message; empty where there is one only."""
    words = []
    for index, stored in enumerate(levels):
        size = spacing_zyx(stored.spacing_um)
        named = "" if stored.name == str(index) else f" '{stored.name}'"
        words.append(f"{index}{named}" + ("" if size is None else " of ({:.4g}, {:.4g}, {:.4g}) um".format(*size)))
    return f": {', '.join(words)}" if len(levels) > 1 else ""


def find_scene(scene: int | str | None, names: Sequence[str], location: str) -> int:
    """Which image of a file with several is meant.

    Args:
        scene: its number from 0 or its name; None where there is only one.
        names: what there is.
        location: what to call the file in messages.

    Returns:
        Its number.

    Raises:
        ValueError: there is no such image, or there are several and none was named.
        TypeError: `scene` is neither an integer nor text.
    """
    if scene is None:
        if len(names) == 1:
            return 0
        raise ValueError(f"{location}: holds several images; pass scene, one of: {_scene_list(names)}")
    if isinstance(scene, str):
        if scene in names:
            return list(names).index(scene)
        if re.fullmatch(r"\d+", scene.strip()):
            scene = int(scene)
    else:
        try:
            scene = operator.index(scene)
        except TypeError:
            raise TypeError(f"scene={scene!r} must be a number or a name") from None
    if isinstance(scene, str) or not 0 <= scene < len(names):
        raise ValueError(f"{location}: scene={scene!r} is not there; choose one of: {_scene_list(names)}")
    return scene


def _scene_list(names: Sequence[str]) -> str:
    shown = [str(i) if name in ("", str(i)) else f"{i} ('{name}')" for i, name in enumerate(names)]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def assign_axes(shape: Sequence[int], stored_axes: str, axes: str | None, location: str) -> dict[str, int]:
    """Say which stored axis is which of T, C, Z, Y, X.

    Args:
        shape: the stored extents.
        stored_axes: one letter per extent, `?` for an axis that the file does not name.
        axes: the user's names, one letter per axis (axes of length 1 may be left out), or None for the file's.
        location: what to call the array in messages.

    Returns:
        Letter -> stored axis. T, C and, for a plane, Z may be missing; stored axes not mentioned have length 1.

    Raises:
        ValueError: the names do not fit the shape, or there are none and the shape alone does not say.
    """
    if axes is not None:
        return _user_axes(shape, stored_axes, axes, location)
    letters = list(stored_axes)
    # A sample axis of length 1 is a habit of TIFF readers, not something the writer said.
    kept = [i for i, letter in enumerate(letters) if not (letter == "S" and shape[i] == 1)]
    _samples_to_channels(letters, kept, shape, location)
    unnamed = [i for i in kept if letters[i] not in "TCZYX"]
    if unnamed and "Z" not in (letters[i] for i in kept):
        if len(kept) == 3 and all(letters[i] in "YX?" for i in kept):
            letters[kept[0]], letters[kept[1]], letters[kept[2]] = "Z", "Y", "X"
        else:
            long = [i for i in unnamed if shape[i] > 1]
            if len(long) == 1 and {"Y", "X"} <= {letters[i] for i in kept}:
                letters[long[0]] = "Z"
    kept = [i for i in kept if letters[i] in "TCZYX" or shape[i] > 1]
    names = [letters[i] for i in kept]
    extents = tuple(shape[i] for i in kept)
    if any(name not in "TCZYX" for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"{location}: nothing says which axis is which in the {len(extents)}-D array of shape {extents}; "
            f"pass axes, {_choices(len(extents))}"
        )
    if not {"Y", "X"} <= set(names) or "Z" not in names:
        long = [i for i in kept if letters[i] in "YX" or shape[i] > 1]
        found, extents = "".join(letters[i] for i in long), tuple(shape[i] for i in long)
        if len(extents) > 2:
            mend = f"if one of them is depth, pass axes, {_choices(len(extents))}"
        else:
            mend = "a stack of planes is needed; to read one plane as a volume of depth 1 pass axes='YX'"
        raise ValueError(f"{location}: axes {found} of shape {extents} have no Z; {mend}")
    return {letters[i]: i for i in kept}


def _samples_to_channels(letters: list[str], kept: list[int], shape: Sequence[int], location: str) -> None:
    """Rename the sample axis (the colours of a pixel) to C, dropping a C of length 1 for it."""
    if "S" not in (letters[i] for i in kept):
        return
    for i in list(kept):
        if letters[i] == "C":
            if shape[i] > 1:
                raise ValueError(
                    f"{location}: has channels and colour samples at once (axes {''.join(letters)}, shape "
                    f"{tuple(shape)}); write one axis of channels"
                )
            kept.remove(i)
    letters[letters.index("S")] = "C"


def _user_axes(shape: Sequence[int], stored_axes: str, axes: str, location: str) -> dict[str, int]:
    if not isinstance(axes, str):
        raise TypeError(f"axes must be a string such as 'ZYX', not {axes!r}")
    names = axes.upper().replace("S", "C")
    extents = tuple(n for n, letter in zip(shape, stored_axes, strict=True) if not (letter == "S" and n == 1))
    fault = ""
    if set(names) - set("TCZYX") or len(set(names)) < len(names):
        fault = "has letters other than T, C, Z, Y, X, or one of them twice"
    elif names != "YX" and not set("ZYX") <= set(names):
        fault = "must hold each of Z, Y, X once"
    kept = list(range(len(shape)))
    # Leave out axes of length 1 until the names fit: unnamed ones and samples first, those that the user named last.
    spare = [i for i in kept if shape[i] == 1]
    spare.sort(key=lambda i: (stored_axes[i] in names, stored_axes[i] in "YX", stored_axes[i] not in "?S", i))
    for i in spare[: max(0, len(shape) - len(names))]:
        kept.remove(i)
    if not fault and len(kept) != len(names):
        fault = f"has {len(names)} letters for {len(extents)} axes"
    if fault:
        raise ValueError(
            f"{location}: axes={axes!r} {fault}; the array's shape is {extents}, so pass {_choices(len(extents))}"
        )
    return dict(zip(names, kept, strict=True))


def _choices(ndim: int) -> str:
    choices = AXES_CHOICES.get(ndim)
    if choices is None:
        return "an array of 3 to 5 axes out of T, C, Z, Y, X is needed"
    return "for example " + " or ".join(f"axes='{choice}'" for choice in choices)
