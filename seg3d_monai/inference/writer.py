"""Writing labels as OME-Zarr 0.5 or 0.4: a multiscale `labels/instances`, built beside OUTPUT and renamed at the end.

An OUTPUT that exists is complete. Nothing in it depends on time, host, place or the number of workers. Every block
writes whole files of its own, and so does every tile of a coarser level, so any number of processes may write at once,
and what a killed one left is written again. A file is a chunk, or a shard: all chunks of a block, or of as large a part
of a coarser level. This file knows label arrays, not instances.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray

from seg3d_monai.data.pyramid import (
    ATTRIBUTE,
    OME_ZARR_VERSIONS,
    build_tile,
    create_level,
    downsample_image,
    downsample_labels,
    is_own_output,
    level_shape,
    multiscale_metadata,
    num_tiles,
    partial_path,
    put_attributes,
    pyramid_factors,
    remove_remains,
)
from seg3d_monai.inference.blocks import Block, BlockPlan, Triple, roi_slices

__all__ = [
    "LABELS",
    "LABEL_NAME",
    "OME_ZARR_VERSIONS",
    "LabelWriter",
    "chunk_shape",
    "downsample_image",
    "downsample_labels",
    "is_own_output",
    "partial_path",
    "shard_shape",
]

LABEL_NAME = "instances"
LABELS = f"labels/{LABEL_NAME}"
_MAX_CHUNK = (64, 128, 128)


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
        self._factors = pyramid_factors(plan.shape, spacing_um)
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
        put_attributes(root, self._version, image, {ATTRIBUTE: plan | self._facts})
        put_attributes(root.create_group("labels"), self._version, {"labels": [LABEL_NAME]})
        source = {} if self._image is None else {"source": {"image": "../../"}}
        put_attributes(
            root.create_group(LABELS),
            self._version,
            {
                "multiscales": [self._multiscale(LABEL_NAME, "tzyx", "mode")],
                "image-label": {"version": self._version} | source,
            },
        )
        leading = (self._plan.times,) if self._is_series else ()
        for level, factors in enumerate(self._factors):
            shape = level_shape(self._plan.shape, factors)
            self._create(root, f"{LABELS}/{level}", (*leading, *shape), self._dtype)
            if self._image is not None:
                self._create(root, str(level), (*leading, self._image[0], *shape), np.dtype(self._image[1]))

    def remove_remains(self) -> None:
        """Remove the files that a killed process was writing; zarr gives a file its name once it is whole."""
        remove_remains(self.partial)

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
        return num_tiles(self._array(name))

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
        downsample = downsample_labels if folder == LABELS else downsample_image
        build_tile(fine, coarse, (z, y, x), downsample, tile)

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
        create_level(
            root,
            name,
            shape=shape,
            dtype=dtype,
            axes=self._axes("tzyx" if name.startswith(LABELS) else "tczyx"),
            chunks=self._chunks,
            shards=self._shards,
            version=self._version,
        )

    def _multiscale(self, name: str, axes: str, kind: str) -> dict[str, Any]:
        return multiscale_metadata(
            name,
            axes=self._axes(axes),
            factors=self._factors,
            spacing_um=self._spacing,
            kind=kind,
            version=self._version,
        )

    def _axes(self, axes: str) -> str:
        return axes if self._is_series else axes[1:]


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
