"""An index of ten million crops: opening it, one crop's record, a filtered count, a sampler's start.

The index is generated, through the package's own format: two thousand volumes of five thousand crops each, a tenth of
which hold twenty instances. All is measured in a fresh process.
"""

import json
import multiprocessing
import pickle
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from bench.data.bars import Row
from bench.data.options import Options
from bench.memory import ResidentPeak
from seg3d_monai.data import CropIndex, DataConfig
from seg3d_monai.data.crop_grid import CropGrid
from seg3d_monai.data.crop_index_format import (
    COUNT,
    CROPS_PER_BLOCK,
    CROPS_PER_LIST,
    FORMAT_VERSION,
    INSTANCE,
    INSTANCES_PER_BLOCK,
    SCHEMA,
    VISIBLE,
    pack_visible,
)
from seg3d_monai.data.crop_sampling import CropSampler

NUM_VOLUMES, QUICK_NUM_VOLUMES = 2000, 4
SHAPE, CONFIG = (336, 832, 352), DataConfig(crop_size=(32, 64, 64))  # 20 x 25 x 10 crops
NUM_INSTANCES, PER_CROP, OCCUPIED = 2500, 20, 0.1
WHERE = 'quality_image >= 2 and stain == "H2B" and num_instances >= 5 and foreground_fraction > 0.02'
NUM_RECORDS, NUM_OPENINGS = 2000, 9
METHOD = (
    "Crops: an index that was just written; opening and its number of crops, median of 9; the record of a crop that "
    "holds instances, with all of them, mean and 99th percentile of 2000; a count of crops by two columns of volumes "
    f"and two of crops ({WHERE}); a CropSampler of the same filter, its peak (VmHWM) over what the process held "
    "before, and its pickle, which is what a spawned worker is sent."
)


def measure(options: Options) -> list[Row]:
    """One row."""
    path = options.folder / "crops.sqlite"
    num_volumes = QUICK_NUM_VOLUMES if options.is_quick else NUM_VOLUMES
    start = time.perf_counter()
    row: Row = {"num_volumes": num_volumes, **write_index(path, num_volumes)}
    row |= {"generating_s": time.perf_counter() - start, "file_mb": path.stat().st_size / 1e6}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
        row |= fresh_process.submit(measure_here, path).result()
    path.unlink()
    return [row]


def measure_here(path: Path) -> Row:
    """Times and memory in this process."""
    openings = []
    for _ in range(NUM_OPENINGS):
        start = time.perf_counter()
        index = CropIndex(path)
        num_crops = len(index)
        openings.append(time.perf_counter() - start)
    start = time.perf_counter()
    num_matching = index.count(where=WHERE)
    count_s = time.perf_counter() - start

    resident = ResidentPeak() if Path("/proc/self/clear_refs").exists() else None
    start = time.perf_counter()
    sampler = CropSampler(index=index, crop_size=index.crop_size, where=WHERE)
    sampler_s = time.perf_counter() - start
    peak = None if resident is None else resident.growth() / 1e6

    _, occupied = index.select(where="num_instances > 0")
    rng = np.random.default_rng(0)
    records = []
    for _ in range(NUM_RECORDS):
        volume = int(rng.integers(len(occupied.num_crops)))
        crop_id = occupied.crop(volume, int(rng.integers(occupied.num_crops[volume])))
        start = time.perf_counter()
        crop, inside = index.crop(crop_id), index.crop_instances(crop_id)
        records.append(1e3 * (time.perf_counter() - start))
        assert crop.num_instances == len(inside) == PER_CROP
    return {
        "num_crops": num_crops,
        "num_matching": num_matching,
        "open_ms": 1e3 * float(np.median(openings)),
        "record_ms": float(np.mean(records)),
        "slow_record_ms": float(np.percentile(records, 99)),
        "count_s": count_s,
        "sampler_s": sampler_s,
        "sampler_peak_mb": peak,
        "sampler_pickle_mb": len(pickle.dumps(sampler)) / 1e6,
    }


def write_index(path: Path, num_volumes: int) -> Row:
    """Generate an index; how many instances its crops hold together."""
    grid = CropGrid(SHAPE, CONFIG.crop_size, CONFIG.step)
    num_visible = 0
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA page_size = 16384")
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        for statement in filter(str.strip, SCHEMA.split(";")):
            connection.execute(statement)
        meta = {"config": CONFIG.to_json(), "rows": "generated"}
        connection.executemany("INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in meta.items()])
        for volume_id in range(1, num_volumes + 1):
            num_visible += write_volume(connection, volume_id, grid)
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")
        connection.execute("ANALYZE")
    return {"num_visible": num_visible}


def write_volume(connection: sqlite3.Connection, volume_id: int, grid: CropGrid) -> int:
    """One volume with random instances in random crops; how many of them its crops hold together."""
    rng = np.random.default_rng(volume_id)
    place = (f"v{volume_id}", "image.zarr", "label.zarr", None, None, 1, *SHAPE, 2.0, 1.0, 1.0)
    intensity = json.dumps({"low": [0.0], "high": [1.0]})
    first_crop = (volume_id - 1) * len(grid) + 1
    counts = (NUM_INSTANCES, 1, first_crop, len(grid), "[]", "{}")
    values = (volume_id, *place, f"s{volume_id % 50}", "train", intensity, *counts)
    connection.execute(f"INSERT INTO volumes VALUES ({', '.join('?' * len(values))})", values)
    attributes: list[tuple[int, str, Any]] = [(volume_id, "quality_image", float(rng.integers(1, 5)))]
    attributes.append((volume_id, "stain", ("H2B", "DAPI")[volume_id % 2]))
    connection.executemany("INSERT INTO attributes VALUES (?, ?, ?)", attributes)

    instances = np.zeros(NUM_INSTANCES, INSTANCE)
    instances["label"], instances["voxels"] = np.arange(1, NUM_INSTANCES + 1), 1000
    instances["box"][:, :3] = rng.integers(0, np.array(SHAPE) - 12, (NUM_INSTANCES, 3))
    instances["box"][:, 3:] = instances["box"][:, :3] + 12
    connection.executemany("INSERT INTO instances VALUES (?, ?, ?)", blocks(volume_id, instances, INSTANCES_PER_BLOCK))
    is_occupied = rng.random(len(grid)) < OCCUPIED
    for name, value in (("num_instances", PER_CROP), ("foreground_voxels", 9000), ("ignored_voxels", 0)):
        column = (is_occupied * rng.integers(value // 2, value + 1, len(grid))).astype(COUNT)
        column = (is_occupied * value).astype(COUNT) if name == "num_instances" else column
        rows = ((name, *row) for row in blocks(volume_id, column, CROPS_PER_BLOCK))
        connection.executemany("INSERT INTO crop_columns VALUES (?, ?, ?, ?)", rows)

    num_visible = int(is_occupied.sum()) * PER_CROP
    visible = np.zeros(num_visible, VISIBLE)
    chosen = rng.random((int(is_occupied.sum()), NUM_INSTANCES)).argpartition(PER_CROP, axis=1)[:, :PER_CROP]
    visible["id"] = np.sort(chosen, axis=1).reshape(-1) + 1
    visible["voxels"] = 1000
    ends = np.concatenate([[0], np.cumsum(is_occupied * PER_CROP)])
    lists = []
    for block in range(-(-len(grid) // CROPS_PER_LIST)):
        first, stop = block * CROPS_PER_LIST, min((block + 1) * CROPS_PER_LIST, len(grid))
        rows_of_list = visible[ends[first] : ends[stop]]
        if len(rows_of_list):
            packed = pack_visible(is_occupied[first:stop] * PER_CROP, rows_of_list)
            lists.append((volume_id, block, packed))
    connection.executemany("INSERT INTO crop_instances VALUES (?, ?, ?)", lists)
    return num_visible


def blocks(volume_id: int, rows: np.ndarray, size: int) -> list[tuple[int, int, bytes]]:
    """Packed blocks of rows."""
    numbers = range(-(-len(rows) // size))
    return [(volume_id, number, rows[number * size : (number + 1) * size].tobytes()) for number in numbers]
