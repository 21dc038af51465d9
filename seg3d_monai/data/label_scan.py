"""One streaming pass over a label volume: every instance's box and size, in the volume and in each crop of a grid.

The faces of all crops cut the volume into cells that do not overlap. Each cell is read once and measured once; a crop
is the union of its cells, and so is the volume. Overlapping crops therefore cost no second reading, and memory holds
one slab and the rows of unfinished crops.

Must not know: SQLite, manifests, images.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from seg3d_monai.data.targets import IGNORE, compact_labels, instance_extents
from seg3d_monai.data.volume import Volume

_MAX_CELL = 256  # voxels along an axis: bounds the memory of one cell whatever the crop size
_ROW = 8  # id, voxels, z1, y1, x1, z2, y2, x2


@dataclass(frozen=True)
class ScannedCrop:
    """What one crop of the grid holds.

    Args:
        box: (z1, y1, x1, z2, y2, x2) in the volume frame.
        rows: int64 [n, 8]: label id, visible voxels, box in the volume frame; ascending ids.
        foreground: labelled voxels.
        ignored: voxels marked ignore.
    """

    box: tuple[int, int, int, int, int, int]
    rows: np.ndarray
    foreground: int
    ignored: int


@dataclass
class _Cell:
    rows: np.ndarray
    foreground: int
    ignored: int


def crop_starts(size: int, crop: int, stride: int) -> list[int]:
    """First voxels of the crops along one axis; the last crop is flush with the border, a short axis has one crop."""
    if size <= crop:
        return [0]
    starts = list(range(0, size - crop + 1, stride))
    if starts[-1] != size - crop:
        starts.append(size - crop)
    return starts


class LabelScan:
    """Scans a label volume once; iterate over it for the crops, then read `instances`.

    Args:
        label: label volume with one channel; 0 background, the dtype's maximum is ignore.
        crop_size: extent of a crop, (z, y, x) voxels.
        stride: step of the grid, (z, y, x) voxels, at most the crop size.
        max_voxels: voxels read at a time, where a single cell allows it.
        name: what errors call the volume.
    """

    def __init__(
        self,
        *,
        label: Volume,
        crop_size: Sequence[int],
        stride: Sequence[int],
        max_voxels: int = 1 << 26,
        name: str = "label",
    ) -> None:
        dtype = np.dtype(label.dtype)
        if dtype.kind not in "iu":
            raise ValueError(f"{name}: labels have dtype {dtype}; save instance ids as integers (uint16 or uint32)")
        if label.shape[0] != 1:
            raise ValueError(f"{name}: labels have {label.shape[0]} channels; a label volume has one")
        self._label = label
        self._name = name
        self._dtype = dtype
        self._max_voxels = max_voxels
        self._shape = tuple(int(n) for n in label.shape[1:])
        self._crop = tuple(min(c, n) for c, n in zip(crop_size, self._shape, strict=True))
        self.starts = [crop_starts(n, c, s) for n, c, s in zip(self._shape, self._crop, stride, strict=True)]
        self._edges = [_edges(n, c, starts) for n, c, starts in zip(self._shape, self._crop, self.starts, strict=True)]
        self.instances = np.zeros((0, _ROW), np.int64)

    def __iter__(self) -> Iterator[ScannedCrop]:
        """Yield the crops in z, y, x order of the grid; afterwards `instances` holds the rows of the whole volume."""
        self.instances = np.zeros((0, _ROW), np.int64)
        cells: dict[tuple[int, int, int], _Cell] = {}
        waiting = list(self.starts[0])
        _, size_y, size_x = self._shape
        for layers in _groups(self._edges[0], self._max_voxels // max(size_y * size_x, 1)):
            fresh = dict(self._measure(layers))
            self.instances = _merge([self.instances, *(cell.rows for cell in fresh.values())])
            cells.update(fresh)
            done = self._edges[0][layers.stop]
            while waiting and waiting[0] + self._crop[0] <= done:
                z = waiting.pop(0)
                yield from (self._crop_of(cells, (z, y, x)) for y, x in product(self.starts[1], self.starts[2]))
            needed = waiting[0] if waiting else done
            cells = {key: cell for key, cell in cells.items() if self._edges[0][key[0] + 1] > needed}

    def _measure(self, layers: range) -> Iterator[tuple[tuple[int, int, int], _Cell]]:
        edges_z, edges_y, edges_x = self._edges
        z1, z2 = edges_z[layers.start], edges_z[layers.stop]
        for rows in _groups(edges_y, self._max_voxels // max((z2 - z1) * self._shape[2], 1)):
            y1, y2 = edges_y[rows.start], edges_y[rows.stop]
            for columns in _groups(edges_x, self._max_voxels // max((z2 - z1) * (y2 - y1), 1)):
                x1, x2 = edges_x[columns.start], edges_x[columns.stop]
                block = self._label.read((z1, y1, x1, z2, y2, x2))[0]
                if self._dtype.kind == "i" and int(block.min()) < 0:
                    raise ValueError(
                        f"{self._name}: labels hold {int(block.min())}; ids are positive, 0 is background, and "
                        f"ignore is {np.iinfo(self._dtype).max}, the maximum of {self._dtype}"
                    )
                for key in product(layers, rows, columns):
                    low = [edges[k] for edges, k in zip(self._edges, key, strict=True)]
                    high = [edges[k + 1] for edges, k in zip(self._edges, key, strict=True)]
                    part = block[low[0] - z1 : high[0] - z1, low[1] - y1 : high[1] - y1, low[2] - x1 : high[2] - x1]
                    yield key, self._cell(part, low)

    def _cell(self, part: np.ndarray, corner: Sequence[int]) -> _Cell:
        codes, ids = compact_labels(part, ignore=int(np.iinfo(self._dtype).max))
        if len(ids) and int(ids.min()) < 0:
            raise ValueError(f"{self._name}: labels hold ids of 2**63 or more; renumber them")
        boxes, voxels = instance_extents(codes, len(ids))
        boxes += np.array([*corner, *corner])
        rows = np.column_stack([ids, voxels, boxes]).astype(np.int64)
        return _Cell(rows=rows, foreground=int(voxels.sum()), ignored=int((codes == IGNORE).sum()))

    def _crop_of(self, cells: dict[tuple[int, int, int], _Cell], corner: tuple[int, int, int]) -> ScannedCrop:
        spans = [
            range(bisect_left(edges, start), bisect_left(edges, start + extent))
            for edges, start, extent in zip(self._edges, corner, self._crop, strict=True)
        ]
        inside = [cells[(z, y, x)] for z, y, x in product(*spans)]
        z, y, x = corner
        return ScannedCrop(
            box=(z, y, x, z + self._crop[0], y + self._crop[1], x + self._crop[2]),
            rows=_merge([cell.rows for cell in inside]),
            foreground=sum(cell.foreground for cell in inside),
            ignored=sum(cell.ignored for cell in inside),
        )


def _edges(size: int, crop: int, starts: Sequence[int]) -> list[int]:
    """Borders of the cells along an axis: every face of a crop, and more where a cell would be too long."""
    faces = sorted({0, size, *starts, *(start + crop for start in starts)})
    return [edge for low, high in pairwise(faces) for edge in range(low, high, _MAX_CELL)] + [size]


def _groups(edges: Sequence[int], limit: int) -> Iterator[range]:
    """Runs of neighbouring cells of at most `limit` voxels together; a single cell may be longer."""
    first = 0
    for cell in range(1, len(edges) - 1):
        if edges[cell + 1] - edges[first] > limit:
            yield range(first, cell)
            first = cell
    yield range(first, len(edges) - 1)


def _merge(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join rows of the same id: voxels add up, boxes unite."""
    rows = np.concatenate(parts)
    if len(rows) == 0:
        return rows
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    ids, first = np.unique(rows[:, 0], return_index=True)
    return np.column_stack(
        [
            ids,
            np.add.reduceat(rows[:, 1], first),
            np.minimum.reduceat(rows[:, 2:5], first, axis=0),
            np.maximum.reduceat(rows[:, 5:8], first, axis=0),
        ]
    )
