"""Mistakes with measure, evaluate, report and view: one line, exit code 2, and not a byte is changed.

Elsewhere: what measure refuses as a function (tests/inference/test_measure.py), pairs of folders
(tests/report/test_evaluate.py), a training without weights (tests/bundles/test_report.py), nearly all mistakes with
view and a machine without napari or a display (tests/view/test_cli_view.py).
"""

import shlex
from pathlib import Path

import pytest
from error_toys import refused_in

from seg3d_monai.viewing import window

Capsys = pytest.CaptureFixture[str]

MEASURE = [
    ("measure no.zarr image.tif", "output no.zarr does not exist; seg3d predict writes it when it has finished"),
    ("measure half.zarr image.tif", "output half.zarr does not exist; seg3d predict writes it"),
    ("measure folder image.tif", "folder: a folder that is no Zarr"),
    ("measure real.tif image.tif", "has 1 channel(s) of float32, no labels; give what seg3d predict wrote"),
    ("measure out.zarr no.tif", "no.tif: no such file or folder"),
    ("measure out.zarr text.tif", "text.tif: not a TIFF file"),
    ("measure out.zarr cut.tif", "cut.tif: truncated"),
    ("measure out.zarr plane.tif", "plane.tif: axes YX of shape (9, 66) have no Z"),
    ("measure out.zarr short.tif", "(5, 9, 66)"),
    ("measure out.zarr nan.tif", "voxel (channel 0, z 2, y 4, x 4) is nan; replace NaN"),
    ("measure out.zarr damaged.zarr", "chunk (1, 0, 1) is damaged"),
    ("measure out.zarr image.tif --table x.xlsx", "table is 'x.xlsx'; give a name that ends with .parquet or .csv"),
    (
        "measure out.zarr image.tif --table image.tif",
        "table is 'image.tif'; give a name that ends with .parquet or .csv",
    ),
    ("measure out.zarr image.tif --table no/x.csv", "the folder of table no/x.csv does not exist; make no first"),
    (
        "measure out.zarr image.tif --table out.instances.parquet",
        "the object table of seg3d predict; give another name",
    ),
    (
        "measure out.zarr image.tif --atlas real.tif",
        "no labels; save the numbers of its regions as one volume of integers",
    ),
    ("measure out.zarr image.tif --atlas text.tif", "text.tif: not a TIFF file"),
    ("measure out.zarr image.tif --atlas labels.tif --atlas_spacing [0,1,1]", "atlas_spacing=[0, 1, 1] must be three"),
    ("measure out.zarr image.tif --atlas labels.tif --atlas_spacing [1,1,1]", "register it to this stack, or correct"),
    ("measure out.zarr image.tif --atlas_spacing [1,1,1]", "atlas_spacing is given without atlas"),
    ("measure out.zarr image.tif --spacing [1,1]", "spacing=[1, 1] must be three positive numbers"),
    ("measure out.zarr image.tif --axes YX", "axes='YX' has 2 letters for 3 axes"),
    ("measure out.zarr image.tif --time 4", "time=4 is not there; choose 0 to 0"),
    ("measure out.zarr image.tif --level 4", "level=4 is not there; it has 1 level(s)"),
    ("measure out.zarr image.tif --chanels 0", "measure: unknown flag --chanels; did you mean --channels?"),
]
EVALUATE = [
    ("evaluate labels.tif no.zarr", "prediction: no file or folder 'no.zarr'"),
    ("evaluate text.tif out.zarr", "text.tif: not a TIFF file"),
    ("evaluate labels.tif cut.tif", "cut.tif: truncated"),
    ("evaluate labels.tif lost.zarr", "its metadata file zarr.json cannot be read"),
    ("evaluate labels.tif damaged.zarr", "chunk (1, 0, 1) is damaged"),
    ("evaluate labels.tif short.tif", "truth has shape (6, 9, 66) and prediction (5, 9, 66) (z, y, x)"),
    ("evaluate labels.tif real.tif", "real.tif has dtype float32; labels must be integers"),
    ("evaluate labels.tif colours.ome.tif", "colours.ome.tif has 2 channels; labels have one"),
    ("evaluate labels.tif plane.tif", "have no Z"),
    ("evaluate labels.tif folder", "only prediction is a folder of volumes; give two volumes or two folders"),
    ("evaluate labels.tif half.zarr.partial", "only prediction is a folder of volumes; give two volumes"),
    ("evaluate data run", "run holds no volume (NAME/labels.tif, NAME.tif, NAME.zarr)"),
    ("evaluate labels.tif out.zarr --json labels.tif", "--json is 'labels.tif'; give a name that ends in .json"),
    ("evaluate labels.tif out.zarr --json folder.json", "--json 'folder.json' is a folder; give the name of a file"),
    ("evaluate labels.tif out.zarr --json no/x.json", "--json 'no/x.json': its folder does not exist; make it first"),
    ("evaluate labels.tif out.zarr --json", "--json needs a value (text)"),
    ("evaluate labels.tif", "evaluate: missing PREDICTION; see --help"),
    ("evaluate labels.tif out.zarr --jsn x.json", "unknown flag --jsn; did you mean --json?"),
]
REPORT = [
    ("report no", "'no' does not exist; give the folder of a training, or a predicted OME-Zarr"),
    ("report image.tif", "'image.tif' is a file; give the folder of a training, or a predicted OME-Zarr"),
    ("report folder", "folder holds no config.json"),
    ("report group.zarr --image image.tif", "group.zarr holds no labels/instances; give what seg3d predict wrote"),
    ("report out.zarr --image text.tif", "text.tif: not a TIFF file"),
    ("report out.zarr --image plane.tif", "have no Z"),
    ("report out.zarr --image short.tif", "(5, 9, 66)"),
    ("report out.zarr --image image.tif --truth real.tif", "labels must be integers, convert them first"),
    ("report out.zarr --image image.tif --truth short.tif", "(5, 9, 66)"),
    ("report out.zarr --image image.tif --truth no.tif", "no.tif: no such file or folder"),
    ("report out.zarr --image image.tif --channel 3", "channels=3 is not there; choose from 0 to 0"),
    ("report out.zarr --image image.tif --roi [0,0,0,99,9,9]", "leaves the volume"),
    ("report out.zarr image.tif --image image.tif", "OUT is 'image.tif'; give a name that ends in .html"),
    ("report out.zarr no/x.html --image image.tif", "its folder does not exist; make it first"),
    ("report out.zarr --image image.tif --trth x", "unknown flag --trth of a prediction; did you mean --truth?"),
]
VIEW = [
    ("view text.tif", "text.tif: not a TIFF file"),
    ("view cut.tif", "cut.tif: truncated"),
    ("view plane.tif", "have no Z"),
    ("view image.tif text.tif", "text.tif: not a TIFF file"),
    ("view image.tif out.zarr --truth plane.tif", "have no Z"),
    ("view image.tif --seam_report list.json", "is no report of seg3d seam-check"),
    ("view image.tif --seam_report cut.json", "cut.json"),
    ("view image.tif --seam_report no.json", "no.json"),
    ("view image.tif out.zarr --table folder", "folder"),
    ("view image.tif out.zarr --colour_by score", "unknown flag --colour_by; did you mean --color_by?"),
]
ROWS = [*MEASURE, *EVALUATE, *REPORT, *VIEW]


@pytest.mark.parametrize(("words", "fragment"), ROWS, ids=[words for words, _ in ROWS])
def test_a_mistake_changes_nothing(
    words: str, fragment: str, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "check_napari", lambda: None)
    refused_in(place, capsys, shlex.split(words), fragment)
