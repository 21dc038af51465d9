"""Writing labels as OME-Zarr 0.5 or 0.4: a multiscale `labels/instances`, built beside OUTPUT and renamed at the end.

An OUTPUT that exists is complete. Nothing in it depends on time, host, place or the number of workers. Every block
writes whole files of its own, and so does every tile of a coarser level, so any number of processes may write at once,
and what a killed one left is written again. A file is a chunk, or a shard: all chunks of a block, or of as large a part
of a coarser level. This file knows label arrays, not instances.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import ZstdCodec

from seg3d_monai.inference.blocks import Block, BlockPlan, Triple, roi_slices

OME_ZARR_VERSIONS = ("0.4", "0.5")
ATTRIBUTE = "seg3d_monai"
LABEL_NAME = "instances"
LABELS = f"labels/{LABEL_NAME}"
_MAX_CHUNK = (64, 128, 128)
_COARSEST = 256  # levels are added until no axis is longer
_ZSTD_LEVEL = 3

Downsample = Callable[[NDArray[Any], Triple], NDArray[Any]]


class LabelWriter:
    """The unfinished OUTPUT: `create` it, `write` every block, build every tile of `coarse_arrays`, then `publish`.

    Args:
        output: where the finished OME-Zarr will be; until then it is built in a sibling, `OUTPUT.partial`.
        plan: the plan of blocks; chunks divide its blocks.
        dtype: "uint32" or "uint16".
        spacing_um: (z, y, x) micrometer per voxel, or None: then the scale is in voxels, without a unit.
        version: OME-Zarr version, "0.5" or "0.4".
        facts: JSON-able facts kept in OUTPUT's attributes beside the plan.
        shards: whether the chunks of a block lie in one file; not in version 0.4.
        is_series: whether the arrays have an axis of time before the others.
        image: (number of channels, dtype) of a copy of the input beside the labels, or None.
    """

    def __init__(
        self,
        output: Path,
        plan: BlockPlan,
        *,
        dtype: str,
        spacing_um: Sequence[float] | None,
        version: str,
        facts: dict[str, Any],
        shards: bool = False,
        is_series: bool = False,
        image: tuple[int, DTypeLike] | None = None,
    ) -> None:
        self.output = output
        self.partial = partial_path(output)
        self._plan = plan
        self._dtype = np.dtype(dtype)
        self._spacing = spacing_um
        self._version = version
        self._facts = facts
        self._is_series = is_series
        self._image = image
        self._chunks = chunk_shape(plan)
        self._shards = shard_shape(plan, self._chunks) if shards else self._chunks
        self._factors = _pyramid(plan.shape, spacing_um)
        self._open: dict[str, zarr.Array[Any]] = {}

    def create(self) -> None:
        """Make `OUTPUT.partial` anew: all arrays, empty, and all metadata."""
        if self.partial.exists():
            shutil.rmtree(self.partial)
        root = zarr.open_group(self.partial, mode="w", zarr_format=2 if self._version == "0.4" else 3)
        plan = {"block_size": list(self._plan.block_size), "halo": list(self._plan.halo)}
        if self._plan.region != (0, 0, 0, *self._plan.shape):
            plan["roi"] = list(self._plan.region)
        image = {} if self._image is None else {"multiscales": [self._multiscale("image", "tczyx", "mean")]}
        self._put_attributes(root, image, {ATTRIBUTE: plan | self._facts})
        self._put_attributes(root.create_group("labels"), {"labels": [LABEL_NAME]})
        source = {} if self._image is None else {"source": {"image": "../../"}}
        self._put_attributes(
            root.create_group(LABELS),
            {
                "multiscales": [self._multiscale(LABEL_NAME, "tzyx", "mode")],
                "image-label": {"version": self._version} | source,
            },
        )
        leading = (self._plan.times,) if self._is_series else ()
        for level, factors in enumerate(self._factors):
            shape = tuple(-(-n // f) for n, f in zip(self._plan.shape, factors, strict=True))
            self._create(root, f"{LABELS}/{level}", (*leading, *shape), self._dtype)
            if self._image is not None:
                self._create(root, str(level), (*leading, self._image[0], *shape), np.dtype(self._image[1]))

    def remove_remains(self) -> None:
        """Remove the files that a killed process was writing; zarr gives a file its name once it is whole."""
        for path in self.partial.rglob("*.partial"):
            path.unlink()

    def write(self, block: Block, labels: NDArray[np.integer]) -> None:
        """Write the ids [d, h, w] of a block's owned ROI."""
        leading = (block.time,) if self._is_series else ()
        self._array(f"{LABELS}/0")[(*leading, *roi_slices(block.owned))] = labels.astype(self._dtype, copy=False)

    def copy(self, block: Block, voxels: NDArray[Any]) -> None:
        """Write the image [C, d, h, w] of a block's owned ROI."""
        leading = (block.time,) if self._is_series else ()
        self._array("0")[(*leading, slice(None), *roi_slices(block.owned))] = voxels

    def coarse_arrays(self) -> list[str]:
        """Names of the coarser levels; each is made from the one before it, or from level 0."""
        levels = range(1, len(self._factors))
        return [f"{LABELS}/{i}" for i in levels] + ([str(i) for i in levels] if self._image is not None else [])

    def num_tiles(self, name: str) -> int:
        """Tiles of a coarser level: its files."""
        return prod(_grid(self._array(name)))

    def chunks_of_a_tile(self, name: str) -> int:
        """Chunks that a tile of a coarser level holds."""
        array = self._array(name)
        return prod(array.shards or array.chunks) // prod(array.chunks)

    def build_tile(self, name: str, tile: int) -> None:
        """Make one tile of a coarser level from the level before it."""
        folder, _, level = name.rpartition("/")
        number = int(level)
        fine, coarse = self._array(f"{folder}/{number - 1}".lstrip("/")), self._array(name)
        pairs = zip(self._factors[number], self._factors[number - 1], strict=True)
        z, y, x = (new // old for new, old in pairs)
        step = (z, y, x)
        downsample: Downsample = downsample_labels if folder == LABELS else downsample_image
        *leading, i, j, k = (int(n) for n in np.unravel_index(tile, _grid(coarse)))
        extent = (coarse.shards or coarse.chunks)[-3:]
        starts = [n * e for n, e in zip((i, j, k), extent, strict=True)]
        stops = [min(a + e, n) for a, e, n in zip(starts, extent, coarse.shape[-3:], strict=True)]
        voxels = np.zeros([b - a for a, b in zip(starts, stops, strict=True)], coarse.dtype)
        # Chunk by chunk: the finer voxels of a whole shard would be eight times as many.
        lines = (range(a, b, c) for a, b, c in zip(starts, stops, coarse.chunks[-3:], strict=True))
        for corner in product(*lines):
            ends = [min(a + c, b) for a, c, b in zip(corner, coarse.chunks[-3:], stops, strict=True)]
            extents = zip(corner, ends, step, strict=True)
            source: tuple[int | slice, ...] = (*leading, *(slice(a * f, b * f) for a, b, f in extents))
            finer = np.asarray(fine[source])
            if finer.any():
                window = tuple(slice(a - o, b - o) for a, b, o in zip(corner, ends, starts, strict=True))
                voxels[window] = downsample(finer, step)
        if voxels.any():
            target: tuple[int | slice, ...] = (*leading, *(slice(a, b) for a, b in zip(starts, stops, strict=True)))
            coarse[target] = voxels

    def publish(self) -> None:
        """Make OUTPUT appear, complete."""
        if self.output.exists():
            shutil.rmtree(self.output)
        self.partial.rename(self.output)

    @property
    def path(self) -> Path:
        """Where the arrays are now."""
        return self.partial if self.partial.exists() else self.output

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._open:
            self._open[name] = zarr.open_array(self.partial, path=name, mode="r+")
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _create(self, root: zarr.Group, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        leading = (1,) * (len(shape) - 3)
        chunks = tuple(min(c, n) for c, n in zip(self._chunks, shape[-3:], strict=True))
        options: dict[str, Any] = {"shape": tuple(shape), "chunks": leading + chunks, "dtype": dtype, "fill_value": 0}
        if self._version == "0.4":
            options |= {
                "compressors": numcodecs.Zstd(level=_ZSTD_LEVEL),
                "chunk_key_encoding": {"name": "v2", "separator": "/"},
            }
        else:
            names = list("tzyx") if name.startswith(LABELS) else list("tczyx")
            options |= {
                "compressors": ZstdCodec(level=_ZSTD_LEVEL),
                "dimension_names": names if self._is_series else names[1:],
            }
            if self._shards != self._chunks:
                # A level that is smaller than a shard is one.
                sizes = zip(self._shards, chunks, shape[-3:], strict=True)
                options["shards"] = leading + tuple(-(-min(s, n) // c) * c for s, c, n in sizes)
        root.create_array(name, **options)

    def _multiscale(self, name: str, axes: str, kind: str) -> dict[str, Any]:
        axes = axes if self._is_series else axes[1:]
        spacing = (1.0, 1.0, 1.0) if self._spacing is None else tuple(float(s) for s in self._spacing)
        extra = len(axes) - 3
        datasets = []
        for index, factors in enumerate(self._factors):
            scale = [1.0] * extra + [s * f for s, f in zip(spacing, factors, strict=True)]
            # A coarse voxel's centre lies between the centres of the voxels that it stands for.
            shift = [0.0] * extra + [s * (f - 1) / 2 for s, f in zip(spacing, factors, strict=True)]
            transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
            datasets.append({"path": str(index), "coordinateTransformations": transforms})
        types = {"t": "time", "c": "channel"}
        unit = {} if self._spacing is None else {"unit": "micrometer"}
        described = [
            {"name": axis, "type": types[axis]} if axis in types else {"name": axis, "type": "space"} | unit
            for axis in axes
        ]
        version = {"version": self._version} if self._version == "0.4" else {}
        return version | {"name": name, "axes": described, "datasets": datasets, "type": kind}

    def _put_attributes(self, group: zarr.Group, ome: dict[str, Any], other: dict[str, Any] | None = None) -> None:
        if self._version == "0.4":
            group.attrs.put((other or {}) | ome)
        else:
            group.attrs.put((other or {}) | {"ome": {"version": self._version} | ome})


def partial_path(output: Path) -> Path:
    """Where OUTPUT is built."""
    return output.with_name(output.name + ".partial")


def is_own_output(output: Path) -> bool:
    """Whether a folder is an OUTPUT that this package wrote (so `restart` may remove it)."""
    try:
        return ATTRIBUTE in zarr.open_group(output, mode="r").attrs
    except (FileNotFoundError, ValueError, OSError):
        return False


def downsample_labels(labels: NDArray[Any], step: Triple) -> NDArray[Any]:
    """The most frequent id of every cell of `step` voxels; ties go to an object, then to the lower id.

    Args:
        labels: [d, h, w]; an odd end is continued by its last voxel.
        step: (z, y, x), each 1 or 2.
    """
    votes = _cells(labels, step)
    best, best_count = votes[0], np.zeros(votes[0].shape, dtype=np.uint8)
    for vote in votes:
        count = np.sum([vote == other for other in votes], axis=0, dtype=np.uint8)
        lower = (vote > 0) & ((best == 0) | (vote < best))
        better = (count > best_count) | ((count == best_count) & lower)
        best, best_count = np.where(better, vote, best), np.maximum(count, best_count)
    return best


def downsample_image(image: NDArray[Any], step: Triple) -> NDArray[Any]:
    """The mean of every cell of `step` voxels, in the image's dtype (integers rounded)."""
    mean = np.mean(_cells(image, step), axis=0, dtype=np.float64)
    return (mean if np.issubdtype(image.dtype, np.floating) else np.rint(mean)).astype(image.dtype)


def _cells(array: NDArray[Any], step: Triple) -> list[NDArray[Any]]:
    missing = [(0, -n % f) for n, f in zip(array.shape, step, strict=True)]
    padded = np.pad(array, missing, mode="edge") if np.any(missing) else array  # np.pad always copies
    return [padded[i :: step[0], j :: step[1], k :: step[2]] for i, j, k in product(*(range(f) for f in step))]


def chunk_shape(plan: BlockPlan) -> Triple:
    """(z, y, x) of a chunk that no two blocks share, of a fair size."""
    chunks = []
    for size, limit, count in zip(plan.block_size, _MAX_CHUNK, plan.grid, strict=True):
        if count == 1:
            chunks.append(min(size, limit))
            continue
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        # The largest that fits, unless it is so small that there would be too many chunks.
        fitting = max(d for d in divisors if d <= limit)
        chunks.append(fitting if 2 * fitting >= min(size, limit) else min(d for d in divisors if d > limit))
    return chunks[0], chunks[1], chunks[2]


def shard_shape(plan: BlockPlan, chunks: Triple) -> Triple:
    """(z, y, x) of a shard: the fewest chunks that hold a block, so that no two blocks share one."""
    z, y, x = (-(-size // chunk) * chunk for size, chunk in zip(plan.block_size, chunks, strict=True))
    return z, y, x


def _grid(array: zarr.Array[Any]) -> list[int]:
    """Files of an array along each axis."""
    return [-(-n // e) for n, e in zip(array.shape, array.shards or array.chunks, strict=True)]


def _pyramid(shape: Triple, spacing_um: Sequence[float] | None) -> list[Triple]:
    """Downsampling factors of the levels; an axis waits until the others have come near its spacing."""
    spacing = (1.0, 1.0, 1.0) if spacing_um is None else tuple(spacing_um)
    levels: list[Triple] = [(1, 1, 1)]
    while True:
        factors = levels[-1]
        size = [-(-n // f) for n, f in zip(shape, factors, strict=True)]
        if max(size) <= _COARSEST:
            return levels
        now = [s * f for s, f in zip(spacing, factors, strict=True)]
        finest = min(v for v, n in zip(now, size, strict=True) if n > 1)
        z, y, x = (f * (2 if n > 1 and v < 2 * finest else 1) for f, n, v in zip(factors, size, now, strict=True))
        levels.append((z, y, x))
