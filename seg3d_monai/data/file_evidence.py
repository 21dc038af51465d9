"""Whether a volume's files are still what they were: size and time of every file, and a sample of the voxels.

Size and time are not enough: a copy has others with the same voxels, and a synchronising tool may keep both over other
voxels. A few voxels are read each time; all of them, up to `IDENTITY_VOXELS`, where the times speak of a change. Of
what lies behind a URL the few voxels alone are known.

Must not know: manifests, SQLite.
"""

import glob
import hashlib
import os
from collections.abc import Mapping
from math import prod
from typing import Any

from seg3d_monai.data.volume import IDENTITY_VOXELS, Roi, Volume

_SAMPLE_BLOCK = (8, 64, 64)

Evidence = dict[str, Any]
"""{"stat": of the files or None, "sample": of a few voxels, "voxels": of all of them or None}."""


def quick_evidence(volume: Volume, location: str | os.PathLike[str]) -> Evidence:
    """What can be said at once; "voxels" is None. The location is what the volume was opened with."""
    return {"stat": file_stat(location), "sample": _sample(volume), "voxels": None}


def full_evidence(volume: Volume, location: str | os.PathLike[str]) -> Evidence:
    """With all voxels where there are no more than `IDENTITY_VOXELS`."""
    return {**quick_evidence(volume, location), "voxels": voxel_digest(volume)}


def voxel_digest(volume: Volume) -> str | None:
    """Digest of all voxels, None where there are more than `IDENTITY_VOXELS`."""
    if prod(volume.shape) > IDENTITY_VOXELS:
        return None
    digest: str = volume.identity()["digest"]
    return digest


def is_unchanged(volume: Volume, found: Evidence, known: Mapping[str, Any] | None) -> bool:
    """Whether a volume is what it was.

    Args:
        volume: as it is now.
        found: its `quick_evidence`.
        known: its `full_evidence` of another time, None if there was no such volume.
    """
    if known is None or found["sample"] != known["sample"]:
        return False
    if found["stat"] == known["stat"]:
        return True
    return known["voxels"] is not None and voxel_digest(volume) == known["voxels"]


def file_stat(location: str | os.PathLike[str]) -> str | None:
    """Digest of the sizes and times of all files of a volume, None for a URL."""
    path = os.fspath(location)
    if "://" in path:
        return None
    if os.path.isdir(path):
        files = _files_below(path)
    else:
        files = [path] if os.path.exists(path) else glob.glob(path)
    digest = hashlib.blake2b(digest_size=16)
    for place in sorted(files):
        found = os.stat(place)
        digest.update(f"{os.path.relpath(place, os.path.dirname(path))} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files_below(folder: str) -> list[str]:
    return [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]


def is_constant(volume: Volume) -> bool:
    """Whether the sampled blocks hold one value only: such volumes are alike without being the same."""
    blocks = [volume.read(roi) for roi in _sample_rois(volume)]
    return len({value for block in blocks for value in (block.min(), block.max())}) <= 1


def _sample(volume: Volume) -> str:
    digest = hashlib.blake2b(f"{volume.shape} {volume.dtype}".encode(), digest_size=16)
    for roi in _sample_rois(volume):
        try:
            digest.update(volume.read(roi).tobytes())
        except ValueError:  # damaged; whoever needs these voxels will say so
            digest.update(b"unreadable")
    return digest.hexdigest()


def _sample_rois(volume: Volume) -> list[Roi]:
    """Three blocks on the diagonal."""
    rois: list[Roi] = []
    for part in (1, 3, 5):
        spans = [
            (max(0, part * n // 6 - b // 2), min(part * n // 6 + b // 2, n))
            for n, b in zip(volume.shape[1:], _SAMPLE_BLOCK, strict=True)
        ]
        (z1, z2), (y1, y2), (x1, x2) = spans
        rois.append((z1, y1, x1, z2, y2, x2))
    return rois
