"""The files of an OME-Zarr that is being converted: which are there, which are missing, and writing those.

Each is written whole by one thread and gets its name once it is whole, so after a kill the others are what is missing.
Files that would hold zeros only are never written; which these are stands in a log beside the arrays.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from tqdm import tqdm

from seg3d_monai.data.convert_plan import ConvertPlan, Unit, num_units, tile_box, units
from seg3d_monai.data.convert_source import Source
from seg3d_monai.data.pyramid import (
    ATTRIBUTE,
    Triple,
    build_tile,
    create_level,
    downsample_image,
    downsample_labels,
    is_own_output,
    multiscale_metadata,
    put_attributes,
    remove_remains,
    tile_grid,
    tile_shape,
)
from seg3d_monai.data.volume import Roi

STATE = "unfinished.json"
LOG = "unfinished.log"
_log = logging.getLogger(__name__)


class FileWriter:
    """OUTPUT.partial: `prepare` it, `fill` every file, `finish` it.

    Args:
        folder: where it is built; nobody else writes there.
        plan: what is written.
        facts: what the output says of itself.
        source: where voxels come from.
        size: (z, y, x) of the boxes that are read, whole files.
        group_size: channels that are read together.
        skip_bad: leave zeros where voxels cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        plan: ConvertPlan,
        facts: dict[str, Any],
        source: Source,
        size: Triple,
        group_size: int,
        *,
        skip_bad: bool,
    ) -> None:
        self._folder, self._plan, self._facts, self._source = folder, plan, facts, source
        self._size, self._group_size, self._skip_bad = size, group_size, skip_bad
        self._arrays: list[zarr.Array[Any]] = []
        self._empty: set[tuple[int, int]] = set()
        self._holes: dict[int, str] = {}

    def prepare(self, *, restart: bool) -> None:
        """Make the arrays, or take up those that are there.

        Raises:
            ValueError: they are those of another input or other options.
        """
        found: dict[str, Any] | None = None
        is_begun = (self._folder / STATE).is_file()
        if not is_begun and not is_own_output(self._folder) and _has_more_than_remains(self._folder):
            raise ValueError(
                f"{self._folder}: exists and was not written by seg3d; remove it yourself, or choose another"
            )
        if not restart and is_begun:
            found = json.loads((self._folder / STATE).read_text())["facts"]  # None: its arrays were not all made
        elif not restart and is_own_output(self._folder):
            found = facts_of(self._folder)  # complete, only not yet renamed
        if found is not None:
            differing = differences(found.get("convert") or {}, self._facts["convert"])
            if differing:
                raise ValueError(
                    f"{self._folder}: was begun with another input or other options ({differing}); undo that, choose "
                    "another output, or pass restart to begin anew"
                )
            remove_remains(self._folder)
            self._read_log()
        else:
            self._create()
        self._arrays = [
            zarr.open_array(self._folder, path=self._plan.array_name(i), mode="r+")
            for i in range(len(self._plan.factors))
        ]
        assert tile_shape(self._arrays[0])[-3:] == self._plan.tile

    def _create(self) -> None:
        plan, version = self._plan, self._plan.version
        self._set_state(None)
        for entry in self._folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != STATE:
                entry.unlink()
        root = zarr.open_group(self._folder, mode="a", zarr_format=2 if version == "0.4" else 3)
        name = "instances" if plan.is_labels else "image"
        multiscale = multiscale_metadata(
            name,
            axes=plan.axes,
            factors=plan.factors,
            spacing_um=plan.spacing_um,
            kind="mode" if plan.is_labels else "mean",
            version=version,
            origin=plan.region[:3],
        )
        ome: dict[str, Any] = {"multiscales": [multiscale]}
        if plan.is_labels:
            put_attributes(root, version, {}, {ATTRIBUTE: self._facts})
            put_attributes(root.create_group("labels"), version, {"labels": [name]})
            put_attributes(root.create_group(plan.folder), version, ome | {"image-label": {"version": version}})
        else:
            put_attributes(root, version, ome, {ATTRIBUTE: self._facts})
        for level in range(len(plan.factors)):
            create_level(
                root,
                plan.array_name(level),
                shape=plan.array_shape(level),
                dtype=np.dtype(plan.dtype),
                axes=plan.axes,
                chunks=plan.chunks,
                shards=plan.shards,
                version=version,
            )
        (self._folder / LOG).touch()
        self._set_state(self._facts)

    def _set_state(self, facts: dict[str, Any] | None) -> None:
        """Say what is being written; None until its arrays are made: what a kill leaves of them is made anew."""
        unnamed = self._folder / f"{STATE}.new"
        unnamed.write_text(json.dumps({"facts": facts}))
        unnamed.replace(self._folder / STATE)

    def _read_log(self) -> None:
        """Take up the files that are known to hold zeros only, and cut off a line that a kill has left incomplete."""
        log = self._folder / LOG
        if not log.is_file():
            return
        content = log.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with log.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.decode().splitlines():
            kind, level, tile, *text = line.split(" ", 3)
            if kind == "hole":
                self._holes[int(tile)] = text[0] if text else ""
            self._empty.add((int(level), int(tile)))

    def fill(self, num_workers: int, progress: bool) -> None:
        """Write all files that are not there, level by level."""
        plan = self._plan
        sizes = [prod(array.shape) * array.dtype.itemsize for array in self._arrays]
        with (
            tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="convert", disable=not progress) as bar,
            ThreadPoolExecutor(num_workers) as threads,
            (self._folder / LOG).open("a") as log,
        ):
            for level, array in enumerate(self._arrays):
                if level == 0:
                    jobs: Iterable[Any] = units(plan, self._size)
                    work: Callable[[Any], list[str]] = self._fill_unit
                    share = sizes[0] / max(1, num_units(plan, self._size))
                else:
                    jobs, work = range(prod(tile_grid(array))), self._tile_work(level)
                    share = sizes[level] / max(1, prod(tile_grid(array)))
                for lines in _in_parallel(threads, num_workers, work, jobs):
                    # Whoever is killed before this line makes these files again: they hold zeros.
                    log.write("".join(lines))
                    log.flush()
                    for line in lines:
                        kind, at, tile, *text = line.rstrip("\n").split(" ", 3)
                        self._empty.add((int(at), int(tile)))
                        if kind == "hole":
                            self._holes[int(tile)] = text[0]
                    bar.update(share)

    def _fill_unit(self, unit: Unit) -> list[str]:
        """Write the files of a box; lines for the log."""
        lines: list[str] = []
        count = self._plan.num_channels
        for start in range(0, count, self._group_size):
            group = range(start, min(start + self._group_size, count))
            missing = [
                (place, channel, number)
                for place in unit.tiles
                for channel in group
                if not self._is_done(0, number := self._tile_number(unit.time, channel, place))
            ]
            if not missing:
                continue
            try:
                voxels = self._read(unit.time, group, unit.box)
            except ValueError:
                if not self._skip_bad:
                    raise
                lines += self._fill_singly(unit.time, missing)
                continue
            for place, channel, number in missing:
                part = tile_box(self._plan, place)
                window = tuple(slice(part[a] - unit.box[a], part[a + 3] - unit.box[a]) for a in range(3))
                lines += self._write(unit.time, channel, number, part, voxels[channel - start][window])
        return lines

    def _fill_singly(self, time: int, missing: Sequence[tuple[Triple, int, int]]) -> list[str]:
        """Read file by file where a box cannot be read, and leave holes."""
        lines = []
        for place, channel, number in missing:
            part = tile_box(self._plan, place)
            try:
                voxels = self._read(time, range(channel, channel + 1), part)[0]
            except ValueError as error:
                _log.warning("%s; left as a hole", error)
                hole = {"roi": list(part), "channel": channel}
                lines.append(
                    f"hole 0 {number} {json.dumps(hole | ({} if self._plan.times is None else {'time': time}))}\n"
                )
                continue
            lines += self._write(time, channel, number, part, voxels)
        return lines

    def _read(self, time: int, group: range, box: Roi) -> np.ndarray:
        low = self._plan.region[:3]
        roi = [a + o for a, o in zip(box, (*low, *low), strict=True)]
        return self._source.read(time, group, self._plan.num_channels, roi)

    def _write(self, time: int, channel: int, number: int, part: Roi, voxels: np.ndarray) -> list[str]:
        if not voxels.any():
            return [f"empty 0 {number}\n"]
        window = (slice(part[a], part[a + 3]) for a in range(3))
        place: tuple[int | slice, ...] = (*self._plan.leading(time, channel), *window)
        self._arrays[0][place] = voxels
        return []

    def _tile_work(self, level: int) -> Callable[[int], list[str]]:
        factors = self._plan.factors
        z, y, x = (new // old for new, old in zip(factors[level], factors[level - 1], strict=True))
        downsample = downsample_labels if self._plan.is_labels else downsample_image

        def build(tile: int) -> list[str]:
            if self._is_done(level, tile):
                return []
            is_written = build_tile(self._arrays[level - 1], self._arrays[level], (z, y, x), downsample, tile)
            return [] if is_written else [f"empty {level} {tile}\n"]

        return build

    def _tile_number(self, time: int, channel: int, place: Triple) -> int:
        grid = tile_grid(self._arrays[0])
        return int(np.ravel_multi_index((*self._plan.leading(time, channel), *place), grid))

    def _is_done(self, level: int, tile: int) -> bool:
        if (level, tile) in self._empty:
            return True
        array = self._arrays[level]
        place = tuple(int(i) for i in np.unravel_index(tile, tile_grid(array)))
        file = self._folder / self._plan.array_name(level) / array.metadata.encode_chunk_key(place)
        try:
            return file.stat().st_size > 0  # an empty one can be left by a power cut
        except FileNotFoundError:
            return False

    def finish(self) -> int:
        """Name the holes and remove what only an unfinished output has. Returns the number of holes."""
        if self._holes:
            holes = [json.loads(self._holes[tile]) for tile in sorted(self._holes)]
            root = zarr.open_group(self._folder, mode="r+")
            root.attrs[ATTRIBUTE] = self._facts | {"holes": holes}
        (self._folder / LOG).unlink(missing_ok=True)
        (self._folder / STATE).unlink(missing_ok=True)
        return len(self._holes)


def _has_more_than_remains(folder: Path) -> bool:
    """Whether a folder holds anything but what a kill leaves before the first line is written."""
    return any(entry.name != f"{STATE}.new" for entry in folder.iterdir())


def facts_of(output: Path) -> dict[str, Any]:
    """What an output says of itself; nothing if it is not of this package."""
    try:
        facts = zarr.open_group(output, mode="r").attrs.get(ATTRIBUTE, {})
    except (FileNotFoundError, ValueError, OSError):
        return {}
    return dict(facts) if isinstance(facts, dict) else {}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two conversions, as `name: before -> now`."""
    pairs = [(name, found.get(name), wanted.get(name)) for name in sorted(found.keys() | wanted.keys())]
    words = [
        "input" if name == "input" else f"{name}: {before} -> {now}" for name, before, now in pairs if before != now
    ]
    return ", ".join(words)


def _in_parallel(
    threads: ThreadPoolExecutor, num_workers: int, work: Callable[[Any], list[str]], jobs: Iterable[Any]
) -> Iterator[list[str]]:
    """Results as they come, with few jobs waiting, so that an error stops the rest."""
    if num_workers == 1:
        yield from map(work, jobs)
        return
    running: set[Future[list[str]]] = set()
    try:
        for job in jobs:
            running.add(threads.submit(work, job))
            if len(running) >= 2 * num_workers:
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
        yield from (future.result() for future in running)
    finally:
        for future in running:
            future.cancel()
