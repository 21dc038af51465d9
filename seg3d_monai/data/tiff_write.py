"""One volume in memory as an OME-TIFF; the same voxels give the same bytes.

Must not know what the voxels mean.
"""

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile


def write_ome_tiff(
    path: Path, array: np.ndarray, spacing_um: Sequence[float] | None = None, *, compressed: bool = False
) -> None:
    """Write a volume; a file that is there is replaced.

    Args:
        path: NAME.tif; its folder must exist.
        array: [Z, Y, X] or [C, Z, Y, X].
        spacing_um: micrometres per voxel (z, y, x), None when unknown.
        compressed: whether to deflate, as is worthwhile for labels.

    Raises:
        ValueError: the array has another number of axes.
    """
    if array.ndim not in (3, 4):
        raise ValueError(f"array must be [Z, Y, X] or [C, Z, Y, X], not of shape {array.shape}")
    metadata: dict[str, str | float] = {
        # tifffile would write its version and an id made of clock and host.
        "Creator": "seg3d_monai",
        "UUID": str(uuid.UUID(bytes=hashlib.blake2b(array.tobytes(), digest_size=16).digest())),
        "axes": "ZYX" if array.ndim == 3 else "CZYX",
    }
    if spacing_um is not None:
        metadata |= {f"PhysicalSize{axis}": float(size) for axis, size in zip("ZYX", spacing_um, strict=True)}
        metadata |= {f"PhysicalSize{axis}Unit": "µm" for axis in "ZYX"}
    tifffile.imwrite(
        path,
        array,
        ome=True,
        photometric="minisblack",
        compression="zlib" if compressed else None,
        metadata=metadata,
    )
