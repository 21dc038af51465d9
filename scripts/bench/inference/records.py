"""Stitching ten million instances: from the records in the journal to the id of every instance, in a fresh process.

The tissue repeats with the period of a block, so the block in the middle of a small stack says what every block of an
endless one would see: its census and its links, worked out by the package from its masks, are written for each block of
a large plan, moved to its place. What is measured begins there: reading the records, groups, guests, ids.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.inference.bars import Row
from bench.inference.options import Options
from bench.inference.tissue import to_instances, voronoi
from bench.memory import ResidentPeak
from seg3d_monai.inference.blocks import BlockPlan, Triple, roi_slices
from seg3d_monai.inference.evidence import Census, Links, link_block, take_census
from seg3d_monai.inference.journal import Journal, RowSource, pack_instances
from seg3d_monai.inference.paint import stitch_records
from seg3d_monai.inference.stitch import gather_records

BLOCK, HALO, CELLS_OF_A_BLOCK = (32, 64, 64), (8, 12, 12), 48
INSTANCES, QUICK_INSTANCES = 10_000_000, 10_000
METHOD = (
    "Records: a fresh process reads the records of a journal and gives every instance its object's id; evidence from "
    "masks, which is worked out while blocks are predicted, is not in the time. Peak is VmHWM, all included."
)


def measure(options: Options) -> list[Row]:
    """One row: instances, objects, seconds and the peak of memory."""
    census, links, middle = evidence_of_a_block()
    wanted = QUICK_INSTANCES if options.is_quick else INSTANCES
    side = ceil((wanted / len(census)) ** (1 / 3))
    path = options.folder / "records.journal.sqlite"
    write_journal(path, plan_of(side), census, links, middle)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as fresh_process:
        row = fresh_process.submit(measure_here, path, side).result()
    path.unlink()
    return [{"num_blocks": side**3, **row}]


def measure_here(path: Path, side: int) -> Row:
    """Objects, seconds and peak of stitching the records in this process."""
    resident = ResidentPeak() if Path("/proc/self/clear_refs").exists() else None
    start = time.perf_counter()
    with Journal(path) as journal:
        plan = plan_of(side)
        records = gather_records(len(plan), journal.evidence_counts(), journal.evidence())
        num_links, read = len(records.lower), time.perf_counter() - start
        stitched = stitch_records(plan, journal, records)
    return {
        "num_instances": len(records),
        "num_links": num_links,
        "num_objects": stitched.num_objects,
        "read_seconds": read,
        "seconds": time.perf_counter() - start,
        "peak_gb": None if resident is None else (resident.before + resident.growth()) / 1e9,
    }


def plan_of(side: int) -> BlockPlan:
    """The plan of a stack of side x side x side whole blocks."""
    return BlockPlan.make(shape=[side * size for size in BLOCK], block_size=BLOCK, halo=HALO)


def evidence_of_a_block() -> tuple[Census, Links, int]:
    """Census and links of the block in the middle of 5 x 5 x 5 of them, whose neighbours see as much, and its index."""
    plan = plan_of(5)
    middle = len(plan) // 2
    seeds = np.random.default_rng(0).uniform(0, BLOCK, (CELLS_OF_A_BLOCK, 3))
    tiles = np.array(list(product(range(5), repeat=3))) * np.array(BLOCK)
    tissue = voronoi((seeds + tiles[:, None]).reshape(-1, 3), (0, 0, 0, *plan.shape))
    placed = {
        index: to_instances(tissue[roi_slices(plan[index].read)], np.random.default_rng(0)).place(plan[index].read)
        for index in [middle, *plan.neighbours(middle)]
    }
    censuses = {index: take_census(plan, index, instances) for index, instances in placed.items()}
    rows = {index: pack_instances(instances) for index, instances in placed.items()}
    homes = {index: census.home for index, census in censuses.items()}
    return censuses[middle], link_block(plan, middle, RowSource(rows), homes), middle


def write_journal(path: Path, plan: BlockPlan, census: Census, links: Links, middle: int) -> None:
    """Write the evidence of one block for all blocks of a plan, without what lies beyond its border."""
    of_five = plan_of(5)
    home, reached, other = (
        steps_from(of_five, middle, blocks) for blocks in (census.home, census.reach[:, 1], links.other)
    )
    corner = census.corner - np.array(of_five[middle].owned[:3], np.int32)
    with Journal(path) as journal, journal.transaction():
        for block in plan:
            homes, _ = blocks_at(plan, block.position, home)
            reach, is_there = blocks_at(plan, block.position, reached)
            others, is_linked = blocks_at(plan, block.position, other)
            moved = replace(
                census,
                corner=corner + np.array(block.owned[:3], np.int32),
                home=np.where(homes >= 0, homes, block.index),
                reach=np.column_stack([census.reach[:, 0], reach])[is_there],
            )
            journal.store_census(block.index, moved)
            linked = Links(others, links.theirs, links.mine, links.strength)
            journal.store_links(block.index, Links(*(array[is_linked] for array in vars(linked).values())))


def steps_from(plan: BlockPlan, block: int, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions [n, 3] of blocks, seen from one."""
    return np.stack(np.unravel_index(blocks, plan.grid), axis=1) - np.array(plan[block].position)


def blocks_at(
    plan: BlockPlan, position: Triple, steps: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Blocks [n] that lie some steps from a position, -1 beyond the border; and whether they exist."""
    there = np.array(position) + steps
    exists = ((there >= 0) & (there < np.array(plan.grid))).all(axis=1)
    index = (there[:, 0] * plan.grid[1] + there[:, 1]) * plan.grid[2] + there[:, 2]
    return np.where(exists, index, -1), exists
