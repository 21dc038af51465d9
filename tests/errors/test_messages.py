"""What all commands share: `--debug`, words of the operating system with a mend, files that may be written over.

Elsewhere: words that do not fit a signature, `nearest`, `--help` and `--version`, SEG3D_TRACEBACK, defects that keep
their traceback (tests/test_cli.py); the excepthook of bundle runs (tests/test_user_errors.py).
"""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from error_toys import listing, refusal
from full_disk import FullDisk

from seg3d_monai import cli
from seg3d_monai.cli_arguments import UsageError, file_to_write
from seg3d_monai.user_errors import MENDS, full_disk_names, one_line, print_user_error, write_whole


@pytest.mark.parametrize("place_of_flag", [0, 1, 2, 3])
def test_debug_anywhere_shows_where_a_mistake_arose(
    place_of_flag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "no.tif", "no.zarr"]
    with pytest.raises(FileNotFoundError, match="truth: no file or folder"):
        cli.main([*words[:place_of_flag], "--debug", *words[place_of_flag:]])
    refusal(capsys, words, "truth: no file or folder 'no.tif'")  # the flag is of one command line


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_takes_debug(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--debug", "--help"]) == 0
    assert f"seg3d {command}" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"unknown flag --dbug|unknown flag --debg|missing "):
        cli.main([*command.split(), "--debg", "--debug"])


def test_debug_is_in_the_help_and_is_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["--debug"], ["--debug", "--help"]):
        assert cli.main(words) == 0
        assert "--debug" in capsys.readouterr().out
    refusal(capsys, ["--debgu"], "unknown flag --debgu; did you mean --debug?")


def test_debug_in_a_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "seg3d_monai", "--debug", "evaluat"]
    shown = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
    assert "did you mean evaluate?" in shown.stderr


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("pridict a b", ["unknown command pridict; did you mean predict?"]),
        ("seamcheck a b", ["unknown command seamcheck; did you mean seam-check?"]),
        ("bundle chek a", ["unknown command bundle chek; did you mean bundle check?"]),
        ("annotate sugest a", ["unknown command annotate sugest; did you mean annotate suggest?"]),
        ("bundle pck a", ["did you mean bundle pack?"]),
        ("anotate suggest a", ["unknown command anotate"]),
        ("--hlp", ["unknown flag --hlp; did you mean --help?"]),
        ("doctor x", ["doctor: unexpected argument 'x'; this command takes no positional argument"]),
        ("doctor --gpu", ["doctor: unknown flag --gpu"]),
    ],
)
def test_misspelt_commands(words: str, fragments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refusal(capsys, words.split(), *fragments)


@pytest.mark.parametrize("code", sorted(MENDS))
def test_an_error_of_the_operating_system_names_the_file_and_the_mend(code: int) -> None:
    line = one_line(OSError(code, os.strerror(code), "stack.tif"))
    assert line == f"{os.strerror(code)}: stack.tif; {MENDS[code]}"


def test_an_error_without_a_mend_or_with_its_own() -> None:
    assert one_line(OSError(errno.EBUSY, "Device or resource busy", "a")) == "Device or resource busy: a"
    assert one_line(OSError(errno.ENOSPC, "full; empty the bin", "a")) == "full; empty the bin: a"
    assert one_line(OSError(errno.ENOSPC, "No space")) == f"No space; {MENDS[errno.ENOSPC]}"
    assert one_line(OSError("a text of its own; and a mend")) == "a text of its own; and a mend"


def test_a_full_disk_is_told_the_same_way_by_a_bundle_run(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "out.zarr")
    print_user_error(type(error), error, None)
    assert capsys.readouterr().err == f"OSError: No space left on device: out.zarr; {MENDS[errno.ENOSPC]}\n"


def raised_within(path: str, error: Exception, cause: Exception | None = None) -> Exception:
    with pytest.raises(type(error)) as caught, full_disk_names(path):
        raise error from cause
    return caught.value


def test_only_a_full_disk_without_a_name_is_named() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = raised_within("out.zarr", RuntimeError("MONAI"), full)
    assert wrapped.__cause__ is full
    assert full.filename == "out.zarr"
    assert full is raised_within("another", full)
    assert full.filename == "out.zarr"
    other = OSError(errno.EIO, "Input/output error")  # perhaps of the input
    raised_within("out.zarr", other)
    assert other.filename is None
    raised_within("out.zarr", ValueError("axes"))
    raised_within("out.zarr", RuntimeError("a defect"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "numbers.json"
    write_whole(target, "old")
    before = listing(tmp_path)
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, tmp_path)
        with pytest.raises(OSError, match="No space left") as caught:
            write_whole(target, "new")
        assert disk.failures == 1
    assert caught.value.filename == str(target)
    assert listing(tmp_path) == before
    write_whole(target, "new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_the_full_disk_of_these_tests_lets_through_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, tmp_path, room=5)
    (tmp_path / "a").write_text("four")
    assert (tmp_path / "a").read_text() == "four"
    with pytest.raises(OSError, match="No space left"):
        (tmp_path / "b").write_bytes(b"two")
    with io.open(os.devnull, "w") as elsewhere:  # noqa: UP020 - what pathlib calls
        elsewhere.write("as much as you like")


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("image.tif", UsageError, "--json is 'image.tif'; give a name that ends in .json"),
        ("noending", UsageError, "give a name that ends in .json"),
        ("no/x.json", FileNotFoundError, "--json 'no/x.json': its folder does not exist; make it first"),
        ("folder.json", UsageError, "--json 'folder.json' is a folder; give the name of a file"),
    ],
)
def test_files_that_nobody_can_mean(
    path: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(kind) as caught:
        file_to_write("--json", path, ".json")
    assert message in str(caught.value)
    assert file_to_write("--json", "X.JSON", ".json") == Path("X.JSON")
