"""What a run takes in: a volume for each time point, and the identities by which a later run knows it all again.

Must not know what is done with the voxels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.volume import ArrayVolume, StoredVolume, open_volume

_ZARR_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


def open_times(image: Any, time: int | Sequence[int] | str, **options: Any) -> tuple[list[Any], list[int] | None]:
    """Open an image at one or several time points.

    Args:
        image: path of a stack, or for a single time point also a volume or an array.
        time: time point, several, or "all".
        options: of `open_input`.

    Returns:
        (a volume for each time point, their numbers, or None if `time` is a number: then OUTPUT is no series).

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if `time` or an option does not fit the image.
    """
    if isinstance(time, int):
        return [open_input(image, time=time, **options)], None
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(f"time is {time!r}, which describes a file; open the volumes yourself")
    if isinstance(time, str):
        if time != "all":
            raise ValueError(f"time is {time!r}; pass a number, a list of numbers or 'all'")
        time = range(StoredVolume(image, time=0, **options).num_times)
    if not len(time):
        raise ValueError("time is empty; name at least one time point")
    return [open_input(image, time=t, **options) for t in time], [int(t) for t in time]


def open_input(
    image: Any,
    *,
    axes: str | None = None,
    spacing: Sequence[float] | None = None,
    channels: Sequence[int] | int | None = None,
    time: int = 0,
    level: int | str = 0,
) -> Any:
    """A volume from a path, an array or a volume; the options describe a file, spacing also an array.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if an option does not fit the image.
    """
    if isinstance(image, (str, os.PathLike)):
        return open_volume(image, axes=axes, spacing=spacing, channels=channels, time=time, level=level)
    is_array = isinstance(image, np.ndarray)
    if (axes, channels, time, level) != (None, None, 0, 0) or (spacing is not None and not is_array):
        raise ValueError("axes, spacing, channels, time and level describe a file; open the volume with them instead")
    return ArrayVolume(image, spacing) if is_array else image


def volume_identity(volume: Any) -> dict[str, Any]:
    """What tells that the input is still the same: its own identity, and when its files were written."""
    path = getattr(volume, "path", None)
    if path is None or not os.path.exists(path):  # in memory, or behind a URL
        return dict(volume.identity()) | {"modified": None}
    return dict(volume.identity()) | {"modified": _modified(Path(path))}


def identity_of_all(volumes: Sequence[Any]) -> dict[str, Any]:
    """The identities of the volumes of all time points, as the journal gives them back."""
    identities = [volume_identity(volume) for volume in volumes]
    return as_json(identities[0] if len(volumes) == 1 else {f"volume {i}": v for i, v in enumerate(identities)})


def predictor_identity(predictor: Any) -> dict[str, Any]:
    """What tells predictors apart: what `predictor.identity()` returns if it has that, else its type."""
    if hasattr(predictor, "identity"):
        return dict(predictor.identity())
    kind = predictor if hasattr(predictor, "__qualname__") else type(predictor)
    return {"type": f"{kind.__module__}.{kind.__qualname__}"}


def as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts as they will be read back from the journal."""
    return dict(json.loads(json.dumps(facts, sort_keys=True)))


def _modified(path: Path) -> str:
    """When a file, or the metadata and folders at the top of a Zarr, were last written; ISO 8601, UTC."""
    files = [path]
    if path.is_dir():
        files += [entry for entry in path.iterdir() if entry.is_dir() or entry.name in _ZARR_METADATA]
        files += [entry for folder in files[1:] if folder.is_dir() for entry in folder.iterdir() if entry.is_dir()]
    latest = max(file.stat().st_mtime_ns for file in files)
    second = datetime.fromtimestamp(latest // 10**9, tz=UTC)
    return f"{second:%Y-%m-%dT%H:%M:%S}.{latest % 10**9:09d}Z"
