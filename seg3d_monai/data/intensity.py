"""Intensity normalisation: two percentiles per channel, measured once per volume and used for all of its blocks.

Percentiles because cameras differ in offset and gain and a stack holds a few very bright voxels. It is measured on the
whole volume or a regular sample of it, never on the block at hand, so neighbouring blocks agree.
This file must not know models or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seg3d_monai.data.volume import Roi, Volume, sample_rois, storage_rois

NORMALISED_RANGE = (-1.0, 8.0)


@dataclass(frozen=True)
class Intensity:
    """The grey values that become 0 and 1, per channel.

    Args:
        low: value that becomes 0, one per channel.
        high: value that becomes 1, one per channel, greater than low.

    Raises:
        ValueError: the lengths differ, a value is not finite, or high is not greater than low.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", tuple(float(value) for value in self.low))
        object.__setattr__(self, "high", tuple(float(value) for value in self.high))
        is_sound = len(self.low) == len(self.high) > 0 and all(
            np.isfinite(a) and np.isfinite(b) and a < b for a, b in zip(self.low, self.high, strict=True)
        )
        if not is_sound:
            raise ValueError(f"low={self.low} and high={self.high} must be finite, one per channel, low below high")

    def normalise(self, array: np.ndarray) -> np.ndarray:
        """Map low to 0 and high to 1, clipped to [-1, 8].

        Args:
            array: [C, ...] raw voxels, bool, integer or floating.

        Returns:
            A new float32 array of the same shape.

        Raises:
            ValueError: the number of channels differs.
        """
        array = np.asarray(array)
        if array.ndim == 0 or array.shape[0] != len(self.low):
            raise ValueError(f"array of shape {array.shape} must have {len(self.low)} channels first")
        # float32 holds every integer of 16 bits; wider types would lose their low digits before the subtraction.
        is_narrow = array.dtype.itemsize <= 2 or array.dtype == np.float32
        work: np.ndarray = array.astype(np.float32 if is_narrow else np.float64)
        column = (-1,) + (1,) * (array.ndim - 1)
        low = np.asarray(self.low, dtype=work.dtype).reshape(column)
        span = np.asarray(np.subtract(self.high, self.low), dtype=work.dtype).reshape(column)
        np.subtract(work, low, out=work)
        np.divide(work, span, out=work)
        np.clip(work, *NORMALISED_RANGE, out=work)
        return work.astype(np.float32, copy=False)

    def to_json(self) -> dict[str, list[float]]:
        """The values as lists, for `json.dump`."""
        return {"low": list(self.low), "high": list(self.high)}

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[float]]) -> Intensity:
        """Build from what `to_json` gave.

        Raises:
            ValueError: `low` or `high` is missing or unsound.
        """
        if not {"low", "high"} <= set(values):
            raise ValueError(f"intensity {dict(values)!r} must have the keys low and high")
        return cls(low=tuple(values["low"]), high=tuple(values["high"]))


def measure_intensity(
    volume: Volume, percentiles: tuple[float, float] = (1.0, 99.8), max_voxels: int = 2**24
) -> Intensity:
    """Measure a volume's low and high grey value per channel.

    Args:
        volume: bool, integer or floating voxels.
        percentiles: (low, high) in 0 to 100, low below high.
        max_voxels: a volume of at most this many voxels per channel is measured exactly, a larger one on a regular grid
            of sub-blocks with about as many voxels; the grid depends on the shape alone.

    Returns:
        The percentiles. Where they coincide high is the largest sampled value; where that is no larger low is the
        smallest, and in a constant channel high is low + 1.

    Raises:
        ValueError: a voxel is NaN or infinite, no sampled voxel can be read (damaged chunks alone are left out), or an
            argument is out of range.
    """
    lower, upper = percentiles
    if not 0 <= lower < upper <= 100:
        raise ValueError(f"percentiles={percentiles!r} must be two numbers in 0 to 100, the first below the second")
    if max_voxels < 1:
        raise ValueError(f"max_voxels={max_voxels} must be at least 1")
    parts: list[np.ndarray] = []
    for roi in sample_rois(volume.shape[1:], max_voxels):
        for place, block in _readable_parts(volume, roi):
            check_block(block, place, volume.path)
            parts.append(block.reshape(block.shape[0], -1))
    if not parts:
        raise ValueError(f"{volume.path or 'volume'}: none of the voxels that were sampled can be read; repair it")
    low: list[float] = []
    high: list[float] = []
    for channel in range(volume.shape[0]):
        values = np.concatenate([part[channel] for part in parts])
        if values.dtype == bool:
            values = values.astype(np.uint8)
        elif values.dtype == np.float16:
            values = values.astype(np.float32)  # half precision would round the percentile itself
        first, last = (float(value) for value in np.percentile(values, [lower, upper]))
        if not first < last:
            last = float(values.max())
        if not first < last:
            first = float(values.min())  # nearly all voxels are saturated
        # The step must survive addition to large values: one ulp more than 1 where 1 is lost.
        low.append(first)
        high.append(last if first < last else max(first + 1.0, float(np.nextafter(first, np.inf))))
    return Intensity(low=tuple(low), high=tuple(high))


def _readable_parts(volume: Volume, roi: Roi) -> Iterator[tuple[Roi, np.ndarray]]:
    """A region, or, where it holds damaged chunks, the others."""
    try:
        yield roi, volume.read(roi)
    except ValueError:
        for chunk in storage_rois(volume, max_voxels=1):
            low = [max(a, b) for a, b in zip(chunk[:3], roi[:3], strict=True)]
            high = [min(a, b) for a, b in zip(chunk[3:], roi[3:], strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            piece = (low[0], low[1], low[2], high[0], high[1], high[2])
            try:
                voxels = volume.read(piece)
            except ValueError:
                continue  # whoever needs these voxels will say so
            yield piece, voxels


def check_finite(volume: Volume) -> None:
    """Stream a floating volume once to see that every voxel is a finite number.

    Args:
        volume: integer and bool volumes are not read.

    Raises:
        ValueError: names the first NaN or infinite voxel, in the order of reading.
    """
    if volume.dtype.kind != "f":
        return
    for roi in storage_rois(volume):
        check_block(volume.read(roi), roi, volume.path)


def check_block(block: np.ndarray, roi: Sequence[int], path: str | None) -> None:
    """See that every voxel [C, d, h, w] that was read from `roi` is a finite number.

    Raises:
        ValueError: names the first NaN or infinite voxel.
    """
    if block.dtype.kind != "f":
        return
    finite = np.isfinite(block)
    if not finite.all():
        channel, *place = (int(i) for i in np.unravel_index(int(np.argmin(finite)), block.shape))
        z, y, x = (i + start for i, start in zip(place, roi[:3], strict=True))
        value: Any = block[(channel, *place)]
        raise ValueError(
            f"{path or 'volume'}: voxel (channel {channel}, z {z}, y {y}, x {x}) is {value}; replace NaN and infinite "
            "voxels before use"
        )
