"""Every command and every block of Python that the documents show is run, or has a reason in doc_reasons.py."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doc_workspace
import pandas as pd
import pytest
from doc_blocks import ROOT, Piece, blocks, commands, in_sentences, languages, pages, split_commands, write_files
from doc_python import namespace
from doc_reasons import CHECKED_ONLY, NOT_EXECUTED
from doc_runner import look, run
from monai.bundle import ConfigParser

from seg3d_monai.cli import COMMANDS
from seg3d_monai.engine import check_config

TUTORIAL = ROOT / "docs" / "tutorial.md"
SHOWN = [piece for page in pages() for piece in commands(page)]
PYTHON = [piece for page in pages() for piece in blocks("python", page) if page != TUTORIAL]
SENTENCES = [piece for page in pages() for piece in in_sentences(page)]


def reason(piece: Piece) -> str | None:
    """The first words under which a command is left out."""
    return next((start for start in NOT_EXECUTED if f"{piece.text} ".startswith(f"{start} ")), None)


def only_checked(piece: Piece) -> bool:
    return any(word in piece.text for word in CHECKED_ONLY.get(piece.page, {}))


def named(pieces: list[Piece]) -> Any:
    return pytest.mark.parametrize("piece", pieces, ids=[piece.name for piece in pieces])


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        doc_workspace.make(folder)
    return folder


@pytest.fixture
def place(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the workspace, in which the process stands."""
    copy = tmp_path / "place"
    shutil.copytree(workspace, copy, symlinks=True)
    monkeypatch.chdir(copy)
    yield copy
    shutil.rmtree(copy)


def set_environment(piece: Piece, patch: pytest.MonkeyPatch) -> None:
    for setting in piece.settings:
        name, _, value = setting.partition("=")
        patch.setenv(name, value)
        if name == "PYTHONPATH":
            patch.syspath_prepend(str(Path(value).absolute()))


@named(
    [piece for piece in SHOWN if reason(piece) is None and not only_checked(piece) and ROOT / piece.page != TUTORIAL]
)
def test_a_command_runs(piece: Piece, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if piece.folder:
        (place / "bundles").unlink()  # what a command writes there is not for the repository
        shutil.copytree(ROOT / "bundles", place / "bundles")
        inside = next(folder for folder in (place / piece.folder, place / "FOLDER" / piece.folder) if folder.is_dir())
        monkeypatch.chdir(inside)
        shutil.copytree(place / "STACK", "STACK")
    write_files(ROOT / piece.page, Path.cwd())
    set_environment(piece, monkeypatch)
    words = list(piece.words)
    if "…" in words:  # what the command before has said
        words[words.index("…")] = "--config_file"
        words.insert(words.index("--config_file") + 1, "bundles/maskrcnn3d/configs/train.json")
    run(words)


def test_the_tutorial_runs_from_top_to_bottom(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    doc_workspace.make_lab(tmp_path, workspace)
    write_files(TUTORIAL, tmp_path)
    for piece in sorted([*commands(TUTORIAL), *blocks("python", TUTORIAL)], key=lambda piece: piece.line):
        if not piece.words:
            exec(compile(piece.text, piece.page, "exec"), {})
        elif reason(piece) is None:
            run(piece.words, alone=False)
        if piece.words[:3] == ("seg3d", "annotate", "suggest"):
            doc_workspace.correct(tmp_path / piece.words[piece.words.index("--output") + 1])
    table = pd.read_csv("brain3_cells.csv")
    assert len(table) == len(pd.read_parquet("brain3_cells.instances.parquet")) > 0


@named([piece for piece in SHOWN if only_checked(piece)])
def test_the_configuration_of_a_command_is_valid(piece: Piece) -> None:
    files = re.findall(r"'([^']+)'", piece.words[piece.words.index("--config_file") + 1])
    parser = ConfigParser()
    parser.read_config([str(ROOT / name) for name in files])
    parser.parse()
    check_config(parser=parser)


@named(PYTHON)
def test_python_runs(piece: Piece, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seg3d_monai.viewing.show", look)
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    exec(compile(piece.text, piece.page, "exec"), namespace(piece))


def test_what_import_prints_goes_on_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["seg3d", "annotate", "import", "round1", "DATA/manifest.csv"])
    printed = Piece("", 1, capsys.readouterr().out.splitlines()[-1] + "\n")
    (command,) = split_commands(printed)
    run(command.words[command.words.index("seg3d") :])


def test_each_reason_is_needed() -> None:
    used = {reason(piece) for piece in SHOWN}
    assert set(NOT_EXECUTED) - used == set()
    for page, words in CHECKED_ONLY.items():
        for word in words:
            assert any(word in piece.text for piece in SHOWN if piece.page == page), word


@named([piece for piece in SHOWN if piece.text.startswith("pip ")])
def test_extras_exist(piece: Piece) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = re.findall(r"seg3d_monai\[(.*?)\]", piece.text)
    assert {name for names in wanted for name in names.split(",")} <= extras.keys()


@functools.cache
def help_of(script: Path) -> str:
    """What `SCRIPT --help` prints, with this Python first in the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command, environment = [script, "--help"], {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment).stdout


@named([piece for piece in SHOWN + SENTENCES if any(word.startswith("scripts/") for word in piece.words)])
def test_scripts_exist_and_have_their_flags(piece: Piece) -> None:
    place = next(i for i, word in enumerate(piece.words) if word.startswith("scripts/"))
    script = ROOT / piece.words[place]
    assert script.is_file()
    flags = [word.strip("[]") for word in piece.words[place + 1 :] if word.strip("[").startswith("--") and word != "--"]
    if "--config_file" in flags:  # those of `monai.bundle run`
        configuration = (ROOT / "bundles/maskrcnn3d/configs/train.json").read_text()
        assert all(f'"{flag[2:]}":' in configuration for flag in flags if flag != "--config_file")
    elif flags:
        shown = help_of(script)
        assert all(flag in shown for flag in flags)


@named([piece for piece in SENTENCES if piece.words[0] == "seg3d"])
def test_commands_in_sentences_exist(piece: Piece) -> None:
    words = [word for word in piece.words[1:] if word != "…"]
    if words[0] in ("COMMAND", "--help"):
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert name in COMMANDS


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_command_hides_in_another_kind_of_block(page: Path) -> None:
    kinds = languages(page)
    assert set(kinds) <= {"bash", "python", "json", "csv", ""}, "write commands as bash, so that they are run here"
    shown = [line for text in kinds.get("", []) for line in text.splitlines()]
    assert not [line for line in shown if line.startswith(("seg3d ", "python ", "$ ", "pip ", "scripts/"))]
