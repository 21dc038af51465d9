"""Whether a volume's files are still what they were: size and time of every file, and a sample of the voxels.

Size and time are not enough: a synchronising tool may keep both over other voxels, so a few are read each time. Of what
lies behind a URL these few voxels alone are known.

Must not know: manifests, SQLite.
"""

import glob
import hashlib
import os
from math import prod

from seg3d_monai.data.volume import IDENTITY_VOXELS, Roi, Volume

_SAMPLE_BLOCK = (8, 64, 64)

Evidence = dict[str, str | None]
"""{"stat": of the files, None behind a URL, "sample": of a few voxels}; equal as long as nothing has changed."""


def evidence_of(volume: Volume, location: str | os.PathLike[str]) -> Evidence:
    """What a volume is now.

    Args:
        volume: as it was opened.
        location: what it was opened with.
    """
    return {"stat": file_stat(location), "sample": _sample(volume)}


def voxel_digest(volume: Volume) -> str | None:
    """Digest of all voxels, None where there are more than `IDENTITY_VOXELS`."""
    if prod(volume.shape) > IDENTITY_VOXELS:
        return None
    digest: str = volume.identity()["digest"]
    return digest


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
