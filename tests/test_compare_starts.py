"""scripts/compare_starts: who is for what, trainings that are kept, a report of states."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(autouse=True)
def starts(monkeypatch):
    """The folder of the modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def dataset(tmp_path):
    """Two volumes of each of three specimens; the second one of each has no labels."""
    label = np.zeros((4, 10, 12), np.uint16)
    label[1:3, 2:5, 2:6] = 7
    lines = ["volume,image,label,spacing_z_um,spacing_y_um,spacing_x_um"]
    for specimen in "ABC":
        for time in (0, 1):
            name = f"{specimen}_{time}"
            tifffile.imwrite(tmp_path / f"{name}.tif", np.ones(label.shape, np.uint16), metadata={"axes": "ZYX"})
            tifffile.imwrite(tmp_path / f"{name}_labels.tif", label, metadata={"axes": "ZYX"})
            lines.append(f"{name},{name}.tif,{'' if time else f'{name}_labels.tif'},2.0,0.5,0.8")
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "index.csv"


def options_of(dataset, **changes):
    """Options over specimens A and B, C to judge on."""
    from starts.options import Options

    options = Options(
        folder=dataset.parent / "out",
        dataset_dir=dataset,
        labelled=("B_0",),
        val_specimens=("C",),
        specimen_pattern="^[^_]+",
        bundle="maskrcnn3d",
        overlays=(),
        recipe="randomised",
        steps=2,
        pretrain_steps=2,
        curve_steps=1,
        seeds=(0,),
        threads=1,
        is_quick=True,
    )
    return replace(options, **changes)


def test_labels_are_read_of_the_named_volumes_alone(dataset):
    from starts.data import divided, write

    from seg3d_monai.data import read_manifest

    options = options_of(dataset)
    division = divided(options)
    assert [row.name for row in division.labelled] == ["B_0"]
    assert [row.name for row in division.unlabelled] == ["A_0", "A_1", "B_0", "B_1"]
    assert [row.name for row in division.val] == ["C_0"]
    options.folder.mkdir()
    write(options, division)
    labelled = read_manifest(options.folder / "labelled.json").rows
    assert {(row.name, row.split) for row in labelled} == {("B_0", "train"), ("C_0", "test")}
    assert all(row.label is not None for row in labelled)
    images = read_manifest(options.folder / "unlabelled.json").rows
    assert {row.name for row in images if row.split == "train"} == {"A_0", "A_1", "B_0", "B_1"}
    assert all(row.label is None for row in images if row.split == "train")
    assert [row.name for row in images if row.split == "val"] == ["C_0"]
    with np.load(options.folder / "volumes" / "C_0.npz") as arrays:
        assert np.count_nonzero(arrays["labels"]) == 2 * 3 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_specimens": ("D",)}, "--val_specimens D: choose among A, B, C"),
        ({"labelled": ("A_1",)}, "--labelled A_1: .* choose among A_0, B_0"),
        ({"labelled": ("C_0",)}, "--labelled C_0: "),
        ({"val_specimens": ("A", "B", "C"), "labelled": ()}, "need a volume with labels"),
    ],
)
def test_volumes_that_do_not_exist(dataset, changes, message):
    from starts.data import divided

    with pytest.raises(ValueError, match=message):
        divided(options_of(dataset, **changes))


def test_the_last_state_is_said_once():
    from starts.report import states

    end = {"steps": 4, "f1_50": 0.5}
    row = {**end, "curve": [{"steps": 2, "f1_50": 0.1}, {"steps": 4, "f1_50": 0.4}]}
    assert [(state["steps"], state["f1_50"]) for state in states(row)] == [(2, 0.1), (4, 0.5)]


def run(*words):
    """The script; its process."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPTS / "compare_starts"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_both_starts_follow_each_other_and_are_kept(tmp_path):
    words = ["--quick", "--only", "both", "--threads", "1", "--folder", tmp_path / "out", "--json", tmp_path / "x.json"]
    done = run(*words, "--figure", tmp_path / "x.svg")
    assert done.returncode == 0, done.stderr
    assert "both   seed 0" in done.stdout
    assert (tmp_path / "x.svg").stat().st_size > 1000
    (row,) = json.loads((tmp_path / "x.json").read_text())["starts"]
    assert row["steps"] == 2
    words_of = json.loads((tmp_path / "out" / "before_both.done.json").read_text())
    assert words_of[words_of.index("--backbone_weights") + 1] == str(tmp_path / "out" / "masked" / "model.pt")
    words_of = json.loads((tmp_path / "out" / "runs" / "both_0" / "run.done.json").read_text())
    assert words_of[words_of.index("--initial_weights") + 1] == str(tmp_path / "out" / "before_both" / "model.pt")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.pt")}
    assert len(made) == 3
    assert run(*words).returncode == 0
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.pt")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "-3"], "--steps is -3; it must be at least 1"),
        (["--dataset_dir", "/nowhere"], "--dataset_dir /nowhere does not exist"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: its folder does not exist"),
    ],
)
def test_wrong_options(words, message):
    done = run(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
