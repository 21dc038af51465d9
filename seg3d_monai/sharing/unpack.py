"""Zips of strangers, opened so that nothing lands outside of the folder that is meant, nor more than was agreed.

An archive is looked at whole before its first byte is written; sizes are counted again while it is written, as a
header may lie. It must not know what a bundle is.
"""

from __future__ import annotations

import re
import stat
import unicodedata
import zipfile
from pathlib import Path

MOST_BYTES = 8 * 2**30
MOST_FILES = 10_000
MOST_RATIO = 200
"""Of unpacked to packed bytes; weights hardly shrink, configurations about tenfold."""
FREE_BYTES = 2**20
"""Below so many unpacked bytes the ratio does not matter."""
_CHUNK = 2**20


def unpack(archive: Path, folder: Path, *, most_bytes: int = MOST_BYTES, most_ratio: float = MOST_RATIO) -> list[str]:
    """Unpack a zip into a folder.

    Args:
        archive: The zip.
        folder: An empty folder.
        most_bytes: Of all files together, unpacked.
        most_ratio: Of unpacked to packed bytes.

    Returns:
        Names of the files, sorted.

    Raises:
        ValueError: If it is no zip or is damaged; naming an entry that is absolute, on a drive, above the folder, a
            link or other special file, encrypted, there twice, or of an odd name; or if it is larger than allowed.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _checked(archive, opened, most_bytes, most_ratio)
            left = min(most_bytes, max(FREE_BYTES, most_ratio * archive.stat().st_size))
            for info, name in entries:
                left -= _write(opened, info, folder / name, left)
            return sorted(name for _, name in entries)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{str(archive)!r} is no zip or is damaged ({error}); give a bundle's folder or zip"
        ) from error


def _checked(
    archive: Path, opened: zipfile.ZipFile, most_bytes: int, most_ratio: float
) -> list[tuple[zipfile.ZipInfo, str]]:
    """The files of an archive and their names, after every entry was looked at."""
    infos = opened.infolist()
    if len(infos) > MOST_FILES:
        raise ValueError(f"{str(archive)!r} holds {len(infos):,} entries; at most {MOST_FILES:,} are unpacked")
    total = sum(info.file_size for info in infos)
    if total > most_bytes:
        raise ValueError(f"{str(archive)!r} unpacks to {total:,} bytes; at most {most_bytes:,} are unpacked")
    if total > max(FREE_BYTES, most_ratio * archive.stat().st_size):
        raise ValueError(f"{str(archive)!r} unpacks to more than {most_ratio:g} times its size; it may be a zip bomb")
    seen: set[str] = set()
    files = []
    for info in infos:
        name = info.orig_filename
        if fault := _fault(info, name):
            raise ValueError(f"{str(archive)!r} holds {name!r}, {fault}; it is not unpacked")
        if info.is_dir():
            continue
        key = _key(name)
        if key in seen:
            raise ValueError(f"{str(archive)!r} holds {name!r} twice; it is not unpacked")
        seen.add(key)
        files.append((info, name))
    for _, name in files:  # a file in the place of another one's folder
        parts = _key(name).split("/")
        if any("/".join(parts[:depth]) in seen for depth in range(1, len(parts))):
            raise ValueError(f"{str(archive)!r} holds {name!r} twice, as a file and as a folder; it is not unpacked")
    return files


def _fault(info: zipfile.ZipInfo, name: str) -> str | None:
    mode = info.external_attr >> 16
    if name.startswith(("/", "\\")):
        return "an absolute path"
    if re.match(r"[A-Za-z]:", name):
        return "a path with a drive letter"
    parts = name.removesuffix("/").split("/")
    if ".." in re.split(r"[/\\]", name):
        return "a path that leads out of the folder"
    if any(part in ("", ".") or part != part.strip() or part.endswith(".") for part in parts):
        return "an odd name"
    if "\\" in name or ":" in name or not name.isprintable():
        return "an odd name"
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a special file"
    return "which is encrypted" if info.flag_bits & 1 else None


def _key(name: str) -> str:
    """What two names that are one file on some disk have in common."""
    return unicodedata.normalize("NFKC", name).casefold()


def _write(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, left: float) -> int:
    """Write one file of at most so many bytes; returns its size."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with opened.open(info) as source, target.open("xb") as file:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > left or size > info.file_size:
                raise ValueError(
                    f"{info.filename!r} unpacks to more than its archive says or may hold; it is a zip bomb"
                )
            file.write(chunk)
    return size


def bundle_within(folder: Path, shown: str) -> Path:
    """The bundle in an unpacked archive: the folder itself, or the only one that holds configs/.

    Args:
        folder: Where it was unpacked.
        shown: Name of the archive for the error.

    Raises:
        ValueError: If there is none, or several.
    """
    found = [place for place in [folder, *sorted(folder.iterdir())] if (place / "configs").is_dir()]
    if len(found) != 1:
        raise ValueError(f"{shown!r} holds {len(found)} bundles, folders with configs/; give the zip of one")
    return found[0]
