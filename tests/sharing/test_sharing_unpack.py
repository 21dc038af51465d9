"""Zips of strangers: nothing lands outside of the folder, nothing larger than agreed is written."""

import struct
import zipfile
from pathlib import Path

import pytest

from seg3d_monai.sharing.unpack import bundle_within, unpack


def write_zip(path: Path, entries: list[tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name  # the constructor would mend it
            info.compress_type = kind
            archive.writestr(info, content)
    return path


def refused(tmp_path: Path, archive: Path, message: str, **limits: float) -> None:
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        unpack(archive, target, **limits)  # type: ignore[arg-type]
    assert not [path for path in tmp_path.rglob("evil*") if path != archive]


def test_files_and_folders_are_unpacked(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", [("toy/", b""), ("toy/b/c.txt", b"text"), ("toy/a.bin", b"")])
    (tmp_path / "out").mkdir()
    assert unpack(archive, tmp_path / "out") == ["toy/a.bin", "toy/b/c.txt"]
    assert (tmp_path / "out/toy/b/c.txt").read_bytes() == b"text"
    assert (tmp_path / "out/toy/a.bin").read_bytes() == b""


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["/evil.txt"], "absolute path"),
        (["\\evil.txt"], "absolute path"),
        (["\\\\host\\share\\evil.txt"], "absolute path"),
        (["../evil.txt"], "leads out"),
        (["a/../../evil.txt"], "leads out"),
        (["a\\..\\..\\evil.txt"], "leads out"),
        (["a/.."], "leads out"),
        (["C:/evil.txt"], "drive letter"),
        (["c:evil.txt"], "drive letter"),
        (["a\\evil.txt"], "odd name"),
        (["a//evil.txt"], "odd name"),
        (["./evil.txt"], "odd name"),
        (["evil.txt "], "odd name"),
        (["evil\x1b[2J.txt"], "odd name"),
        (["a/evil.txt", "a/evil.txt"], "twice"),
        (["a/evil.txt", "a/EVIL.txt"], "twice"),
        (["a/evil", "a/evil/b"], "twice, as a file and as a folder"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    archive = write_zip(tmp_path / "bad.zip", [("good.txt", b"1"), *((name, b"evil") for name in names)])
    refused(tmp_path, archive, message)
    assert not list((tmp_path / "deep" / "target").iterdir())  # looked at whole before anything is written


@pytest.mark.parametrize(
    ("mode", "message"), [(0o120777, "a link"), (0o020666, "a special file"), (0o010666, "special")]
)
def test_a_link_or_device_is_refused(tmp_path: Path, mode: int, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        info = zipfile.ZipInfo("evil")
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    refused(tmp_path, tmp_path / "bad.zip", message)


def test_more_than_the_stated_size_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "bad.zip", [(f"evil{i}", b"x" * 100) for i in range(11)])
    refused(tmp_path, archive, "unpacks to 1,100 bytes; at most 1,000", most_bytes=1000)


def test_a_zip_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "bad.zip", [("evil", bytes(2**22))], zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 2**14
    refused(tmp_path, archive, "200 times its size")


def test_a_header_that_lies_about_the_size_is_found_while_writing(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "bad.zip", [("evil", bytes(2**22))], zipfile.ZIP_DEFLATED)
    content = archive.read_bytes().replace(struct.pack("<I", 2**22), struct.pack("<I", 10))
    archive.write_bytes(content)
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"zip bomb|damaged"):
        unpack(archive, target)
    assert sum(path.stat().st_size for path in target.rglob("*")) <= 10


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "bad.zip", [(f"evil{i}", b"") for i in range(10_001)])
    refused(tmp_path, archive, "10,001 entries")


def test_an_encrypted_file_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "bad.zip", [("evil", b"x")])
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(bytes(content))
    refused(tmp_path, archive, "encrypted")


def test_what_is_no_zip_or_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip")
    refused(tmp_path, tmp_path / "text.zip", "no zip or is damaged")
    archive = write_zip(tmp_path / "flipped.zip", [("evil", b"good content")])
    archive.write_bytes(archive.read_bytes().replace(b"good content", b"evil content"))
    with pytest.raises(ValueError, match="CRC"):
        unpack(archive, tmp_path / "deep" / "target")


def test_the_bundle_in_an_archive_is_found(tmp_path: Path) -> None:
    (tmp_path / "toy" / "configs").mkdir(parents=True)
    assert bundle_within(tmp_path, "x.zip") == tmp_path / "toy"
    assert bundle_within(tmp_path / "toy", "x.zip") == tmp_path / "toy"
    (tmp_path / "other" / "configs").mkdir(parents=True)
    with pytest.raises(ValueError, match="2 bundles"):
        bundle_within(tmp_path, "x.zip")
    with pytest.raises(ValueError, match="0 bundles"):
        bundle_within(tmp_path / "toy" / "configs", "x.zip")
