"""A disk that fills up: what is written below a folder fails after some bytes, as the operating system fails it."""

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest


class FullDisk:
    """Python's own files below a folder can be written until so many bytes are taken; then ENOSPC, without a name.

    What C code opens by itself (SQLite, Arrow's Parquet) is not reached.

    Args:
        monkeypatch: takes it back.
        folder: what lies elsewhere is left alone.
        room: bytes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, room: int = 0) -> None:
        self.room = room
        self.failures = 0
        self._folder = str(folder.resolve())
        self._open = io.open
        monkeypatch.setattr(builtins, "open", self._opened)
        monkeypatch.setattr(io, "open", self._opened)

    def take(self, size: int) -> None:
        """Use some of the room."""
        if size > self.room:
            self.failures += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= size

    def _opened(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        opened = self._open(file, mode, *args, **options)
        is_path = isinstance(file, str | bytes | os.PathLike)
        if not is_path or not set(mode) & set("wxa+"):
            return opened
        inside = os.path.abspath(os.fsdecode(file)).startswith(self._folder + os.sep)
        return _Limited(opened, self) if inside else opened


class _Limited:
    """An open file whose writes take room."""

    def __init__(self, file: Any, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, content: Any) -> int:
        self._disk.take(len(content) if isinstance(content, str) else memoryview(content).nbytes)
        written: int = self._file.write(content)
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> "_Limited":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
