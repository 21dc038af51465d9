"""Arrays and files that the tests of reading share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

SHAPE = (9, 34, 47)  # z, y, x: anisotropic, and no multiple of a chunk


@pytest.fixture
def stack() -> np.ndarray:
    """Distinct voxels, so that any exchange of axes or places shows."""
    return np.random.default_rng(7).permutation(np.prod(SHAPE)).astype(np.uint16).reshape(SHAPE)


@pytest.fixture
def channels() -> np.ndarray:
    """Two different channels, [C, Z, Y, X]."""
    return np.random.default_rng(8).integers(0, 60000, (2, *SHAPE)).astype(np.uint16)


@pytest.fixture
def random_rois() -> Callable[..., Iterator[tuple[int, ...]]]:
    """Regions inside a shape: corner, whole, empty, single voxels, and random ones."""

    def rois(shape: tuple[int, ...], count: int = 40) -> Iterator[tuple[int, ...]]:
        rng = np.random.default_rng(3)
        yield (0, 0, 0, *shape)
        yield (*(n - 1 for n in shape), *shape)
        yield (0, 0, 0, 0, 0, 0)
        for _ in range(count):
            ends = [np.sort(rng.integers(0, n + 1, 2)) for n in shape]
            yield (*(int(e[0]) for e in ends), *(int(e[1]) for e in ends))

    return rois


@pytest.fixture
def ome_zarr() -> Callable[..., Path]:
    """Write an OME-Zarr image of given version, axes and voxel size, with a second level of every other voxel."""

    def write(
        path: Path, array: np.ndarray, *, version: str, axes: str, scale: list[float], unit: str | None = "micrometer"
    ) -> Path:
        zarr_format = 2 if version == "0.4" else 3
        group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
        step = tuple(slice(None, None, 2 if axis in "zyx" else 1) for axis in axes)
        datasets = []
        for level, data in enumerate((array, array[step])):
            group.create_array(
                str(level),
                data=data,
                chunks=tuple(min(n, 16) for n in data.shape),
                chunk_key_encoding={"name": "v2" if zarr_format == 2 else "default", "separator": "/"},
            )
            factors = [s * (2**level if axis in "zyx" else 1) for s, axis in zip(scale, axes, strict=True)]
            datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": factors}]})
        kinds = {"t": "time", "c": "channel"}
        described = [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]
        for axis in described:
            if unit is not None and axis["type"] == "space":
                axis["unit"] = unit
        multiscales = [{"version": version, "axes": described, "datasets": datasets}]
        if version == "0.4":
            group.attrs["multiscales"] = multiscales
        else:
            group.attrs["ome"] = {"version": version, "multiscales": multiscales}
        return path

    return write
