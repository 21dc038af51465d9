"""Conversions that are killed (SIGKILL) at chosen moments and go on: the same bytes as of one that was never killed.

A forked child kills itself inside the write of a file, so a moment is a number and a place, not a time.
"""

import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import tifffile
import zarr
from convert_toys import SMALL, digest

from seg3d_monai.data import convert_files
from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.volume import open_volume

SHAPE = (11, 300, 270)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(input, options, files and hashes of an undisturbed output) for an image with empty parts."""
    folder = tmp_path_factory.mktemp("kill")
    image = np.random.default_rng(3).integers(1, 60000, SHAPE).astype(np.uint16)
    image[:, :140, :200] = 0
    source = folder / "in.tif"
    tifffile.imwrite(source, image, photometric="minisblack", compression="zlib")
    options = {**SMALL, "spacing": (2.0, 0.5, 0.5)}
    convert_volume(source, folder / "whole.zarr", **options)
    return source, options, digest(folder / "whole.zarr")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(countdown, place):
    """Dies at the countdown-th file: before it, with half of it in its unnamed file, or once it has its name."""
    original = zarr.storage._local._put

    def put(path, value, exclusive=False):
        nonlocal countdown
        countdown -= 1
        if countdown < 0 and place == "before":
            die()
        if countdown < 0 and place == "within":
            path.parent.mkdir(parents=True, exist_ok=True)
            content = bytes(value.as_buffer_like())
            path.with_suffix(".0123.partial").write_bytes(content[: len(content) // 2])
            die()
        result = original(path, value, exclusive)
        if countdown < 0:
            die()
        return result

    zarr.storage._local._put = put


def killed_at_the_end(step):
    """Dies once everything is written: before, between and after the last steps."""
    if step == "log":
        original = convert_files.FileWriter.finish
        convert_files.FileWriter.finish = lambda self: die() or original(self)
    if step == "state":
        unlink = convert_files.Path.unlink

        def removed(self, missing_ok=False):
            unlink(self, missing_ok=missing_ok)
            if self.name == convert_files.LOG:
                die()

        convert_files.Path.unlink = removed
    if step == "rename":
        convert_files.Path.rename = lambda self, target: (
            die() if self.suffix == ".partial" else os.replace(self, target)
        )


def run_and_die(source, output, options, prepare, *arguments):
    """Whether a child that converts was killed; else it has finished."""

    def child():
        prepare(*arguments)
        convert_volume(source, output, **options)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


@pytest.mark.parametrize("place", ["before", "within", "after"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_killed_at_every_few_files_until_it_is_finished(tmp_path, case, place, num_workers):
    source, options, expected = case
    output = tmp_path / "out.zarr"
    kills = 0
    # Each life writes a few files more than the one before, or it would end at the same file for ever.
    while run_and_die(source, output, {**options, "num_workers": num_workers}, killed_while_writing, 3 + kills, place):
        kills += 1
        assert not output.exists()
        assert kills < 40
        with pytest.raises(ValueError, match="unfinished"):
            open_volume(tmp_path / "out.zarr.partial")
    assert kills >= 4
    assert digest(output) == expected
    assert os.listdir(tmp_path) == ["out.zarr"]


@pytest.mark.parametrize("moment", [0, 1, 2, 4, 5, 8, 13])
def test_killed_once(tmp_path, case, moment):
    source, options, expected = case
    assert run_and_die(source, tmp_path / "out.zarr", options, killed_while_writing, moment, "within")
    assert convert_volume(source, tmp_path / "out.zarr", **options).is_new
    assert digest(tmp_path / "out.zarr") == expected


@pytest.mark.parametrize("step", ["log", "state", "rename"])
def test_killed_at_the_end(tmp_path, case, step):
    source, options, expected = case
    output = tmp_path / "out.zarr"
    assert run_and_die(source, output, options, killed_at_the_end, step)
    assert not output.exists()
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr.partial").rglob("c/**/*") if path.is_file()
    }
    assert convert_volume(source, output, **options).is_new
    assert digest(output) == expected
    # Nothing was written twice.
    after = {path: path.stat().st_mtime_ns for path in output.rglob("c/**/*") if path.is_file()}
    assert sorted(before.values()) == sorted(after.values())


def test_what_was_begun_with_other_options_or_another_input_is_refused(tmp_path, case):
    source, options, expected = case
    output = tmp_path / "out.zarr"
    assert run_and_die(source, output, options, killed_while_writing, 6, "after")
    with pytest.raises(ValueError, match=r"begun with another input or other options \(spacing_um: \[2.0, 0.5, 0.5\]"):
        convert_volume(source, output, **{**options, "spacing": (1, 1, 1)})
    other = tmp_path / "other.tif"
    shutil.copy(source, other)
    tifffile.imwrite(other, tifffile.imread(source) + 1, photometric="minisblack")
    with pytest.raises(ValueError, match=r"begun with another input or other options \(input"):
        convert_volume(other, output, **options)
    # A copy under another name is the same input.
    shutil.copy(source, other)
    convert_volume(other, output, **options)
    assert digest(output) == expected
    other.unlink()
    assert run_and_die(source, tmp_path / "two.zarr", options, killed_while_writing, 6, "after")
    convert_volume(source, tmp_path / "two.zarr", restart=True, **{**options, "spacing": (1, 1, 1)})
    assert open_volume(tmp_path / "two.zarr").spacing_um == (1.0, 1.0, 1.0)


def test_a_torn_line_of_the_log_and_an_empty_file_are_made_again(tmp_path, case):
    source, options, expected = case
    output, partial = tmp_path / "out.zarr", tmp_path / "out.zarr.partial"
    assert run_and_die(source, output, options, killed_at_the_end, "log")
    log = partial / convert_files.LOG
    lines = log.read_bytes()
    assert lines.count(b"\n") >= 2  # the empty parts of both levels
    log.write_bytes(lines[:-3])
    file = next(path for path in partial.rglob("c/**/*") if path.is_file())
    file.write_bytes(b"")  # as a power cut can leave it
    convert_volume(source, output, **options)
    assert digest(output) == expected
