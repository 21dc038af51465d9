"""Crops out of a volume on disk: against the bare library on the same regions, and against reading the whole file.

Ours is what a training does: `open_volume`, then regions through the cache of decoded chunks, of which this volume is
far too large a customer. Zarr is asked for the region of an open array; tifffile for that of the store that it offers
for such reads (`aszarr`). Regions are random, and the contenders take turns, so that all find the files in the page
cache.
"""

import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from bench.data.bars import Row
from bench.data.options import Options
from bench.inference.stacks import blob_tile, write_tiled
from seg3d_monai.data import open_volume
from seg3d_monai.data.crop_dataset import WORKER_CACHE_BYTES
from seg3d_monai.data.volume_cache import VolumeCache

SHAPE, TILE, CROP = (512, 1024, 1024), (64, 256, 256), (64, 128, 128)
QUICK_SHAPE, QUICK_TILE, QUICK_CROP = (32, 128, 128), (16, 64, 64), (8, 32, 32)
PITCH, QUICK_PITCH = (16, 32, 32), (8, 16, 16)
NUM_CROPS, QUICK_NUM_CROPS = 40, 3
METHOD = (
    "Reads: random crops of 64x128x128 of a uint16 volume of 1.07 GB, Zarr v3 in zstd chunks of 32x128x128 and TIFF in "
    "deflated tiles of 128x128; medians of wall time, by turns; whole reads the file as its library does, once."
)

Read = Callable[[tuple[int, ...]], NDArray[np.generic]]


def measure(options: Options) -> list[Row]:
    """One row for each format."""
    shape, size = (QUICK_SHAPE, QUICK_CROP) if options.is_quick else (SHAPE, CROP)
    tile = blob_tile(*((QUICK_TILE, QUICK_PITCH) if options.is_quick else (TILE, PITCH)))
    number = QUICK_NUM_CROPS if options.is_quick else NUM_CROPS
    chunks = (16, 32, 32) if options.is_quick else (32, 128, 128)
    rows = []
    stored = write_tiled(options.folder / "reads.zarr", tile, shape, chunks)
    rows.append(
        {"format": "Zarr", **compare(stored, zarr.open_array(stored, mode="r"), shape, size, number, zarr_whole)}
    )
    path = write_tiff(options.folder / "reads.tif", tile, shape, chunks[1:])
    with tifffile.TiffFile(path) as file:
        array = zarr.open_array(file.aszarr(), mode="r")
        rows.append({"format": "TIFF", **compare(path, array, shape, size, number, tifffile.imread)})
    path.unlink()
    return rows


def compare(
    path: Path,
    array: zarr.Array,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    number: int,
    read_whole: Callable[[Path], NDArray[np.generic]],
) -> Row:
    """Milliseconds a crop of ours, of the bare library, and of reading the whole file."""
    volume, cache = open_volume(path), VolumeCache(max_bytes=WORKER_CACHE_BYTES)
    contenders: dict[str, Read] = {
        "ours": lambda roi: cache.read("volume", lambda: volume, roi)[0],
        "uncached": lambda roi: volume.read(roi)[0],
        "bare": lambda roi: np.asarray(array[slices(roi)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn, roi in enumerate(regions(shape, size, number + 1)):
        results = {}
        for name, read in contenders.items():
            start = time.perf_counter()
            results[name] = read(roi)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
        assert all(np.array_equal(results["bare"], result) for result in results.values())
    start = time.perf_counter()
    np.ascontiguousarray(read_whole(path)[slices(roi)])
    whole = time.perf_counter() - start
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "gigabytes": float(np.prod(shape, dtype=np.float64)) * volume.dtype.itemsize / 1e9,
        **{f"{name}_ms": 1e3 * value for name, value in medians.items()},
        "whole_ms": 1e3 * whole,
        "bare_over_ours": medians["bare"] / medians["ours"],
        "whole_over_ours": whole / medians["ours"],
    }


def regions(shape: tuple[int, ...], size: tuple[int, ...], number: int) -> Iterator[tuple[int, ...]]:
    """Random regions of one size."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        start = rng.integers(0, np.array(shape) - size + 1)
        yield (*start.tolist(), *(start + size).tolist())


def slices(roi: tuple[int, ...]) -> tuple[slice, ...]:
    """The region as an index."""
    return tuple(slice(low, high) for low, high in zip(roi[:3], roi[3:], strict=True))


def zarr_whole(path: Path) -> NDArray[np.generic]:
    """All voxels of a Zarr array."""
    return np.asarray(zarr.open_array(path, mode="r")[...])


def write_tiff(path: Path, tile: NDArray[np.uint16], shape: tuple[int, ...], tile_size: tuple[int, ...]) -> Path:
    """The same stack as a deflated, tiled BigTIFF; the tiles of the file divide those of the stack."""
    height, width = tile_size
    tiles = (
        tile[z % tile.shape[0], y % tile.shape[1] :, x % tile.shape[2] :][:height, :width]
        for z, y, x in product(range(shape[0]), range(0, shape[1], height), range(0, shape[2], width))
    )
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            tiles,
            shape=shape,
            dtype=tile.dtype,
            tile=tile_size,
            compression="zlib",
            photometric="minisblack",
            metadata={"axes": "ZYX"},
        )
    return path
