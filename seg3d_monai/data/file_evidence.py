"""Whether a volume's files are still what they were: size and time of every file, and a sample of the voxels.

Size and time are not enough: a copy has others with the same voxels, and a synchronising tool may keep both over other
voxels. A few voxels are read each time; all of them, up to `IDENTITY_VOXELS`, where the times speak of a change.

Must not know: manifests, SQLite.
"""

import hashlib
import os
from collections.abc import Mapping
from math import prod
from typing import Any

from seg3d_monai.data.volume import IDENTITY_VOXELS, Roi, Volume

_SAMPLE_BLOCK = (8, 64, 64)

Evidence = dict[str, Any]
"""{"stat": of the files or None, "sample": of a few voxels, "voxels": of all of them or None}."""


def quick_evidence(volume: Volume) -> Evidence:
    """What can be said at once; "voxels" is None."""
    return {"stat": file_stat(volume), "sample": _sample(volume), "voxels": None}


def full_evidence(volume: Volume) -> Evidence:
    """With all voxels where there are no more than `IDENTITY_VOXELS`."""
    evidence = quick_evidence(volume)
    if prod(volume.shape) <= IDENTITY_VOXELS:
        evidence["voxels"] = volume.identity()["digest"]
    return evidence


def is_unchanged(volume: Volume, found: Evidence, known: Mapping[str, Any] | None) -> bool:
    """Whether a volume is what it was.

    Args:
        volume: as it is now.
        found: its `quick_evidence`.
        known: its `full_evidence` of another time, None if there was no such volume.
    """
    if known is None or found["sample"] != known["sample"]:
        return False
    if found["stat"] is not None and found["stat"] == known["stat"]:
        return True
    return known["voxels"] is not None and full_evidence(volume)["voxels"] == known["voxels"]


def file_stat(volume: Volume) -> str | None:
    """Digest of the sizes and times of all files of a volume, None where they are not files on this machine."""
    path = volume.path
    if path is None or not os.path.exists(path):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for place in [path] if os.path.isfile(path) else sorted(_files_below(path)):
        found = os.stat(place)
        digest.update(f"{os.path.relpath(place, path)} {found.st_size} {found.st_mtime_ns}\n".encode())
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
