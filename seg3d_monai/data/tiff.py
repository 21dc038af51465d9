"""TIFF, BigTIFF, OME-TIFF and ImageJ stacks, read by the page, strip or tile.

tifffile parses the file (https://github.com/cgohlke/tifffile); the table of where each piece lies is then kept, the
file is closed, and a read opens it, maps it and decodes only the pieces that the region touches. So no descriptor is
held and nothing is shared with a forked process. Of a file on another machine only those pieces are fetched. A file
that ends too early is refused when it is opened.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from seg3d_monai.data.remote import RemoteBytes, file_size, is_url, map_bytes, open_binary
from seg3d_monai.data.stored_array import UNKNOWN_AXIS, StoredArray, StoredLevel, find_level, find_scene, micrometres

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf2", ".tf8")
TIFF_MAGIC = (b"II\x2a\x00", b"MM\x00\x2a", b"II\x2b\x00", b"MM\x00\x2b")
# ImageDescription, offsets and byte counts of strips and tiles: other tags may be odd and the image still be sound.
NEEDED_TAGS = (270, 273, 279, 324, 325)
# By TIFF type number; 0 for types that do not exist.
TAG_VALUE_BYTES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8, 0], dtype=np.uint64)


class TiffStackError(ValueError):
    """A TIFF file that cannot be read as a stack; the message says why and what to do."""


class TiffArray(StoredArray):
    """An image series of a TIFF file at one pyramid level.

    Args:
        path: the file, or its URL.
        level: pyramid level, as `find_level` takes it.
        scene: number or name of the series; None for the first, which in files with several is the image, the others
            being thumbnails and the like.

    Raises:
        ValueError: the file ends too early, lacks planes, is damaged, or has no such level or series.
    """

    def __init__(self, path: str | Path, level: int | str = 0, scene: int | str | None = None) -> None:
        self.location = str(path)
        self.num_bytes = file_size(path)
        check_page_chain(path)
        try:
            with open_binary(path) if is_url(path) else nullcontext(path) as file, tifffile.TiffFile(file) as tif:
                self._parse(tif, level, scene)
        except (TiffStackError, OSError, MemoryError):
            raise
        except Exception as error:
            raise TiffStackError(f"{path}: cannot be read as TIFF ({error}); write the file again") from error

    def _parse(self, tif: tifffile.TiffFile, level: int | str, scene: int | str | None) -> None:
        if not tif.series:
            raise TiffStackError(f"{self.location}: holds no image")
        try:
            number = find_scene(0 if scene is None else scene, [one.name for one in tif.series], self.location)
            series = tif.series[number]
            self.file_spacing_um = _spacing_um(tif, series, number)
            self.levels = _levels(series, self.file_spacing_um)
            self.level = find_level(level, self.levels, self.location)
        except ValueError as error:
            raise TiffStackError(str(error)) from None
        series = series.levels[self.level]
        if series.transform is not None:
            raise TiffStackError(
                f"{self.location}: TIFF of kind {series.kind!r} is not supported; convert it to OME-TIFF"
            )
        self.shape = _full(series)[1]
        keyframe = series.keyframe
        if keyframe.dtype is None:
            raise TiffStackError(f"{self.location}: pixel type of {keyframe.bitspersample} bits is not supported")
        self.dtype = np.dtype(keyframe.dtype).newbyteorder("=")
        self.axes = _axes(series)
        self.spacing_um = {axis: um for axis, um in self.levels[self.level].spacing_um.items() if axis in self.axes}
        self._keyframe = keyframe
        self._page = tuple(int(n) for n in keyframe.shaped)  # separate samples, depth, length, width, samples
        self._file_dtype = np.dtype(keyframe.dtype).newbyteorder(tif.byteorder)
        self._is_raw = self.is_mapped = bool(keyframe.is_contiguous and keyframe.is_final)
        if keyframe.is_tiled:
            self._segment = (int(keyframe.tiledepth), int(keyframe.tilelength), int(keyframe.tilewidth))
        else:
            self._segment = (1, max(1, min(int(keyframe.rowsperstrip), self._page[2])), self._page[3])
        self._locate(series)
        self._split_axes()

    def _locate(self, series: tifffile.TiffPageSeries) -> None:
        """Fill the table of pieces: file, offset and byte count of each [page, segment]."""
        page_bytes = prod(self._page) * self.dtype.itemsize
        num_pages = prod(self.shape) // max(1, prod(self._page))
        start = series.dataoffset
        if start is not None and self._is_raw:
            self._files = [self.location]
            self._page_file = np.zeros(num_pages, dtype=np.int64)
            self._offsets = int(start) + page_bytes * np.arange(num_pages, dtype=np.int64)[:, None]
            self._byte_counts = np.full((num_pages, 1), page_bytes, dtype=np.int64)
        else:
            files: dict[str, int] = {}
            rows: list[tuple[int, np.ndarray, np.ndarray]] = []
            for index in range(num_pages):
                page = series[index] if index < len(series) else None
                if page is None or not page.dataoffsets:
                    raise TiffStackError(
                        f"{self.location}: plane {index} of {num_pages} is missing (the file is truncated, or one of "
                        "its companion files is not there); copy or write it again"
                    )
                name = os.path.join(page.parent.filehandle.dirname, page.parent.filehandle.name)
                if is_url(self.location):
                    name = self.location
                files.setdefault(name, len(files))
                count = 1 if self._is_raw else len(page.dataoffsets)
                offsets = np.array(page.dataoffsets[:count], dtype=np.int64)
                counts = np.array([page_bytes] if self._is_raw else page.databytecounts[:count], dtype=np.int64)
                rows.append((files[name], offsets, counts))
            self._files = list(files)
            self._page_file = np.array([row[0] for row in rows], dtype=np.int64)
            self._offsets = np.stack([row[1] for row in rows])
            self._byte_counts = np.stack([row[2] for row in rows])
        ends = (self._offsets + self._byte_counts).max(axis=1)
        for index, name in enumerate(self._files):
            size = file_size(name)
            pages = np.flatnonzero((self._page_file == index) & (ends > size))
            if pages.size:
                raise TiffStackError(
                    f"{name}: truncated, page {pages[0]} of {num_pages} ends at byte {ends[pages[0]]} and the file has "
                    f"{size}; copy or write it again"
                )

    @property
    def files(self) -> list[str]:
        """The files in which the planes lie."""
        return list(self._files)

    @property
    def least_bytes(self) -> int:
        """Bytes that a file of the same shape must have."""
        return int(self._byte_counts.sum()) if self._is_raw else 1

    def _split_axes(self) -> None:
        """Find which stored axes number the pages and which lie inside a page."""
        inside = [n for n in self._page if n > 1]
        for lead in range(len(self.shape), -1, -1):
            if prod(self.shape[:lead]) == len(self._offsets) and [n for n in self.shape[lead:] if n > 1] == inside:
                self._num_lead = lead
                break
        else:
            raise TiffStackError(
                f"{self.location}: pages of shape {self._page} do not make up an array of shape {self.shape}; "
                "convert it to OME-TIFF"
            )
        pieces = self._page if self._is_raw else (1, *self._segment, self._page[4])
        chunks = iter([piece for piece, n in zip(pieces, self._page, strict=True) if n > 1])
        self.chunks = tuple(
            1 if index < self._num_lead or n == 1 else min(next(chunks), n) for index, n in enumerate(self.shape)
        )

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box, decoding only the pages, strips or tiles that it touches."""
        lead, inside = region[: self._num_lead], region[self._num_lead :]
        extents = tuple(part.stop - part.start for part in region)
        result = np.empty(extents, dtype=self.dtype)
        if result.size == 0:
            return result
        long = iter([part for part, n in zip(inside, self.shape[self._num_lead :], strict=True) if n > 1])
        box = tuple(next(long) if n > 1 else slice(0, 1) for n in self._page)
        flat = result.reshape((prod(extents[: self._num_lead]), *(part.stop - part.start for part in box)))
        with ExitStack() as stack:
            maps: dict[int, mmap.mmap | RemoteBytes] = {}
            for out, index in zip(flat, product(*(range(part.start, part.stop) for part in lead)), strict=True):
                page = int(np.ravel_multi_index(index, self.shape[: self._num_lead])) if index else 0
                file = int(self._page_file[page])
                if file not in maps:
                    maps[file] = map_bytes(self._files[file])
                    stack.enter_context(maps[file])
                try:
                    self._read_page(maps[file], page, box, out)
                except Exception as error:
                    raise TiffStackError(
                        f"{self._files[file]}: page {page} is damaged ({error}); copy or write the file again"
                    ) from error
        return result

    def _read_page(self, data: mmap.mmap | RemoteBytes, page: int, box: tuple[slice, ...], out: np.ndarray) -> None:
        if self._is_raw:
            offset = int(self._offsets[page, 0])
            if offset + int(self._byte_counts[page, 0]) > len(data):
                raise ValueError("the file has become shorter since it was opened")
            out[...] = self._raw(data, offset, box)
            return
        for index in self._segments_in(box):
            segment, place = self._decode(data, page, index)
            target, source = [], []
            for axis, (part, start) in enumerate(zip(box, place, strict=True)):
                extent = self._page[axis] if axis in (0, 4) else self._segment[axis - 1]
                low = max(part.start, start)
                high = min(part.stop, start + (1 if axis == 0 else extent), self._page[axis])
                target.append(slice(low - part.start, high - part.start))
                source.append(slice(low - start, high - start))
            if segment is None:
                out[tuple(target)] = self._keyframe.nodata
            else:
                out[tuple(target)] = segment[tuple(source[1:])]

    def _raw(self, data: mmap.mmap | RemoteBytes, offset: int, box: tuple[slice, ...]) -> np.ndarray:
        """A box of an uncompressed page: a view of the map, or the bytes from its first voxel to its last."""
        if isinstance(data, mmap.mmap):
            return np.ndarray(self._page, dtype=self._file_dtype, buffer=data, offset=offset)[box]
        steps = [prod(self._page[axis + 1 :]) * self.dtype.itemsize for axis in range(5)]
        start = sum(part.start * step for part, step in zip(box, steps, strict=True))
        end = sum((part.stop - 1) * step for part, step in zip(box, steps, strict=True)) + self.dtype.itemsize
        extents = [part.stop - part.start for part in box]
        return np.ndarray(extents, self._file_dtype, data[offset + start : offset + end], strides=steps)

    def _segments_in(self, box: tuple[slice, ...]) -> Iterator[int]:
        counts = [-(-n // size) for n, size in zip(self._page[1:4], self._segment, strict=True)]
        ranges = [
            range(part.start // size, -(-part.stop // size)) for part, size in zip(box[1:4], self._segment, strict=True)
        ]
        for sample, d, h, w in product(range(box[0].start, box[0].stop), *ranges):
            yield ((sample * counts[0] + d) * counts[1] + h) * counts[2] + w

    def _decode(
        self, data: mmap.mmap | RemoteBytes, page: int, index: int
    ) -> tuple[np.ndarray | None, tuple[int, ...]]:
        """Decode one strip or tile: its voxels (None where the file leaves it out) and its place in the page."""
        offset, count = int(self._offsets[page, index]), int(self._byte_counts[page, index])
        encoded: bytes | None = data[offset : offset + count] if count else None
        segment, place, _ = self._keyframe.decode(
            encoded, index, jpegtables=self._keyframe.jpegtables, jpegheader=self._keyframe.jpegheader
        )
        return segment, place


def is_tiff(path: str | Path) -> bool:
    """Whether the first bytes are those of a TIFF or BigTIFF file."""
    with open_binary(path) as file:
        return file.read(4) in TIFF_MAGIC


def check_page_chain(path: str | Path) -> None:
    """Follow the chain of page headers to its end, and see that the tags a reader needs lie inside the file.

    Args:
        path: a TIFF or BigTIFF file.

    Raises:
        TiffStackError: a header or tag lies beyond the end of the file: the file is truncated.
    """
    size = file_size(path)
    with open_binary(path) as file:
        head = file.read(16)
        if len(head) < 8 or head[:4] not in TIFF_MAGIC:
            raise TiffStackError(f"{path}: not a TIFF file, or cut off within its first bytes ({size} bytes in all)")
        order = "<" if head[:2] == b"II" else ">"
        is_big = 43 in (head[2], head[3])
        count_format, offset_format = (order + "Q", order + "Q") if is_big else (order + "H", order + "I")
        word = f"{order}u8" if is_big else f"{order}u4"
        tag_type = np.dtype([("code", f"{order}u2"), ("type", f"{order}u2"), ("count", word), ("value", word)])
        count_bytes, offset_bytes = struct.calcsize(count_format), struct.calcsize(offset_format)
        start = 8 if is_big else 4
        (offset,) = struct.unpack(offset_format, head[start : start + offset_bytes].ljust(offset_bytes, b"\0"))
        seen: set[int] = set()
        while offset and offset not in seen:
            seen.add(offset)
            file.seek(offset)
            raw = file.read(count_bytes)
            end, after = offset, b""
            if len(raw) == count_bytes:
                num_bytes = tag_type.itemsize * struct.unpack(count_format, raw)[0]
                end = offset + count_bytes + num_bytes
                if end < size:
                    tags = np.frombuffer(file.read(num_bytes), dtype=tag_type)
                    after = file.read(offset_bytes)
                    end = max(end, _end_of_values(tags, tag_type["value"].itemsize))
            if len(after) < offset_bytes or end > size:
                raise TiffStackError(
                    f"{path}: truncated, the header of page {len(seen) - 1} at byte {offset} reaches byte {end} and "
                    f"the file has {size}; copy or write it again"
                )
            (offset,) = struct.unpack(offset_format, after)
        if not seen:
            raise TiffStackError(f"{path}: truncated, its table of pages was never written; copy or write it again")


def _end_of_values(tags: np.ndarray, inline_bytes: int) -> int:
    """Where the values end that a page header keeps elsewhere in the file, for the tags that reading needs."""
    sizes = TAG_VALUE_BYTES[np.minimum(tags["type"], len(TAG_VALUE_BYTES) - 1)] * tags["count"].astype(np.uint64)
    ends = (tags["value"].astype(np.uint64) + sizes)[(sizes > inline_bytes) & np.isin(tags["code"], NEEDED_TAGS)]
    return int(ends.max(initial=0))


def _full(series: tifffile.TiffPageSeries) -> tuple[str, tuple[int, ...]]:
    """Axes and shape of a series with those of length 1, which older tifffile leaves out of its attributes."""
    if hasattr(series, "get_axes"):
        axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    else:
        axes, shape = series.axes, series.shape
    return axes, tuple(int(n) for n in shape)


def _axes(series: tifffile.TiffPageSeries) -> str:
    """The series' axis letters; `?` for those that tifffile made up or that the writer left at their default."""
    letters = []
    for letter, extent in zip(*_full(series), strict=True):
        # OME and ImageJ always have a Z; one of length 1 says nothing, and stacks are often saved as time or channels.
        is_default_z = letter == "Z" and extent == 1 and series.kind in ("ome", "imagej")
        letters.append(letter if letter in "TCZYXS" and not is_default_z else UNKNOWN_AXIS)
    return "".join(letters)


def _levels(series: tifffile.TiffPageSeries, spacing_um: dict[str, float]) -> tuple[StoredLevel, ...]:
    """The levels of a series; TIFF gives the voxel size of the finest only, the others' follow from their extents."""
    base = dict(zip(*_full(series), strict=True))
    levels = []
    for index, level in enumerate(series.levels):
        extents = dict(zip(*_full(level), strict=True))
        sizes = {axis: um * base.get(axis, 1) / max(1, extents.get(axis, 1)) for axis, um in spacing_um.items()}
        levels.append(StoredLevel(str(index), sizes))
    return tuple(levels)


def _spacing_um(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries, number: int) -> dict[str, float]:
    """Micrometres per voxel along those of Z, Y, X that the metadata give with a unit."""
    if series.kind == "ome" and tif.ome_metadata:
        return _ome_spacing_um(tif.ome_metadata, number)
    metadata: dict[str, Any] = {}
    if series.kind == "imagej":
        metadata = tif.imagej_metadata or {}
    elif series.kind == "shaped":
        try:
            metadata = json.loads(series.keyframe.description)
        except ValueError:
            metadata = {}
    unit_um = micrometres(str(metadata.get("unit", "")))
    spacing_um: dict[str, float] = {}
    if unit_um is not None and _is_positive(metadata.get("spacing")):
        spacing_um["Z"] = float(metadata["spacing"]) * unit_um
    page = series.keyframe
    in_plane_um = {2: 25400.0, 3: 1e4}.get(int(page.resolutionunit), unit_um)
    if series.kind == "imagej" and unit_um is not None:
        in_plane_um = unit_um  # ImageJ counts pixels per its own unit, whatever the resolution tag says
    for axis, tag in (("Y", "YResolution"), ("X", "XResolution")):
        if in_plane_um is not None and tag in page.tags:
            numerator, denominator = page.tags[tag].value
            if numerator > 0 and denominator > 0:
                spacing_um[axis] = in_plane_um * denominator / numerator
    return spacing_um


def _ome_spacing_um(xml: str, number: int) -> dict[str, float]:
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return {}
    all_pixels = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"]
    if number >= len(all_pixels):
        return {}
    pixels = all_pixels[number]
    spacing_um: dict[str, float] = {}
    for axis in "ZYX":
        size, unit_um = pixels.get(f"PhysicalSize{axis}"), micrometres(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if size is not None and unit_um is not None and _is_positive(size):
            spacing_um[axis] = float(size) * unit_um
    return spacing_um


def _is_positive(value: Any) -> bool:
    try:
        return 0 < float(value) < float("inf")
    except (TypeError, ValueError):
        return False
