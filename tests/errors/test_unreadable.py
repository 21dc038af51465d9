"""Files that may not be read, and folders that may not be written to, for every kind of input and output.

The tests may run as root, whom permissions do not stop: so Python's `open` and what makes files and folders refuse what
is named here, as the operating system does. A folder in the place of a file is in the tables of the other files.
"""

import builtins
import errno
import io
import os
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from error_toys import BUNDLE, GRID, PREDICT, SPACING, SUGGEST, TRAIN, TUNE, refused_in, with_changes

from seg3d_monai import cli

Capsys = pytest.CaptureFixture[str]
MEND = "check its permissions, or choose another"


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No file of this name can be opened, and nothing can be made in a folder of this name."""
    opened, made, descriptor = io.open, os.mkdir, os.open

    def check(path: Any, *, is_new: bool) -> None:
        is_path = isinstance(path, str | bytes | os.PathLike)
        parts = Path(os.fsdecode(path)).absolute().parts if is_path else ()
        if name in (parts[:-1] if is_new else parts):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fsdecode(path))

    def open_(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        check(file, is_new=False)
        return opened(file, mode, *args, **options)

    def mkdir(path: Any, *args: Any, **options: Any) -> None:
        check(path, is_new=True)
        made(path, *args, **options)

    def os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        check(path, is_new=False)
        return descriptor(path, flags, *args, **options)

    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr(io, "open", open_)
    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "open", os_open)


READ = [
    (["convert", "image.tif", "x.zarr"], "image.tif"),
    (["match", "cube.tif", "own.json", "--spacing", "[2,1,1]"], "cube.tif"),
    (["match", "cube.tif", "own.json", "--spacing", "[2,1,1]", "--start", "list.json"], "list.json"),
    (["synth", "out", "--recipe", "list.json"], "list.json"),
    (["index", "data/manifest.csv", "x.sqlite"], "manifest.csv"),
    (["index", "data/manifest.csv", "x.sqlite", "--num_workers", "1"], "labels.tif"),
    (["predict", "image.tif", "x.zarr", *PREDICT, *GRID, "--spacing", SPACING], "image.tif"),
    (["predict", "image.tif", "x.zarr", *with_changes(PREDICT, "--overlay", "list.json"), *GRID], "list.json"),
    (["seam-check", "image.tif", "s.json", *PREDICT, *GRID], "image.tif"),
    (["measure", "out.zarr", "image.tif"], "image.tif"),
    (["measure", "out.zarr", "image.tif", "--atlas", "labels.tif"], "labels.tif"),
    (["evaluate", "labels.tif", "out.zarr"], "labels.tif"),
    (["report", "out.zarr", "--image", "image.tif"], "image.tif"),
    (["train", BUNDLE, "--overlay", "list.json", "--output_dir", "new"], "list.json"),
    (["annotate", "import", "regions", "data/manifest.csv"], "task.json"),
    (["bundle", "pack", "toy", "x.zip", "--overlay", "list.json"], "list.json"),
    (["bundle", "check", "toy", "--schema", "list.json"], "list.json"),
]


@pytest.mark.parametrize(("words", "name"), READ, ids=[f"{words[0]} {name}" for words, name in READ])
def test_a_file_that_may_not_be_read(
    words: list[str], name: str, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "main", with_forbidden(name))
    line = refused_in(place, capsys, words, "ermission denied")
    assert name in line


def with_forbidden(name: str) -> Callable[[list[str]], int]:
    """The command line while a name is forbidden; what the test itself reads is not."""
    main = cli.main

    def run(words: list[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            forbid(patch, name)
            return main(words)

    return run


WEIGHTS = [
    ["predict", "image.tif", "x.zarr", *PREDICT, *GRID],
    [*SUGGEST, "--output", "new"],
    [*TRAIN, "--initial_weights", "model.pt"],
]


@pytest.mark.parametrize("words", WEIGHTS, ids=[words[0] for words in WEIGHTS])
def test_weights_that_may_not_be_read(
    words: list[str], place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "main", with_forbidden("model.pt"))
    line = refused_in(place, capsys, words, "model.pt")
    assert "ermission denied" in line


WRITTEN = [
    (["synth", "folder/out"], "folder"),
    (["convert", "image.tif", "folder/x.zarr"], "folder"),
    (["match", "cube.tif", "folder/o.json", "--spacing", "[2,1,1]", "--rounds", "1", "--num_scenes", "12"], "folder"),
    (["plan", "crops.sqlite", "--output", "folder/plan", "--bundle", "maskrcnn3d"], "folder"),
    (["evaluate", "labels.tif", "out.zarr", "--json", "folder/n.json"], "folder"),
    (["report", "out.zarr", "folder/page.html", "--image", "image.tif"], "folder"),
    (["measure", "out.zarr", "image.tif", "--table", "folder/m.csv"], "folder"),
    (["predict", "image.tif", "folder/x.zarr", *PREDICT, *GRID], "folder"),
    (["seam-check", "image.tif", "folder/s.json", *PREDICT, *GRID], "folder"),
    ([*SUGGEST, "--output", "folder/new"], "folder"),
    (["bundle", "pack", "toy", "folder/x.zip"], "folder"),
    (with_changes(TRAIN, "--output_dir", "folder/new"), "folder"),
    (with_changes(TUNE, "--output_dir", "folder/new"), "folder"),
]


@pytest.mark.parametrize(("words", "name"), WRITTEN, ids=[words[0] for words, _ in WRITTEN])
def test_a_folder_that_may_not_be_written_to(
    words: list[str], name: str, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", forbidden_file)
    monkeypatch.setattr(cli, "main", with_forbidden(name))
    line = refused_in(place, capsys, words, "folder")
    assert "ermission denied" in line or "cannot be written" in line
    assert MEND in line or "choose a" in line


def forbidden_file(*_: Any, **options: Any) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(options.get("dir")))


@pytest.mark.parametrize("command", ["index", "predict", "relabel"])
def test_a_database_that_may_not_be_opened(
    command: str, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "index": ["index", "data/manifest.csv", "folder/x.sqlite", "--num_workers", "1"],
        "predict": ["predict", "image.tif", "folder/x.zarr", *PREDICT, *GRID],
        "relabel": ["relabel", "out.zarr", "--min_volume", "3"],
    }
    connect = sqlite3.connect

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if "folder" in str(path) or "out.journal" in str(path):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(path, *args, **options)

    monkeypatch.setattr(sqlite3, "connect", refuse)
    line = refused_in(place, capsys, words[command], ".sqlite")
    assert "cannot be written to (unable to open database file); check the permissions of the file" in line
