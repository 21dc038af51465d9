"""Writing labels as OME-Zarr 0.5 or 0.4: a multiscale `labels/instances`, built beside OUTPUT and renamed at the end.

An OUTPUT that exists is complete. Nothing in it depends on time, host, place or the number of workers. Blocks are
written one after the other by the driver, so chunks that two blocks share are safe. This file knows label arrays, not
instances.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from tqdm import tqdm
from zarr.codecs import ZstdCodec

from seg3d_monai.inference.blocks import BlockPlan, Roi, Triple, roi_slices

OME_ZARR_VERSIONS = ("0.4", "0.5")
ATTRIBUTE = "seg3d_monai"
LABEL_NAME = "instances"
_MAX_CHUNK = (64, 128, 128)
_COARSEST = 256  # levels are added until no axis is longer
_ZSTD_LEVEL = 3

Downsample = Callable[[NDArray[Any], Triple], NDArray[Any]]


class LabelWriter:
    """The unfinished OUTPUT: write every owned ROI, then `finish`, then `publish`.

    Args:
        output: where the finished OME-Zarr will be; until then it is built in a sibling, `OUTPUT.partial`.
        plan: the plan of blocks; chunks divide its blocks where that gives chunks of a fair size.
        dtype: "uint32" or "uint16".
        spacing_um: (z, y, x) micrometer per voxel, or None: then the scale is in voxels, without a unit.
        version: OME-Zarr version, "0.5" or "0.4".
        provenance: JSON-able facts kept in OUTPUT's attributes.
    """

    def __init__(
        self,
        output: Path,
        plan: BlockPlan,
        *,
        dtype: str,
        spacing_um: Sequence[float] | None,
        version: str,
        provenance: dict[str, Any],
    ) -> None:
        self._output = output
        self._partial = partial_path(output)
        self._plan = plan
        self._spacing = spacing_um
        self._version = version
        self._chunks = _chunk_shape(plan)
        if self._partial.exists():
            shutil.rmtree(self._partial)
        facts = {"block_size": list(plan.block_size), "halo": list(plan.halo), "provenance": provenance}
        self._root = zarr.open_group(self._partial, mode="w", zarr_format=2 if version == "0.4" else 3)
        self._put_attributes(self._root, {}, {ATTRIBUTE: facts})
        group = self._root.create_group("labels")
        self._put_attributes(group, {"labels": [LABEL_NAME]})
        self._labels = group.create_group(LABEL_NAME)
        self._factors = _pyramid(plan.shape, spacing_um)
        self._level = self._create(self._labels, "0", plan.shape, self._chunks, np.dtype(dtype))

    def write(self, roi: Roi, labels: NDArray[np.integer]) -> None:
        """Write the ids of an owned ROI."""
        self._level[roi_slices(roi)] = labels.astype(self._level.dtype)

    def finish(self, *, progress: bool) -> None:
        """Build the pyramid and write the metadata."""
        self._build_pyramid(self._labels, self._level, downsample_labels, progress)
        label = {"version": self._version} | ({"source": {"image": "../../"}} if "0" in self._root else {})
        multiscale = self._multiscale(LABEL_NAME, ("z", "y", "x"), "mode")
        self._put_attributes(self._labels, {"multiscales": [multiscale], "image-label": label})

    def copy_image(self, volume: Any, *, progress: bool) -> None:
        """Copy the input beside the labels, with a pyramid of its own; call it before `finish`."""
        shape = (volume.shape[0], *self._plan.shape)
        level = self._create(self._root, "0", shape, (1, *self._chunks), volume.dtype)
        for block in tqdm(self._plan, total=len(self._plan), desc="copy", unit="block", disable=not progress):
            level[(slice(None), *roi_slices(block.owned))] = volume.read(block.owned)
        self._build_pyramid(self._root, level, downsample_image, progress)
        multiscale = self._multiscale("image", ("c", "z", "y", "x"), "mean")
        self._put_attributes(self._root, {"multiscales": [multiscale]}, dict(self._root.attrs))

    def publish(self) -> None:
        """Make OUTPUT appear, complete."""
        if self._output.exists():
            shutil.rmtree(self._output)
        self._partial.rename(self._output)

    def _create(
        self, group: zarr.Group, name: str, shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype[Any]
    ) -> zarr.Array[Any]:
        chunks = tuple(min(c, s) for c, s in zip(chunks, shape, strict=True))
        if self._version == "0.4":
            return group.create_array(
                name,
                shape=tuple(shape),
                chunks=chunks,
                dtype=dtype,
                fill_value=0,
                compressors=numcodecs.Zstd(level=_ZSTD_LEVEL),
                chunk_key_encoding={"name": "v2", "separator": "/"},
            )
        return group.create_array(
            name,
            shape=tuple(shape),
            chunks=chunks,
            dtype=dtype,
            fill_value=0,
            compressors=ZstdCodec(level=_ZSTD_LEVEL),
            dimension_names=["c", "z", "y", "x"][-len(shape) :],
        )

    def _build_pyramid(self, group: zarr.Group, level: zarr.Array[Any], downsample: Downsample, progress: bool) -> None:
        leading = level.shape[:-3]
        for index in range(1, len(self._factors)):
            pairs = zip(self._factors[index], self._factors[index - 1], strict=True)
            z, y, x = (new // old for new, old in pairs)
            step = (z, y, x)
            shape = tuple(-(-s // f) for s, f in zip(level.shape[-3:], step, strict=True))
            chunks = (1,) * len(leading) + self._chunks
            coarse = self._create(group, str(index), (*leading, *shape), chunks, level.dtype)
            tiles = list(_tiles(shape, self._chunks))
            for tile in tqdm(tiles, desc=f"level {index}", unit="chunk", disable=not progress):
                for channel in product(*(range(int(n)) for n in leading)):
                    fine = tuple(slice(s.start * f, s.stop * f) for s, f in zip(tile, step, strict=True))
                    source: tuple[int | slice, ...] = (*channel, *fine)
                    target: tuple[int | slice, ...] = (*channel, *tile)
                    coarse[target] = downsample(np.asarray(level[source]), step)
            level = coarse

    def _multiscale(self, name: str, axes: Sequence[str], kind: str) -> dict[str, Any]:
        spacing = (1.0, 1.0, 1.0) if self._spacing is None else tuple(float(s) for s in self._spacing)
        extra = len(axes) - 3
        datasets = []
        for index, factors in enumerate(self._factors):
            scale = [1.0] * extra + [s * f for s, f in zip(spacing, factors, strict=True)]
            # A coarse voxel's centre lies between the centres of the voxels that it stands for.
            shift = [0.0] * extra + [s * (f - 1) / 2 for s, f in zip(spacing, factors, strict=True)]
            transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
            datasets.append({"path": str(index), "coordinateTransformations": transforms})
        described = [
            {"name": axis, "type": "channel"}
            if axis == "c"
            else {"name": axis, "type": "space"} | ({} if self._spacing is None else {"unit": "micrometer"})
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
    padded = np.pad(array, [(0, -n % f) for n, f in zip(array.shape, step, strict=True)], mode="edge")
    return [padded[i :: step[0], j :: step[1], k :: step[2]] for i, j, k in product(*(range(f) for f in step))]


def _chunk_shape(plan: BlockPlan) -> Triple:
    chunks = []
    for size, limit in zip(plan.block_size, _MAX_CHUNK, strict=True):
        divisor = max(d for d in range(1, min(size, limit) + 1) if size % d == 0)
        chunks.append(divisor if divisor >= min(size, limit) // 2 else limit)
    return chunks[0], chunks[1], chunks[2]


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


def _tiles(shape: Sequence[int], chunks: Triple) -> Iterator[tuple[slice, ...]]:
    ranges = [range(0, n, c) for n, c in zip(shape, chunks, strict=True)]
    for starts in product(*ranges):
        yield tuple(slice(s, min(s + c, n)) for s, c, n in zip(starts, chunks, shape, strict=True))
