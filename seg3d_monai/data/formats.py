"""Which reader serves a path: one file, a folder, a pattern, a list of files, or a URL.

The readers of single formats are imported here only; `volume.py` must not know which there are.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from seg3d_monai.data.bdv import read_bdv_xml
from seg3d_monai.data.czi_volume import CZI_MAGIC, CziArray
from seg3d_monai.data.hdf5_volume import open_hdf5
from seg3d_monai.data.n5_volume import is_n5, open_n5
from seg3d_monai.data.nifti import NiftiArray
from seg3d_monai.data.remote import is_url, local_or_url
from seg3d_monai.data.stored_array import StoredArray
from seg3d_monai.data.tiff import TIFF_SUFFIXES, TiffArray, is_tiff
from seg3d_monai.data.tiff_series import natural_key, open_tiff_files
from seg3d_monai.data.zarr_volume import ZarrArray, is_zarr

SUPPORTED_FORMATS = (
    "TIFF, OME-TIFF, BigTIFF, ImageJ TIFF (a file, a folder, a pattern, a list), Zarr v2 or v3, OME-Zarr 0.4 or 0.5, "
    "NIfTI (.nii, .nii.gz); with the extra `formats` also CZI, Imaris (.ims), BigDataViewer (.xml, .h5, .n5) and N5"
)
HDF5_SUFFIXES = (".ims", ".h5", ".hdf5")

Source = str | tuple[str, ...]
"""An absolute path, a pattern, a URL, or the absolute paths of a list of files."""


def resolve_source(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Source:
    """What to open, in a form that means the same in every working directory.

    Args:
        path: a file, folder, pattern or URL, or a list of TIFF files in their order.

    Raises:
        TypeError: `path` is none of these.
        ValueError: the list is empty.
    """
    if isinstance(path, str | os.PathLike):
        return local_or_url(path)
    if not isinstance(path, Sequence) or not all(isinstance(one, str | os.PathLike) for one in path):
        raise TypeError(f"path={path!r} must be a path, a pattern, a URL, or a list of paths")
    if not path:
        raise ValueError("path is an empty list; name at least one TIFF file")
    return tuple(local_or_url(one) for one in path)


def common_path(source: Source) -> str:
    """One path for a source: itself, the folder of a list's or pattern's files, or a URL."""
    if isinstance(source, tuple):
        return source[0] if len(source) == 1 else os.path.commonpath([os.path.dirname(file) for file in source])
    return os.path.dirname(source[: _first_magic(source)]) if _is_pattern(source) else source


def open_stored(source: Source, level: int | str = 0, scene: int | str | None = None) -> StoredArray:
    """Open an array on disk or behind a URL; only its metadata are read.

    Args:
        source: from `resolve_source`.
        level: pyramid level, as `find_level` takes it.
        scene: which image of a source that holds several.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: the format is not supported, or the data are damaged.
        ImportError: the format needs a package that is not installed.
    """
    if isinstance(source, tuple):
        for file in source:
            _check_file(file)
        return open_tiff_files(source, common_path(source), is_ordered=True, level=level, scene=scene)
    if is_url(source):
        if source.lower().endswith(TIFF_SUFFIXES):
            return TiffArray(source, level, scene)
        if is_zarr(source):
            return ZarrArray(source, level, scene)
        if source.lower().endswith((*HDF5_SUFFIXES, ".czi", ".nii", ".nii.gz", ".n5", ".xml")):
            raise ValueError(f"{source}: this format is not read from another machine; download it first")
        raise FileNotFoundError(f"{source}: no Zarr array or group is there; TIFF and Zarr are read from URLs")
    if _is_pattern(source):
        files = glob.glob(source)
        if not files:
            raise FileNotFoundError(f"{source}: no file has such a name")
        for file in files:
            _check_file(file)
        return open_tiff_files(files, source, is_ordered=False, level=level, scene=scene)
    if not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such file or folder")
    return _open_folder(source, level, scene) if os.path.isdir(source) else _open_file(source, level, scene)


def _open_folder(path: str, level: int | str, scene: int | str | None) -> StoredArray:
    if is_zarr(path):
        return ZarrArray(path, level, scene)
    if is_n5(path):
        return open_n5(path, level, scene)
    files = [entry.path for entry in os.scandir(path) if entry.name.lower().endswith(TIFF_SUFFIXES)]
    files = sorted((file for file in files if not os.path.basename(file).startswith(".")), key=natural_key)
    if files:
        return open_tiff_files(files, path, is_ordered=False, level=level, scene=scene)
    raise ValueError(
        f"{path}: a folder that is no Zarr or N5 array or group and holds no TIFF files; supported: {SUPPORTED_FORMATS}"
    )


def _open_file(path: str, level: int | str, scene: int | str | None) -> StoredArray:
    name = path.lower()
    if name.endswith((".nii", ".nii.gz")):
        return NiftiArray(path, level)
    if name.endswith(TIFF_SUFFIXES) or is_tiff(path):
        return TiffArray(path, level, scene)
    if name.endswith(HDF5_SUFFIXES):
        return open_hdf5(path, level, scene)
    if name.endswith(".czi"):
        return CziArray(path, level, scene)
    if name.endswith(".xml"):
        dataset = read_bdv_xml(path)
        return open_stored(dataset.data, level, scene)
    with open(path, "rb") as file:
        if file.read(len(CZI_MAGIC)) == CZI_MAGIC:
            return CziArray(path, level, scene)
    raise ValueError(f"{path}: this format is not supported; supported: {SUPPORTED_FORMATS}")


def _check_file(path: str) -> None:
    if is_url(path):
        raise ValueError(f"{path}: lists of files must lie on this machine; download them, or give one URL")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if not os.path.isfile(path) or not (path.lower().endswith(TIFF_SUFFIXES) or is_tiff(path)):
        raise ValueError(f"{path}: several files make up one stack only if all are TIFF; give a single path")


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not os.path.exists(path)


def _first_magic(path: str) -> int:
    return min(i for i in (path.find(letter) for letter in "*?[") if i >= 0)
