"""How blocks are divided into commands, on blocks written for it."""

from pathlib import Path

import pytest
from doc_blocks import Piece, split_commands, write_files

BLOCK = """\
# first
A=1 seg3d train maskrcnn3d --overlay one \\
    --crop_size "[1, 2]"   # as long as it takes
cd there && seg3d report RUN | head
seg3d doctor
# elsewhere
seg3d predict 'a b' --index#where "x == 'y'"
"""


def test_a_block_is_divided() -> None:
    found = list(split_commands(Piece("page.md", 10, BLOCK)))
    assert [(piece.line, piece.folder, piece.words) for piece in found] == [
        (11, "", ("seg3d", "train", "maskrcnn3d", "--overlay", "one", "--crop_size", "[1, 2]")),
        (13, "there", ("seg3d", "report", "RUN")),
        (13, "there", ("head",)),
        (14, "there", ("seg3d", "doctor")),
        (16, "", ("seg3d", "predict", "a b", "--index#where", "x == 'y'")),
    ]
    assert [piece.settings for piece in found] == [("A=1",), (), (), (), ()]


@pytest.mark.parametrize("text", ["", "# only this\n", "\n\n"])
def test_a_block_may_hold_no_command(text: str) -> None:
    assert list(split_commands(Piece("page.md", 1, text))) == []


def test_files_that_a_page_shows_are_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`deep/a.json`, for instance:\n\n```json\n{}\n```\n\n`not.this` one\n\n```json\n[]\n```\n")
    write_files(page, tmp_path)
    assert (tmp_path / "deep" / "a.json").read_text() == "{}\n"
    assert not (tmp_path / "not.this").exists()
