"""Files and folders that may lie on another machine: everything behind a URL goes through fsspec.

https://filesystem-spec.readthedocs.io. The settings of a store (a public bucket, say) are fsspec's own: its
configuration files and environment variables (`FSSPEC_S3_ANON=true`). This file must not know a format.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

Result = TypeVar("Result")


def is_url(path: str | Path) -> bool:
    """Whether a path lies on another machine: `https://...`, `s3://...`."""
    return isinstance(path, str) and "://" in path


def local_or_url(path: str | os.PathLike[str]) -> str:
    """The absolute path of a local file or folder; a URL as it is, `file://` without that."""
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return text.rstrip("/") if is_url(text) else os.path.abspath(text)


def open_binary(path: str | Path) -> BinaryIO:
    """A file for reading, wherever it is.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: the other machine does not answer.
    """
    if not is_url(path):
        return open(path, "rb")
    return ask(str(path), lambda system, place: system.open(place, "rb"))


def file_size(path: str | Path) -> int:
    """Size of a file, wherever it is."""
    if not is_url(path):
        return os.path.getsize(path)
    size = ask(str(path), lambda system, place: system.size(place))
    if size is None:
        raise OSError(f"{path}: the server does not tell the size of this file; download it first")
    return int(size)


def ask(url: str, question: Callable[[Any, str], Result]) -> Result:
    """Ask a remote store something.

    Args:
        url: a file or folder.
        question: called with fsspec's file system and the path in it.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        ImportError: a package for this kind of store is not installed.
        OSError: the store does not answer, or refuses.
    """
    import fsspec

    try:
        return question(*fsspec.core.url_to_fs(url))
    except FileNotFoundError:
        raise FileNotFoundError(f"{url}: no such file or folder") from None
    except ImportError as error:
        raise ImportError(f'{url}: {error}; pip install "seg3d_monai[formats]" brings what https needs') from error
    except ValueError as error:
        if "rotocol" not in str(error):
            raise OSError(f"{url}: cannot be read ({error}); check the address") from error
        raise ValueError(f"{url}: {error}; use https://, s3://, gs:// or a local path") from error
    except Exception as error:
        raise OSError(f"{url}: cannot be reached ({error!r}); check the address and the connection") from error


class Folder:
    """A folder, local or behind a URL.

    Args:
        place: absolute path or URL.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)

    def __str__(self) -> str:
        return self.place

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.place.rstrip('/')}/{name}" if is_url(self.place) else os.path.join(self.place, name))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.place.rstrip("/").rpartition("/")[2]

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.read(name) is not None if is_url(self.place) else os.path.isfile(os.path.join(self.place, name))

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None where it does not exist."""
        try:
            if is_url(self.place):
                return ask(f"{self.place}/{name}", lambda system, place: bytes(system.cat_file(place)))
            return Path(self.place, name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def folders(self) -> list[str]:
        """Names of the folders inside, sorted; none where a remote store cannot list."""
        if not is_url(self.place):
            return sorted(entry.name for entry in os.scandir(self.place) if entry.is_dir())
        try:
            entries = ask(self.place, lambda system, place: system.ls(place, detail=True))
        except OSError:  # many stores answer for single files only
            return []
        # Over http a folder is what ends in a slash.
        paths = [e["name"] for e in entries if e["type"] == "directory" or str(e["name"]).endswith("/")]
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in paths})


class RemoteBytes:
    """The bytes of a remote file by the slice, as a memory map gives those of a local one.

    Args:
        url: the file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._size = file_size(url)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        if stop <= start:
            return b""
        return ask(self._url, lambda system, place: bytes(system.cat_file(place, start=start, end=stop)))

    def __enter__(self) -> RemoteBytes:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def map_bytes(path: str) -> mmap.mmap | RemoteBytes:
    """The bytes of a file by the slice: mapped into memory, or fetched."""
    if is_url(path):
        return RemoteBytes(path)
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
