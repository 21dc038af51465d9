"""Labels of an OME-Zarr as one OME-TIFF, plane by plane."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from tqdm import tqdm

from seg3d_monai.inference.writer import LABELS

_NO_UUID = uuid.UUID(int=0)
_READ_AT_A_TIME = 2**28
"""Bytes of whole planes; as many as a chunk is deep would be as large as a stack is wide."""


def write_label_tiff(source: Path, path: Path, *, spacing_um: Sequence[float] | None, progress: bool = False) -> None:
    """Write `labels/instances/0` as a compressed BigTIFF with OME metadata, whole or not at all.

    Args:
        source: the OME-Zarr.
        path: the TIFF.
        spacing_um: (z, y, x) micrometer per voxel, or None.
        progress: show a progress bar.
    """
    labels: zarr.Array[Any] = zarr.open_array(source, path=f"{LABELS}/0", mode="r")
    plane_bytes = labels.dtype.itemsize * labels.shape[-2] * labels.shape[-1]
    depth = max(1, min(labels.chunks[-3], _READ_AT_A_TIME // plane_bytes))

    def planes() -> Iterator[NDArray[Any]]:
        with tqdm(total=int(np.prod(labels.shape[:-2])), desc="TIFF", unit="plane", disable=not progress) as bar:
            for time in np.ndindex(*labels.shape[:-3]):
                for z in range(0, labels.shape[-3], depth):
                    slab = np.asarray(labels[(*time, slice(z, z + depth))])
                    for plane in slab:
                        yield plane
                        bar.update()

    metadata: dict[str, Any] = {"axes": "TZYX"[-labels.ndim :], "UUID": f"urn:uuid:{_NO_UUID}"}
    if spacing_um is not None:
        for axis, spacing in zip("ZYX", spacing_um, strict=True):
            metadata |= {f"PhysicalSize{axis}": float(spacing), f"PhysicalSize{axis}Unit": "µm"}
    partial = path.with_name(path.name + ".partial")
    tifffile.imwrite(
        partial,
        planes(),
        shape=labels.shape,
        dtype=labels.dtype,
        bigtiff=True,
        ome=True,
        compression="zlib",
        metadata=metadata,
        software="seg3d_monai",
    )
    _set_uuid(partial)
    partial.replace(path)


def _set_uuid(path: Path) -> None:
    """Name a TIFF by its bytes; tifffile would use the time and the host."""
    with path.open("rb") as file:
        name = uuid.uuid5(_NO_UUID, hashlib.file_digest(file, "sha256").hexdigest())
    with tifffile.TiffFile(path) as tiff:
        description = tiff.ome_metadata
    assert description is not None
    tifffile.tiffcomment(path, description.replace(str(_NO_UUID), str(name)).encode())
