"""The project's files: version, licence, executable scripts, no machine's paths, whole bundles."""

import importlib.metadata
import json
import os
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import seg3d_monai

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parent for path in (ROOT / "bundles").glob("*/configs"))
SCRIPTS = ["scripts/setup_env", "scripts/quickstart", "scripts/test", "scripts/bench_ops", ".ci/run"]


def project_files() -> list[Path]:
    """Files that belong to the project: what git tracks or would track, or every file of a copy without git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        folders = ("seg3d_monai", "tests", "scripts", "bundles")
        files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*.*"))
    return [path for path in files if path.is_file()]


def test_version_is_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", seg3d_monai.__version__)
    assert importlib.metadata.version("seg3d_monai") == seg3d_monai.__version__


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"


def test_torch_has_a_floor_and_no_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [name for name in project["dependencies"] if re.match(r"torch\b", name)] == ["torch>=2.10"]
    extras = {"cluster", "view", "formats", "tracking", "export", "share", "docs", "dev", "all"}
    assert set(project["optional-dependencies"]) == extras


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable_bash(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", "scripts/bench_ops"])
def test_script_help_comes_before_any_work(script: str, tmp_path: Path) -> None:
    shown = subprocess.run([str(ROOT / script), "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert script in shown.stdout
    assert "[set-up]" not in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scripts/quickstart", "--uot", "run"], "unknown argument --uot"),
        (["scripts/quickstart", "--out"], "--out needs a folder"),
        (["scripts/setup_env", "def"], "unknown arguments 'def'"),
    ],
)
def test_script_refuses_unknown_arguments(words: list[str], message: str) -> None:
    shown = subprocess.run([str(ROOT / words[0]), *words[1:]], capture_output=True, text=True)
    assert shown.returncode == 2
    assert message in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_ci_calls_the_test_script() -> None:
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_no_file_names_a_place_on_some_machine() -> None:
    roots = "|".join(["work", "home", "root", "tmp", "Users", "opt", "mnt"])
    place = re.compile(rf"(?<![\w./$}}{{~)*-])/(?:{roots})/[\w.]")
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image or an array
        for number, line in enumerate(text.splitlines(), 1):
            if place.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("bundles/*/docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"


def test_there_are_bundles() -> None:
    assert "maskrcnn3d" in [folder.name for folder in BUNDLES]


@pytest.mark.parametrize("folder", BUNDLES, ids=lambda folder: folder.name)
def test_bundle_is_whole_and_holds_no_code(folder: Path) -> None:
    expected = ["LICENSE", "docs/README.md", "configs/metadata.json", "configs/logging.conf"]
    kinds = ("train", "evaluate", "inference", "multi_gpu_train")
    expected += [f"configs/{kind}.json" for kind in kinds]
    assert [name for name in expected if not (folder / name).is_file()] == []
    assert list(folder.rglob("*.py")) == []
    for config in folder.glob("configs/**/*.json"):
        assert isinstance(json.loads(config.read_text(encoding="utf-8")), dict), config


def test_readme_names_only_commands_that_exist() -> None:
    from seg3d_monai.cli import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?m)(?:^|`|bin/)seg3d ([a-z-]+)(?: ([a-z-]+))?", text))
    assert named
    assert [words for words in named if words[0] not in COMMANDS and " ".join(words) not in COMMANDS] == []


def test_files_of_tests_have_names_of_their_own():
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []  # pytest would import the first for all
