"""Building an index over label volumes, against only reading them, and with two processes against one.

The labels are space-filling cells, of which some are taken out, in zstd chunks. Every contender is a fresh process, in
the order read 1 2 2 1 read, so that a machine that grows slower or faster does so for all; what is timed is all of
`build_index`, the start of the second process included, but not the imports of the first.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from bench.data.bars import Row
from bench.data.options import Options
from bench.inference.tissue import tissue_seeds, voronoi
from seg3d_monai.data import CropIndex, DataConfig, build_index, open_volume
from seg3d_monai.data.volume import storage_rois

Triple = tuple[int, int, int]

NUM_VOLUMES, SHAPE, TILE, CHUNKS, DIAMETER = 8, (256, 1024, 1024), (64, 256, 256), (64, 128, 128), 14
QUICK_NUM_VOLUMES, QUICK_SHAPE, QUICK_TILE, QUICK_CHUNKS = 2, (32, 64, 96), (32, 64, 48), (16, 32, 32)
EMPTY = 0.4
"""Share of the cells that are taken out, as background."""
TURNS = ("read", "one", "two", "two", "one", "read")
CONFIG = DataConfig(crop_size=(32, 64, 64))
THREADS = {"ZARR_THREADING__MAX_WORKERS": "1", "ZARR_ASYNC__CONCURRENCY": "1"}
METHOD = (
    "Build: build_index of crops of 32x64x64, half overlapping, over uint32 labels in zstd chunks of 64x128x128, cells "
    "of 14 voxels in diameter; read decodes the same chunks. One thread a process; by turns, each in a fresh process."
)


def measure(options: Options) -> list[Row]:
    """One row: seconds of each turn, the ratio of the rates, and how many times faster two processes are."""
    folder = options.folder / "build"
    num_volumes = write_data(folder, options.is_quick)
    seconds: dict[str, list[float]] = {turn: [] for turn in TURNS}
    with environment(THREADS):
        for number, turn in enumerate(TURNS):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
                seconds[turn].append(fresh_process.submit(measure_here, folder, turn, number).result())
    index = CropIndex(folder / "1.sqlite")
    volumes = index.volumes()
    return [
        {
            "num_volumes": num_volumes,
            "voxels": sum(float(np.prod(volume.shape, dtype=np.float64)) for volume in volumes),
            "num_instances": sum(volume.num_instances for volume in volumes),
            "num_crops": len(index),
            "turns": TURNS,
            **{f"{turn}_s": values for turn, values in seconds.items()},
            "build_over_read": sum(seconds["read"]) / sum(seconds["one"]),
            "speed_up": sum(seconds["one"]) / sum(seconds["two"]),
        }
    ]


def measure_here(folder: Path, turn: str, number: int) -> float:
    """Seconds of one turn in this process."""
    start = time.perf_counter()
    if turn == "read":
        for path in sorted(folder.glob("label_*.zarr")):
            volume = open_volume(path)
            for roi in storage_rois(volume):
                volume.read(roi)
    else:
        num_workers = {"one": 1, "two": 2}[turn]
        db = folder / f"{number}.sqlite"
        build_index(folder / "manifest.csv", db, CONFIG, num_workers=num_workers, progress=False)
    return time.perf_counter() - start


def write_data(folder: Path, is_quick: bool) -> int:
    """Volumes that repeat a tile of cells, with ids of their own in each tile, and their manifest; how many."""
    folder.mkdir()
    shape, tile, chunks = (QUICK_SHAPE, QUICK_TILE, QUICK_CHUNKS) if is_quick else (SHAPE, TILE, CHUNKS)
    num_volumes = QUICK_NUM_VOLUMES if is_quick else NUM_VOLUMES
    cells = tile_of_cells(tile)
    lines = ["name,image,label"]
    for number in range(num_volumes):
        write_labels(folder / f"label_{number}.zarr", np.roll(cells, number, axis=2), shape, chunks)
        image = zarr.create_array(folder / f"image_{number}.zarr", shape=shape, chunks=chunks, dtype=np.uint8)
        image[: chunks[0]] = np.random.default_rng(number).integers(0, 99, (chunks[0], *shape[1:]), np.uint8)
        lines.append(f"v{number},image_{number}.zarr,label_{number}.zarr")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return num_volumes


def tile_of_cells(shape: Triple) -> NDArray[np.uint32]:
    """Cells that fill space, but for those that are taken out."""
    seeds = tissue_seeds(shape, DIAMETER, seed=0)
    labels = voronoi(seeds, (0, 0, 0, *shape))
    is_cell = np.random.default_rng(0).random(len(seeds) + 1) >= EMPTY
    return np.where(is_cell[labels], labels, 0).astype(np.uint32)


def write_labels(path: Path, tile: NDArray[np.uint32], shape: Triple, chunks: Triple) -> None:
    """Write the tile again and again, with other ids each time."""
    array = zarr.create_array(path, shape=shape, dtype=tile.dtype, chunks=chunks)
    starts = (range(0, extent, step) for extent, step in zip(shape, tile.shape, strict=True))
    step = int(tile.max())
    for number, corner in enumerate(product(*starts)):
        window = tuple(slice(low, low + n) for low, n in zip(corner, tile.shape, strict=True))
        array[window] = np.where(tile > 0, tile + np.uint32(number * step), 0)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
