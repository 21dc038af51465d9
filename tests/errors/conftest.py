"""For tests of mistakes: a folder of inputs made once, and a copy of it for every test to stand in."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from error_toys import changed, listing, write_place, write_results


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and what commands made of them; not to be changed."""
    folder = write_place(tmp_path_factory.mktemp("errors") / "place")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_results(folder)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def copied(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that the tests of a file share."""
    return copy(inputs, tmp_path_factory.mktemp("copied") / "place")


@pytest.fixture
def place(inputs: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the inputs, in which the test stands, and which is made anew where it has changed anything."""
    monkeypatch.chdir(copied)
    yield copied
    if changed(listing(inputs), listing(copied)):
        for path in copied.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy(inputs, copied)


def copy(source: Path, target: Path) -> Path:
    """A folder as it is, times included: an index knows its files by these."""
    return Path(shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True))
