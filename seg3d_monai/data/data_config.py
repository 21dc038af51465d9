"""What decides how volumes are cut into crops and which instances count: kept as JSON inside the index.

Must not know: files, SQLite, torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

Triple = tuple[int, int, int]

_LONGEST = 2**16 - 1  # voxels along an axis of a crop: boxes within crops are stored in 16 bits


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a crop index is made.

    Args:
        crop_size: extent of a crop, (z, y, x) voxels; clipped where a volume is smaller.
        stride: step of the grid of crops, (z, y, x) voxels, at most the crop size; half of it by default.
        overlap: voxels (z, y, x) that neighbouring crops share, another way to say `stride`; give one of the two.
        min_voxels: visible voxels below which a truncated instance is a fragment and does not count.
        min_object_voxels: voxels below which an instance does not count in any crop, such as debris; 0 counts all.
        percentiles: of the intensity, mapped to 0 and 1 by the normalisation.
        where: filter over the columns of the manifest; volumes that do not match are not in the index. None takes all.

    Raises:
        ValueError: for numbers that make no sense, and for `stride` and `overlap` at once.
        TypeError: for sizes that are no sequences of integers.
    """

    crop_size: Triple = (32, 64, 64)
    stride: Triple | None = None
    overlap: Triple | None = None
    min_voxels: int = 20
    min_object_voxels: int = 0
    percentiles: tuple[float, float] = (1.0, 99.8)
    where: str | None = None

    def __post_init__(self) -> None:
        crop = _triple(self.crop_size, "crop_size", 1)
        if max(crop) > _LONGEST or prod(crop) >= 2**32:
            raise ValueError(f"crop_size={crop} is too large; use at most {_LONGEST} voxels an axis, 2**32 in all")
        if self.stride is not None and self.overlap is not None:
            raise ValueError(f"stride={self.stride} and overlap={self.overlap} say the same thing; give one of them")
        if self.overlap is not None:
            overlap = _triple(self.overlap, "overlap", 0)
            if any(o >= c for o, c in zip(overlap, crop, strict=True)):
                raise ValueError(f"overlap={overlap} is not smaller than crop_size={crop}; crops would not advance")
            stride = _minus(crop, overlap)
        elif self.stride is not None:
            stride = _triple(self.stride, "stride", 1)
        else:
            stride = (max(1, crop[0] // 2), max(1, crop[1] // 2), max(1, crop[2] // 2))
        if any(s > c for s, c in zip(stride, crop, strict=True)):
            raise ValueError(f"stride={stride} is larger than crop_size={crop}; voxels in between would be in no crop")
        for name in ("min_voxels", "min_object_voxels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; use 0 to count every instance")
        lower, upper = (float(p) for p in self.percentiles)
        if not 0 <= lower < upper <= 100:
            raise ValueError(f"percentiles={self.percentiles} must be two of 0 to 100, the first below the second")
        where = self.where.strip() if self.where else ""
        values: dict[str, Any] = {"crop_size": crop, "stride": stride, "overlap": None, "percentiles": (lower, upper)}
        values |= {"min_voxels": int(self.min_voxels), "min_object_voxels": int(self.min_object_voxels)}
        for name, value in {**values, "where": where or None}.items():
            object.__setattr__(self, name, value)

    @property
    def step(self) -> Triple:
        """The stride, whichever way it was given."""
        assert self.stride is not None
        return self.stride

    def to_json(self) -> dict[str, Any]:
        """The values, for `json.dump`; two configurations that index alike give the same."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del values["overlap"]  # has become the stride
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataConfig":
        """Build from what `to_json` gave.

        Raises:
            ValueError: for a key that does not exist, and as the constructor.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such key of a DataConfig")
        keys: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**keys)


def _triple(value: Sequence[int], name: str, least: int) -> Triple:
    try:
        z, y, x = (int(n) for n in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not three voxel counts; give (z, y, x)") from None
    if min(z, y, x) < least:
        raise ValueError(f"{name}={value!r} is not three voxel counts of at least {least}; give (z, y, x)")
    return z, y, x


def _minus(a: Triple, b: Triple) -> Triple:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]
