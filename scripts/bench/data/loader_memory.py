"""Memory of a loader's worker: it must not grow with the volume whose crops it makes.

A worker makes crops of a volume of 4 GiB and its labels of as many voxels. What it takes of the machine is its
proportional set size: all pages of its own, and of those that several processes map, such as libraries and what a fork
left in common with the training process, its share. Resident memory counts the latter in full for each worker; its peak
is reported beside it, and so are both for a spawned worker, which imports the libraries anew.
"""

import re
import threading
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy import ndimage

from bench.data.bars import Row
from bench.data.options import Options
from bench.inference.stacks import THRESHOLD, blob_tile, write_tiled
from seg3d_monai.data import CropDataset, CropIndex, CropLoader, DataConfig, build_index, read_manifest
from seg3d_monai.data.transforms import train_transforms

SHAPE, TILE, PITCH, CHUNKS = (512, 2048, 2048), (64, 256, 256), (32, 64, 64), (32, 128, 128)
QUICK_SHAPE, QUICK_TILE, QUICK_PITCH, QUICK_CHUNKS = (32, 128, 128), (16, 64, 64), (8, 16, 16), (16, 32, 32)
CROP, MARGIN, QUICK_CROP, QUICK_MARGIN = (64, 128, 128), (4, 20, 20), (8, 32, 32), (2, 4, 4)
NUM_CROPS, QUICK_NUM_CROPS = 100, 3
METHOD = (
    "Loader memory: one worker of a CropLoader that makes 100 crops of 64x128x128 of a uint16 volume of 4 GiB with "
    "uint16 labels, Zarr v3 in chunks of 32x128x128, the bundles' augmentation and the default cache. Peak: the "
    "largest proportional set size (PSS of smaps_rollup, looked at every 20 ms), Python and libraries included; "
    "resident: VmHWM. The worker is forked from the process that loads, as Linux does by default before Python 3.14, "
    "or spawned."
)


def measure(options: Options) -> list[Row]:
    """A row for each way to start a worker: its peak (None where the system does not tell it)."""
    is_quick = options.is_quick
    crop, margin = (QUICK_CROP, QUICK_MARGIN) if is_quick else (CROP, MARGIN)
    number = QUICK_NUM_CROPS if is_quick else NUM_CROPS
    folder = options.folder / "loader_memory"
    folder.mkdir()
    index = write_data(folder, is_quick, crop)
    dataset = CropDataset(
        index, num_samples=number, crop_size=crop, margin=margin, transform=train_transforms(crop_size=crop)
    )
    (record,) = index.volumes()
    gigabytes = 2 * float(np.prod(record.shape, dtype=np.float64)) / 1e9
    return [{"gigabytes": gigabytes, "num_crops": number, **_peaks(dataset, start)} for start in ("fork", "spawn")]


def _peaks(dataset: CropDataset, start: str) -> Row:
    """The largest share and resident memory of a worker that was started in a way, MB."""
    loader = CropLoader(dataset, batch_size=1, num_workers=1, multiprocessing_context=start)
    batches = iter(loader)
    next(batches)  # starts the worker
    iterator: Any = loader._iterator  # torch keeps it, and its worker, for the next epoch
    process = iterator._workers[0].pid
    with PeakShare(process) as share:
        for _ in batches:
            pass
    resident = kilobytes(process, "status", "VmHWM")
    return {
        "start": start,
        "peak_mb": None if share.peak is None else share.peak * 1024 / 1e6,
        "resident_mb": None if resident is None else resident * 1024 / 1e6,
    }


def write_data(folder: Path, is_quick: bool, crop: tuple[int, ...]) -> CropIndex:
    """A stack that repeats a tile of blobs, its labels, with ids of their own in each tile, and their index."""
    shape, chunks = (QUICK_SHAPE, QUICK_CHUNKS) if is_quick else (SHAPE, CHUNKS)
    tile = blob_tile(*((QUICK_TILE, QUICK_PITCH) if is_quick else (TILE, PITCH)))
    write_tiled(folder / "image.zarr", tile, shape, chunks)
    label, num_blobs = ndimage.label(tile > THRESHOLD, structure=np.ones((3, 3, 3)))
    names = ["z", "y", "x"]
    array = zarr.create_array(folder / "label.zarr", shape=shape, dtype=np.uint16, chunks=chunks, dimension_names=names)
    starts = (range(0, extent, step) for extent, step in zip(shape, tile.shape, strict=True))
    for number, corner in enumerate(product(*starts)):
        window = tuple(slice(a, a + n) for a, n in zip(corner, tile.shape, strict=True))
        array[window] = np.where(label > 0, label + number * num_blobs, 0).astype(np.uint16)
    manifest = folder / "manifest.csv"
    manifest.write_text(
        "name,image,label,spacing_z_um,spacing_y_um,spacing_x_um\nstack,image.zarr,label.zarr,1.0,0.5,0.5\n"
    )
    return build_index(read_manifest(manifest), folder / "crops.sqlite", DataConfig(crop_size=crop), progress=False)


class PeakShare:
    """Within it a thread looks at a process's proportional set size; `peak` is the largest, KiB, None if not told."""

    def __init__(self, process: int, interval: float = 0.02) -> None:
        self.peak: int | None = None
        self._process, self._interval = process, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakShare":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        is_last = False
        while True:
            share = kilobytes(self._process, "smaps_rollup", "Pss")
            if share is not None:
                self.peak = max(self.peak or 0, share)
            if is_last:
                return
            is_last = self._done.wait(self._interval)


def kilobytes(process: int, file: str, name: str) -> int | None:
    """A number of KiB that Linux tells of a process; None elsewhere."""
    try:
        text = Path(f"/proc/{process}/{file}").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):  # the process may end meanwhile
        return None
    match = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    return None if match is None else int(match[1])
