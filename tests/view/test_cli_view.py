"""The command: mistakes are one line and exit code 2, and nothing heavy is imported before it runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from view_toys import BRIGHT, rows, spot, write_prediction, write_pyramid

from seg3d_monai import cli
from seg3d_monai.viewing import display, window

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of files, in it, with napari."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(window, "check_napari", lambda: None)
    write_pyramid(tmp_path / "image.zarr")
    labels = spot(value=1, dtype=np.uint32)
    write_prediction(tmp_path / "out.zarr", [labels], rows(BRIGHT))
    tifffile.imwrite("small.tif", labels[:5])
    tifffile.imwrite("real.tif", labels.astype(np.float32))
    tifffile.imwrite("labels.tif", labels)
    (tmp_path / "half.zarr.partial").mkdir()
    (tmp_path / "begun.journal.sqlite").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    pd.DataFrame({"id": [1]}).to_csv("bare.csv")
    pd.DataFrame({"id": ["a"], "centroid_z": 1, "centroid_y": 1, "centroid_x": 1}).to_csv("words.csv")
    (tmp_path / "broken.parquet").write_text("no table")
    (tmp_path / "other.json").write_text("{}")
    return tmp_path


MISTAKES = [
    ("missing.zarr", "missing.zarr: no such file or folder"),
    ("image.zarr missing.zarr", "prediction 'missing.zarr' does not exist"),
    ("out.zarr", "holds no image; give the image first"),
    ("image.zarr small.tif", "prediction has (5, 20, 28) voxels (z, y, x) and the image (6, 20, 28)"),
    ("image.zarr --truth small.tif", "truth has (5, 20, 28) voxels"),
    ("image.zarr real.tif", "labels are integers"),
    ("image.zarr half.zarr", "'half.zarr' is not finished; give its seg3d predict command once more"),
    ("image.zarr half.zarr.partial", "'half.zarr' is not finished"),
    ("image.zarr begun.zarr", "'begun.zarr' is not finished"),
    ("image.zarr run", "'run' is the folder of a training; give what it predicts: seg3d predict"),
    ("image.zarr labels.tif --table bare.csv", "no column centroid_z and no centroid_y and no centroid_x"),
    ("image.zarr --table words.csv", "column id of the table holds something else than numbers"),
    ("image.zarr --table missing.csv", "table 'missing.csv' does not exist"),
    ("image.zarr --table broken.parquet", "cannot be read"),
    ("image.zarr out.zarr --color_by scor", "--color_by scor: the table has no such column; did you mean score?"),
    ("image.zarr labels.tif --color_by score", "there is no object table; give it with --table"),
    ("image.zarr --roi [0,0,0,7,20,28]", "leaves the volume"),
    ("image.zarr --roi [0,0,0,0,20,28]", "is empty"),
    ("image.zarr --roi [0,0,0]", "must be (z1, y1, x1, z2, y2, x2)"),
    ("image.zarr --level 2", "level=2 is not there"),
    ("image.zarr --time 1", "time=1 is not there"),
    ("image.zarr --time [0,1]", "pass one time point"),
    ("image.zarr --time soon", "--time is 'soon'"),
    ("image.zarr --spacing [0,1,1]", "must be three positive numbers"),
    ("image.zarr --channels 3", "channels=3 is not there"),
    ("image.zarr --seam_report other.json", "is no report of seg3d seam-check"),
    ("image.zarr --screenshot view.jpg", "give the name of a .png"),
    ("image.zarr --screenshot nowhere/view.png", "its folder does not exist"),
    ("image.zarr --color score", "unknown flag --color"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line(place, capsys, words, message):
    assert cli.main(["view", *words.split()]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.splitlines()[-1].startswith("seg3d: error: ")
    assert "Traceback" not in shown


def test_a_training_with_a_prediction_in_it(place, capsys):
    write_prediction(place / "run" / "test.zarr", [spot(value=1, dtype=np.uint32)], rows(BRIGHT))
    assert cli.main(["view", "image.zarr", "run"]) == 2
    assert "give a prediction, such as run/test.zarr" in capsys.readouterr().err.replace("\\", "/")


def test_options_reach_the_layers(place, monkeypatch):
    shown = {}
    monkeypatch.setattr("seg3d_monai.viewing.show", lambda layers, **options: shown.update(options, layers=layers))
    words = "view image.zarr out.zarr --truth labels.tif --level 1 --roi [1,3,6,5,6,10] --spacing [4,1,1] --axes ZYX"
    assert cli.main([*words.split(), "--color_by", "score"]) == 0
    assert [layer.kind for layer in shown["layers"]] == ["image", "labels", "labels", "points"]
    assert shown["layers"][0].data.shape == (4, 3, 4)
    assert shown["layers"][0].options["scale"] == (4, 1, 1)
    assert shown["title"] == "seg3d view: image.zarr"
    assert shown["screenshot"] is None


def test_without_napari(place, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "napari", None)
    assert cli.main(["view", "image.zarr"]) == 2
    shown = capsys.readouterr().err
    assert 'pip install "seg3d_monai[view]"' in shown
    assert shown.count("\n") == 1


def test_without_a_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(ValueError, match=r"there is no display .* --screenshot FILE.png"):
        display.need_display(for_picture=False)
    monkeypatch.setattr(display.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt-get install xvfb"):
        display.need_display(for_picture=True)
    monkeypatch.setenv("DISPLAY", ":0")
    display.need_display(for_picture=False)
    display.need_display(for_picture=True)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from seg3d_monai.cli import main; main(['view', '--help']); "
        "sys.exit(sorted({'napari', 'numpy', 'torch', 'zarr', 'qtpy'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "--color_by" in result.stdout


def test_layers_are_described_without_napari(place):
    code = (
        "import sys; from seg3d_monai.viewing import build_layers; "
        "build_layers(sys.argv[1], sys.argv[2], color_by='score'); sys.exit('napari' in sys.modules)"
    )
    words = [sys.executable, "-c", code, str(place / "image.zarr"), str(place / "out.zarr")]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
