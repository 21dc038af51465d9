"""Any stack as a chunked, sharded OME-Zarr with a pyramid; `seg3d convert` is the door.

The input is read box by box, so memory does not grow with it, and every file of the output is written by one thread.
OUTPUT is built beside its place, as `OUTPUT.partial`, and renamed when it is complete. A run that was killed goes on: a
file that is there is whole, and of the files that hold zeros only, which are never written, a list is kept. Neither the
moment of a kill nor the number of threads shows in the bytes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.convert_files import FileWriter, differences, facts_of
from seg3d_monai.data.convert_plan import ConvertPlan, read_sizes, times_decoded, unit_shape
from seg3d_monai.data.convert_source import Source
from seg3d_monai.data.memory_limit import machine_memory, read_memory_limit
from seg3d_monai.data.pyramid import Triple, is_own_output, partial_path
from seg3d_monai.data.volume import Volume, check_roi

try:
    import fcntl
except ImportError:  # Windows: two runs on one OUTPUT are not kept apart
    fcntl = None  # type: ignore[assignment]

_BYTES_PER_BOX = 3  # a box, a file's voxels and its compressed chunks are in memory together
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What `convert_volume` did, or with `dry_run` would do.

    Attributes:
        output: the OME-Zarr.
        shape: (z, y, x) of level 0.
        num_channels: channels.
        num_times: time points.
        dtype: name of the voxels' type.
        spacing_um: (z, y, x) micrometres per voxel, None when unknown.
        num_levels: levels of the pyramid.
        num_files: files with voxels, at most.
        num_bytes: uncompressed bytes of all levels.
        times_decoded: how often a stored piece of the input is read, on average.
        num_holes: regions that could not be read and are zero (`skip_bad`).
        is_new: whether anything was written.
    """

    output: Path
    shape: Triple
    num_channels: int
    num_times: int
    dtype: str
    spacing_um: tuple[float, float, float] | None
    num_levels: int
    num_files: int
    num_bytes: int
    times_decoded: float
    num_holes: int = 0
    is_new: bool = False

    def describe(self, *, is_plan: bool = False) -> str:
        """One text of a few lines.

        Args:
            is_plan: nothing was written yet.
        """
        size = "unknown" if self.spacing_um is None else "({:.4g}, {:.4g}, {:.4g}) um".format(*self.spacing_um)
        lines = [
            f"(z, y, x) = {self.shape}, {self.num_channels} channel(s), {self.num_times} time point(s), {self.dtype}, "
            f"voxel size {size}",
            f"{self.num_levels} level(s), at most {self.num_files} file(s), {self.num_bytes / 1e9:.3f} GB uncompressed",
        ]
        if is_plan:
            lines.append(f"each stored piece of the input would be read {self.times_decoded:.1f} time(s)")
            lines.append("nothing was written (dry_run)")
        else:
            if self.num_holes:
                lines.append(
                    f"{self.num_holes} region(s) could not be read and are zero; see the attribute seg3d_monai"
                )
            lines.append(f"{'written' if self.is_new else 'already there, nothing to do'}: {self.output}")
        return "\n".join(lines)


def convert_volume(
    image: Any,
    output: str | os.PathLike[str],
    *,
    axes: str | None = None,
    spacing: Sequence[float] | None = None,
    channels: Sequence[int] | int | None = None,
    time: int | Sequence[int] | str = 0,
    level: int | str = 0,
    scene: int | str | None = None,
    roi: Sequence[int] | None = None,
    labels: bool = False,
    chunk_size: int | Sequence[int] | None = None,
    shard_size: int | Sequence[int] | None = None,
    ome_zarr_version: str = "0.5",
    num_workers: int = 1,
    max_memory: str | float | None = None,
    skip_bad: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write a stack as OME-Zarr. An unfinished output goes on, a finished one of the same input is left alone.

    Args:
        image: whatever `open_volume` takes, or a volume.
        output: the OME-Zarr to write, NAME.zarr, on this machine.
        axes, spacing, channels, level, scene: as for `open_volume`; they describe files, not volumes.
        time: time point; several or "all" write a series, with an axis of time.
        roi: (z1, y1, x1, z2, y2, x2) to write, voxels; the output's metadata keep where it lies. None for all.
        labels: the voxels are ids, not intensities: they go to `labels/instances`, coarser levels by the most frequent
            id.
        chunk_size: int or (z, y, x) voxels of a chunk; default (64, 128, 128).
        shard_size: int or (z, y, x) voxels of a file, a multiple of the chunks; default about (64, 512, 512), 0 for a
            file a chunk.
        ome_zarr_version: "0.5" or "0.4", which has no shards.
        num_workers: threads.
        max_memory: bytes, or "8GB", for what is read at once by all threads; default a quarter of the machine's. More
            helps where planes are compressed as a whole.
        skip_bad: leave zeros where the input cannot be read, and list these regions in the attributes.
        restart: throw away an existing output of this package.
        dry_run: check everything and write nothing.
        progress: show a progress bar.

    Returns:
        What was written, or would be.

    Raises:
        FileNotFoundError: the image or the folder of the output does not exist.
        ValueError: an option does not fit the image; the input is damaged; labels are no integers; the output exists
            and was made otherwise; another run is writing it.
    """
    target = _check_output(output, image)
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
        raise ValueError(f"num_workers is {num_workers!r}; pass an integer of at least 1")
    source = Source(image, axes=axes, spacing=spacing, level=level, scene=scene, channels=channels, time=time)
    first = source.volume(0)
    chunks, shards = read_sizes(chunk_size, shard_size, ome_zarr_version)
    plan = _plan(first, source.times, roi=roi, labels=labels, chunks=chunks, shards=shards, version=ome_zarr_version)
    limit = read_memory_limit(max_memory) or (machine_memory() or 8 * 10**9) // 4
    max_bytes = max(1, limit // (_BYTES_PER_BOX * num_workers))
    group_size = max(1, min(plan.num_channels, max_bytes // (prod(plan.tile) * np.dtype(plan.dtype).itemsize)))
    size = unit_shape(plan, first.chunk_shape, group_size, max_bytes)
    done = _summary(target, plan, times_decoded(plan, first.chunk_shape, size))
    if dry_run:
        return done
    identity = {name: fact for name, fact in first.identity().items() if name != "spacing_um"}  # the plan has it
    facts = {"convert": json.loads(json.dumps(plan.facts() | {"input": identity}))}
    if target.exists() and not restart:
        return _as_it_is(target, facts, done)
    if done.times_decoded > 4:
        _log.warning(
            "every stored piece of the input is read about %.0f times; with more max_memory, now %.1f GB, fewer",
            done.times_decoded,
            limit / 1e9,
        )
    with _sole_writer(target) as build:
        if target.exists():
            if not restart:
                return _as_it_is(target, facts, done)
            if not is_own_output(target):
                raise ValueError(
                    f"{target}: exists and was not written by seg3d; remove it yourself, or choose another"
                )
            shutil.rmtree(target)
        writer = FileWriter(build, plan, facts, source, size, group_size, skip_bad=skip_bad)
        writer.prepare(restart=restart)
        writer.fill(num_workers, progress)
        num_holes = writer.finish()
        build.rename(target)
    return replace(done, num_holes=num_holes, is_new=True)


def _plan(
    volume: Volume,
    times: tuple[int, ...] | None,
    *,
    roi: Sequence[int] | None,
    labels: bool,
    chunks: Triple,
    shards: Triple | None,
    version: str,
) -> ConvertPlan:
    name = volume.path or "image"
    if labels and volume.dtype.kind not in "ui":
        raise ValueError(
            f"{name}: labels are integers, and its voxels are {volume.dtype}; leave out labels, or write ids"
        )
    if labels and volume.shape[0] != 1:
        raise ValueError(f"{name}: labels have one channel, and it has {volume.shape[0]}; name one with channels")
    region = check_roi((0, 0, 0, *volume.shape[1:]) if roi is None else roi, volume.shape)
    z, y, x = (region[a + 3] - region[a] for a in range(3))
    if 0 in (z, y, x):
        raise ValueError(f"roi={region} holds no voxel; make it larger")
    return ConvertPlan(
        shape=(z, y, x),
        num_channels=volume.shape[0],
        times=times,
        dtype=volume.dtype.name,
        spacing_um=volume.spacing_um,
        region=region,
        is_labels=bool(labels),
        version=version,
        chunks=chunks,
        shards=shards,
    )


def _summary(output: Path, plan: ConvertPlan, decoded: float) -> Conversion:
    shapes = [plan.array_shape(level) for level in range(len(plan.factors))]
    files = [
        prod(shape[:-3]) * prod(-(-n // t) for n, t in zip(shape[-3:], plan.tile, strict=True)) for shape in shapes
    ]
    return Conversion(
        output=output,
        shape=plan.shape,
        num_channels=plan.num_channels,
        num_times=1 if plan.times is None else len(plan.times),
        dtype=plan.dtype,
        spacing_um=plan.spacing_um,
        num_levels=len(shapes),
        num_files=sum(files),
        num_bytes=sum(prod(shape) for shape in shapes) * np.dtype(plan.dtype).itemsize,
        times_decoded=decoded,
    )


def _check_output(output: str | os.PathLike[str], image: Any) -> Path:
    text = os.fspath(output)
    if "://" in text:
        raise ValueError(
            f"output is {text!r}; it is written on this machine only: pass a folder, and copy it afterwards"
        )
    target = Path(os.path.abspath(text))
    if target.suffix != ".zarr":
        raise ValueError(f"output is {text!r}; its name must end in .zarr")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output {text!r}: its folder does not exist; make it first")
    if isinstance(image, str | os.PathLike) and "://" not in os.fspath(image):
        source = Path(os.path.abspath(image))
        if target == source or target in source.parents:
            raise ValueError(f"output {text!r} is the input or lies around it; choose another")
    return target


def _as_it_is(output: Path, facts: dict[str, Any], done: Conversion) -> Conversion:
    """A finished output of the same input and options.

    Raises:
        ValueError: it is something else.
    """
    found = facts_of(output)
    differing = differences(found.get("convert") or {}, facts["convert"])
    if not found or differing:
        raise ValueError(
            f"{output}: exists and was made otherwise ({differing or 'not by seg3d convert'}); choose another output, "
            "or pass restart to replace it"
        )
    return replace(done, num_holes=len(found.get("holes", ())))


@contextmanager
def _sole_writer(output: Path) -> Iterator[Path]:
    """OUTPUT.partial, made if missing and locked: the lock ends with the process, however that ends.

    Raises:
        ValueError: another process is writing it.
    """
    partial = partial_path(output)
    while True:
        partial.mkdir(exist_ok=True)
        if fcntl is None:
            yield partial
            return
        handle = os.open(partial, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{output}: another run is writing it; wait for that, or choose another output"
                ) from None
            # It may have been renamed between making and locking it.
            if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
                try:
                    yield partial
                finally:
                    # Nothing in it: a run that was refused at once has left no trace.
                    if partial.is_dir() and not any(partial.iterdir()):
                        partial.rmdir()
                return
        finally:
            os.close(handle)
