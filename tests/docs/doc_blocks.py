"""Commands and Python of the documents: fenced blocks, split into what a shell runs, and `seg3d ...` in sentences.

It knows Markdown and a little of the shell, and no command.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"^`(?P<name>[\w./]+\.\w+)`[^\n]*:\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
IN_A_SENTENCE = re.compile(r"(?<!`)`(?P<text>(?:seg3d |scripts/)[^`]*)`(?!`)")
OPERATORS = {"|", "&&", ";", "||"}
SETTING = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Piece:
    """What a document tells its reader to run: a command, or a block of Python.

    Args:
        page: path of the document in the repository.
        line: where it begins, from 1.
        text: the source of a block; the words of a command with blanks between them.
        words: of a command, quotes and comments taken off.
        folder: where the `cd` before it in its block leads to, "" where there is none.
        settings: variables of the environment that stand before a command, such as `PYTHONPATH=.`.
    """

    page: str
    line: int
    text: str
    words: tuple[str, ...] = ()
    folder: str = ""
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`docs/tune.md:11: seg3d tune ...`, for people and for pytest."""
        return f"{self.page}:{self.line}: {self.text.splitlines()[0]}"


def pages() -> list[Path]:
    """Every document whose commands a reader may type."""
    own = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [*own, *sorted((ROOT / "bundles").glob("*/docs/README.md"))]


def blocks(language: str, page: Path) -> Iterator[Piece]:
    """The fenced blocks of a language, as they stand there."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match["language"] == language:
            line = text.count("\n", 0, match.start()) + 2
            yield Piece(page.relative_to(ROOT).as_posix(), line, match["text"])


def write_files(page: Path, folder: Path) -> None:
    """Write the files that a page shows: blocks below a line that begins with a file's name and ends with a colon."""
    for match in NAMED.finditer(page.read_text(encoding="utf-8")):
        (folder / match["name"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / match["name"]).write_text(match["text"], encoding="utf-8")


def languages(page: Path) -> dict[str, list[str]]:
    """The texts of the fenced blocks of a page by their language, which may be empty."""
    found: dict[str, list[str]] = {}
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        found.setdefault(match["language"], []).append(match["text"])
    return found


def commands(page: Path) -> Iterator[Piece]:
    """The commands of the `bash` blocks of a page, in their order, without `cd`, which is told by `folder`."""
    for block in blocks("bash", page):
        yield from split_commands(block)


def split_commands(block: Piece) -> Iterator[Piece]:
    """The commands of a block: lines that end with a backslash go on, comments are left out, `&&` and `|` divide.

    A `cd` holds until a line that is a comment.
    """
    folder, lines, start = "", "", 0
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        if line.lstrip().startswith("#") and not lines:
            folder = ""
            continue
        start = start if lines else number
        lines += line
        if lines.endswith("\\"):
            lines = lines[:-1] + " "
            continue
        for words in _parts(lines):
            if words[0] == "cd":
                folder = words[1]
                continue
            text, settings = " ".join(words), tuple(takewhile(SETTING.match, words))
            words = words[len(settings) :]
            yield replace(block, line=start, text=text, words=tuple(words), folder=folder, settings=settings)
        lines = ""


def in_sentences(page: Path) -> Iterator[Piece]:
    """`seg3d ...` and `scripts/...` outside of blocks, a line break in them taken for a blank."""
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    for match in IN_A_SENTENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        words = tuple(match["text"].replace('"', "").split())
        yield Piece(page.relative_to(ROOT).as_posix(), line, " ".join(words), words)


def _parts(line: str) -> Iterator[list[str]]:
    """The words of each command of a line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in lexer:
        if word.startswith("#"):
            break
        if word in OPERATORS:
            yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words
