"""From label voxels to the instances of every crop, each voxel looked at once.

`measure_block` reduces a block to rows, one for each instance and each cell that the faces of the crops cut: it finds
runs of equal ids along x, of which there are far fewer than voxels, and sorts those. `join_crops` makes crops of cells,
so that overlapping crops cost no second reading; `join_instances` makes instances of the whole volume.

Must not know: SQLite, files, manifests, images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seg3d_monai.data.crop_grid import CropGrid
from seg3d_monai.data.targets import compact_labels

_CACHED_VOXELS = 1 << 18  # looked at together: they stay in the processor's cache
NUM_COLUMNS = 8
"""Columns of rows: label id, voxels, z1, y1, x1, z2, y2, x2 in the volume frame; the id -1 is ignore."""


def check_label(dtype: np.dtype, num_channels: int, name: str) -> None:
    """See that a volume can hold labels.

    Raises:
        ValueError: it is not of integers, or has several channels.
    """
    if dtype.kind not in "iu":
        raise ValueError(f"{name}: labels have dtype {dtype}; save instance ids as integers (uint16 or uint32)")
    if num_channels != 1:
        raise ValueError(f"{name}: labels have {num_channels} channels; a label volume has one")


def measure_block(block: np.ndarray, corner: Sequence[int], grid: CropGrid, *, name: str = "label") -> np.ndarray:
    """Measure the instances of a block within each cell of the grid.

    Args:
        block: integer [d, h, w], 0 background, the dtype's maximum is ignore.
        corner: first voxel (z, y, x) of the block in the volume.
        grid: of the volume.
        name: what errors call the volume.

    Returns:
        Rows, int64 [n, 8], see `NUM_COLUMNS`; no two of the same id in the same cell.

    Raises:
        ValueError: an id is negative, or 2**63 and more.
    """
    if block.size == 0:
        return np.zeros((0, NUM_COLUMNS), np.int64)
    height, width = block.shape[1:]
    cell_z, cell_y, cell_x = (
        np.searchsorted(faces, np.arange(first, first + size), side="right") - 1
        for faces, first, size in zip(grid.faces, corner, block.shape, strict=True)
    )
    rows_of_voxels = np.ascontiguousarray(block).reshape(-1, width)
    starts, lengths, ids = _runs(rows_of_voxels, np.flatnonzero(np.diff(cell_x, prepend=-1)))
    if len(starts) == 0:
        return np.zeros((0, NUM_COLUMNS), np.int64)
    if ids.dtype.kind == "i" and int(ids.min()) < 0:
        raise ValueError(
            f"{name}: labels hold {int(ids.min())}; ids are positive, 0 is background, and ignore is "
            f"{np.iinfo(ids.dtype).max}, the maximum of {ids.dtype}"
        )
    codes, known = compact_labels(ids, ignore=int(np.iinfo(ids.dtype).max))
    if len(known) and int(known.min()) < 0:
        raise ValueError(f"{name}: labels hold ids of 2**63 or more; renumber them")

    # The cell of a row of voxels is looked up once for its runs.
    cell_z, cell_y, cell_x = (values - values[0] for values in (cell_z, cell_y, cell_x))
    cell_of_line = (cell_z[:, None] * (cell_y[-1] + 1) + cell_y).reshape(-1) * (cell_x[-1] + 1)
    line = starts // width  # far faster than divmod
    key = cell_of_line[line] + cell_x[starts - line * width]
    key *= len(known) + 1
    key += np.maximum(codes, 0)
    order, first = _groups(key)
    last = np.append(first[1:], len(order)) - 1
    starts, lengths = starts[order], lengths[order]
    line = starts // width
    x, z = starts - line * width, line // height
    y = line - z * height
    rows = np.empty((len(first), NUM_COLUMNS), np.int64)
    rows[:, 0] = np.concatenate([[-1], known])[np.maximum(codes[order[first]], 0)]
    rows[:, 1] = np.add.reduceat(lengths, first)
    rows[:, 2], rows[:, 5] = z[first], z[last] + 1  # runs of a group are in the order of the voxels
    rows[:, 3], rows[:, 6] = np.minimum.reduceat(y, first), np.maximum.reduceat(y, first) + 1
    rows[:, 4], rows[:, 7] = np.minimum.reduceat(x, first), np.maximum.reduceat(x + lengths, first)
    rows[:, 2:5] += np.asarray(corner)
    rows[:, 5:8] += np.asarray(corner)
    return rows


def _runs(rows: np.ndarray, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal ids other than 0 along the rows.

    Args:
        rows: integer [n, width].
        cuts: places in a row where runs end, 0 among them.

    Returns:
        First voxel of each run, counted through all rows; its length; its id.
    """
    height = max(1, _CACHED_VOXELS // rows.shape[1])
    starts, lengths, ids = [], [], []
    for first in range(0, len(rows), height):
        part = rows[first : first + height]
        flat = part.reshape(-1)
        changes = np.empty(flat.shape, bool)
        np.not_equal(flat[1:], flat[:-1], out=changes[1:])
        for cut in cuts:  # strided writes, several times faster than one indexed by all
            changes.reshape(part.shape)[:, cut] = True
        found = np.flatnonzero(changes)
        values = flat[found]
        marked = np.flatnonzero(values)
        begin = found[marked]
        starts.append(begin + first * rows.shape[1])
        lengths.append(np.append(found, flat.size)[marked + 1] - begin)
        ids.append(values[marked])
    return np.concatenate(starts), np.concatenate(lengths), np.concatenate(ids)


def join_instances(rows: np.ndarray) -> np.ndarray:
    """Join rows of the same id, whatever their cells: voxels add up, boxes unite.

    Args:
        rows: int64 [n, 8].

    Returns:
        int64 [m, 8], ascending ids.
    """
    if len(rows) == 0:
        return rows
    order, first = _groups(rows[:, 0] - rows[:, 0].min())
    return np.column_stack([rows[order[first], 0], _reduce(rows[order], first)])


@dataclass(frozen=True)
class CropRows:
    """What the crops of one layer of the grid hold, sorted by crop, then by instance.

    Args:
        crops: int64 [n], number of the crop within the layer.
        ids: int64 [n], of the instances, as the rows had them.
        voxels: int64 [n], visible in the crop.
        boxes: int64 [n, 6], in the frame of the crop.
    """

    crops: np.ndarray
    ids: np.ndarray
    voxels: np.ndarray
    boxes: np.ndarray


def join_crops(rows: np.ndarray, grid: CropGrid, layer: int) -> CropRows:
    """Join the rows of cells into those of the crops of one layer.

    Args:
        rows: int64 [n, 8] with ids from 0 below 2**31; all that lie in the layer, and any others.
        grid: of the volume.
        layer: which of the crops along z.
    """
    first_z = int(grid.starts[0][layer])
    rows = rows[(rows[:, 2] >= first_z) & (rows[:, 2] < first_z + grid.extent[0])]
    if len(rows) == 0:
        nothing = np.zeros(0, np.int64)
        return CropRows(nothing, nothing, nothing, np.zeros((0, 6), np.int64))
    # Cells above each other lie in the same crops of a layer; joining them first leaves less to multiply.
    cell_y, cell_x = (np.searchsorted(grid.faces[axis], rows[:, 2 + axis], side="right") - 1 for axis in (1, 2))
    num_ids = int(rows[:, 0].max()) + 1
    order, first = _groups((cell_y * len(grid.faces[2]) + cell_x) * num_ids + rows[:, 0])
    rows = np.column_stack([rows[order[first], 0], _reduce(rows[order], first)])

    (first_y, stop_y), (first_x, stop_x) = grid.covering(1, rows[:, 3]), grid.covering(2, rows[:, 4])
    across = stop_x - first_x
    copies = (stop_y - first_y) * across
    source = np.repeat(np.arange(len(rows)), copies)
    turn = np.arange(len(source)) - np.repeat(np.cumsum(copies) - copies, copies)
    down, right = np.divmod(turn, across[source])
    num_x = len(grid.starts[2])
    crops = (first_y[source] + down) * num_x + first_x[source] + right
    order, first = _groups(crops * num_ids + rows[source, 0])
    joined = _reduce(rows[source[order]], first)
    crops = crops[order[first]]
    corner = np.stack([np.full(len(crops), first_z), grid.starts[1][crops // num_x], grid.starts[2][crops % num_x]], 1)
    return CropRows(
        crops=crops,
        ids=rows[source[order[first]], 0],
        voxels=joined[:, 0],
        boxes=joined[:, 1:] - np.concatenate([corner, corner], axis=1),
    )


def _reduce(rows: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Voxels and boxes [m, 7] of consecutive groups of rows."""
    return np.column_stack(
        [
            np.add.reduceat(rows[:, 1], first),
            *(np.minimum.reduceat(rows[:, column], first) for column in (2, 3, 4)),
            *(np.maximum.reduceat(rows[:, column], first) for column in (5, 6, 7)),
        ]
    )


def _groups(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A stable order by key, at least one and none negative, and where each group of equal keys begins in it."""
    bits = max(1, (len(key) - 1).bit_length())
    if int(key.max()) < 1 << (63 - bits):
        # The place in the low bits: one plain sort gives order and stability, several times faster than argsort.
        packed = key << bits
        packed |= np.arange(len(key))
        packed.sort()
        order = packed & ((1 << bits) - 1)
        key = packed >> bits
    else:
        order = np.argsort(key, kind="stable")
        key = key[order]
    return order, np.flatnonzero(np.diff(key, prepend=-1))
