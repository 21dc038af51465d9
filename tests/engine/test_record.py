"""What environment.json says: git's state of a folder, versions of what is installed, threads and seed."""

import importlib.metadata
import json
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from seg3d_monai.engine.record import git_state, installed_versions

ROOT = Path(__file__).parents[2]


def git(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def bundle(tmp_path):
    """A work tree with a bundle in one folder and other things in another."""
    root = tmp_path / "tree" / "bundles" / "cells"
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "metadata.json").write_text("{}")
    (tmp_path / "tree" / "other").mkdir()
    (tmp_path / "tree" / "other" / "notes").write_text("1")
    git(tmp_path / "tree", "init", "-q")
    git(tmp_path / "tree", "add", ".")
    git(tmp_path / "tree", "commit", "-q", "-m", "first")
    return root


def test_revision_and_whether_the_folder_differs(bundle):
    revision = git(bundle, "rev-parse", "HEAD")
    clean, dirty = {"revision": revision, "dirty": False}, {"revision": revision, "dirty": True}
    assert git_state(bundle, "configs/metadata.json") == clean
    (bundle.parents[1] / "other" / "notes").write_text("2")
    assert git_state(bundle, "configs/metadata.json") == clean
    (bundle / "configs" / "new.json").write_text("{}")
    assert git_state(bundle, "configs/metadata.json") == dirty
    (bundle / "configs" / "new.json").unlink()
    (bundle / "configs" / "metadata.json").write_text('{"version": "2"}')
    assert git_state(bundle, "configs/metadata.json") == dirty


def test_what_git_does_not_keep(bundle, tmp_path, monkeypatch):
    installed = bundle / "venv" / "site-packages" / "seg3d_monai"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_state(installed, "__init__.py") is None  # in the work tree, but not of it
    (tmp_path / "plain").mkdir()
    assert git_state(tmp_path / "plain", "a") is None
    assert git_state(tmp_path / "nowhere", "a") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(bundle, "configs/metadata.json") is None


def test_versions_of_all_that_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = installed_versions()
    for requirement in project["dependencies"]:
        name = requirement.split(">=")[0]
        assert versions[name] == importlib.metadata.version(name)
    assert versions["seg3d_monai"] == importlib.metadata.version("seg3d_monai")
    assert "ray" in versions  # of an extra
    assert "pytest" not in versions


def test_environment_of_a_run(tmp_path, bundle):
    config = {
        "imports": ["$from seg3d_monai.engine import record_run"],
        "bundle_root": str(bundle),
        "output_dir": str(tmp_path / "run"),
        "size": "@base",
        "base": 3,
        "initialize": ["$record_run(@output_dir, seed=7)"],
    }
    parser = ConfigParser(config)
    parser.get_parsed_content("initialize")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "environment.json"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["seed"] == 7
    assert environment["threads"] == torch.get_num_threads()
    assert environment["git"]["bundle"] == {"revision": git(bundle, "rev-parse", "HEAD"), "dirty": False}
    assert set(environment["git"]["package"] or {"revision", "dirty"}) == {"revision", "dirty"}
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
