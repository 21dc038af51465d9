"""Mistakes with annotate suggest, annotate import, bundle check and bundle pack.

Elsewhere: candidates, weights and folders of suggestions (tests/annotation/test_suggest.py, test_choose.py), faults of
corrected labels, all at once, and a killed import (test_import.py); every defect of a bundle and of a zip
(tests/sharing/test_sharing_check.py, test_sharing_unpack.py), versions and overlays of a packed one
(test_sharing_pack.py).
"""

import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
from error_toys import BUNDLE, SUGGEST, changed, listing, refused_in, with_changes

from seg3d_monai.cli import main

Capsys = pytest.CaptureFixture[str]

SUGGESTS = [
    ("--output folder", "folder holds something already; give a new folder"),
    ("--output image.tif", "image.tif holds something already; give a new folder"),
    ("--output image.tif/x", "image.tif; choose another name"),
    ("--checkpoint no.pt", "'no.pt' does not exist; train first or give another checkpoint"),
    ("--checkpoint text.pt", "'text.pt' is damaged or no checkpoint"),
    ("--num 0", "num=0 chooses nothing; use 1 or more"),
    ("--num two", "--num = 'two' is not an integer"),
    ("--candidates 0", "candidates=0 leaves nothing to choose from; use 1 or more"),
    ("--pool some", "pool='some' is unknown; use one of unannotated, all"),
    ("--pool unannotated", "is not annotated; list volumes without labels in the manifest, or look at all"),
    ("--strategy best", "strategy='best' is unknown; use one of model, random"),
    ("--where 'qualty > 2'", "the nearest is 'quality_image'"),
    ("--where 'quality_image > 99'", "matches where='quality_image > 99'"),
    ("--split trian", "split='trian' is unknown; use one of train, val, test"),
    ("--crop_size [1,1]", "crop_size=[1, 1] is not three positive voxel counts; give [z,y,x]"),
    ("--margin [-1,0,0]", "margin=[-1, 0, 0] is not three voxel counts from 0; give [z,y,x]"),
    ("--score_threshold 2", "accept_score=2 (--score_threshold) is not a score; use a number from 0 to 1"),
    ("--unlike_weight 3", "unlike_weight=3 is not a weight; use a number from 0 to 1"),
    ("--seed -1", "seed: -1 is no seed; give an integer >= 0"),
    ("--device gpu", "device: 'gpu' is no device"),
    ("--pol all", "unknown flag --pol; did you mean --pool?"),
]
IMPORTS = [
    ("no data/manifest.csv", "no/task.json does not exist; give the folder that `seg3d annotate suggest` wrote"),
    ("folder data/manifest.csv", "folder/task.json does not exist; give the folder"),
    ("regions no.csv", "no.csv: no such file or folder"),
    ("regions text.tif", "header: column 'image' is missing"),
    ("regions data/manifest.csv", "none of 2 regions was changed; correct labels.tif and save over it, or take"),
    ("regions data/manifest.csv --min_inside 2", "min_inside=2 is not a share; use a number from 0 to 1"),
    ("regions data/manifest.csv --only [9]", "9"),
    ("regions data/manifest.csv --only 1", "--only = '1' is not a list of integers"),
    ("regions data/manifest.csv --output no/m.csv", "m.csv: its folder does not exist; make it first"),
    ("regions data/manifest.csv --output data/manifest.csv", "is the manifest itself, which is never overwritten"),
    (
        "regions data/manifest.csv --output list.json",
        "exists and was not written by an import of regions; name a new one",
    ),
    ("regions data/manifest.csv --outptu m.csv", "unknown flag --outptu; did you mean --output?"),
]
BUNDLES = [
    ("bundle check no", "bundle 'no' does not exist; "),
    ("bundle check folder", "bundle 'folder' has no folder configs; name a MONAI bundle's own folder"),
    (
        "bundle check image.tif",
        "'image.tif' is no zip or is damaged (File is not a zip file); give a bundle's folder or",
    ),
    ("bundle check toy --schema no.json", "--schema 'no.json' does not exist; check the path"),
    ("bundle check toy --json image.tif", "--json is 'image.tif'; give a name that ends in .json"),
    ("bundle check toy --json folder.json", "--json 'folder.json' is a folder; give the name of a file"),
    ("bundle check toy --jsn x", "unknown flag --jsn; did you mean --json?"),
    ("bundle pack no x.zip", "bundle 'no' does not exist; "),
    ("bundle pack BUNDLE x.tar", "'x.tar' is no name of a zip; end it in .zip"),
    ("bundle pack BUNDLE no/x.zip", "'no/x.zip': its folder does not exist; make it first"),
    ("bundle pack BUNDLE x.zip --checkpoint no.pt", "'no.pt' does not exist; give the model.pt of a training"),
    ("bundle pack BUNDLE x.zip --checkpoint text.pt", "it is not loaded: Weights only load failed; give the model.pt"),
    ("bundle pack BUNDLE x.zip --checkpoint cut.pt", "holds more than weights, or is damaged; it is not loaded: "),
    ("bundle pack BUNDLE x.zip --overlay list.json", "'list.json' holds no keys; a configuration is {key: value}"),
    ("bundle pack BUNDLE x.zip --overlay cut.json", "'cut.json' cannot be read: "),
    ("bundle pack BUNDLE x.zip --version 9.0.0", "--version and --changelog belong together; give both or none"),
    ("bundle pack BUNDLE x.zip --version 0.0.1 --changelog y", "does not come after"),
    ("bundle pack BUNDLE x.zip --chckpoint y", "unknown flag --chckpoint; did you mean --checkpoint?"),
]


@pytest.mark.parametrize(("words", "fragment"), SUGGESTS, ids=[words for words, _ in SUGGESTS])
def test_a_mistake_with_suggest_leaves_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    base = [*SUGGEST, "--output", "new"]
    refused_in(place, capsys, with_changes(base, *shlex.split(words)), fragment)


@pytest.mark.parametrize(
    ("db", "fragment"),
    [
        ("no.sqlite", "there is no crop index at"),
        ("text.sqlite", "text.sqlite is not a crop index"),
        ("folder", "folder is a folder; give the SQLite file of a crop index"),
    ],
)
def test_what_is_no_index(db: str, fragment: str, place: Path, capsys: Capsys) -> None:
    words = [db if word == "crops.sqlite" else word for word in SUGGEST]
    refused_in(place, capsys, [*words, "--output", "new"], fragment)


@pytest.mark.parametrize(("words", "fragment"), IMPORTS, ids=[words for words, _ in IMPORTS])
def test_a_mistake_with_import_leaves_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, ["annotate", "import", *words.split()], fragment)


def test_labels_that_cannot_be_taken_back(place: Path, capsys: Capsys) -> None:
    file = place / "regions" / "001" / "labels.tif"
    whole = tifffile.imread(file)
    words = ["annotate", "import", "regions", "data/manifest.csv"]
    for content, fragment in (
        (whole[:-1], "(5, 9, 32)"),
        (whole[0], "001"),
        (whole.astype(np.float32) + 0.5, "001"),
    ):
        tifffile.imwrite(file, content)
        refused_in(place, capsys, words, fragment)
    file.write_text("no picture but words")
    refused_in(place, capsys, words, "labels.tif: not a TIFF file")
    (place / "regions" / "task.json").write_text("[1]")
    refused_in(place, capsys, words, "task.json")


@pytest.mark.parametrize(("words", "fragment"), BUNDLES, ids=[words for words, _ in BUNDLES])
def test_a_mistake_with_a_bundle_leaves_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, [BUNDLE if word == "BUNDLE" else word for word in words.split()], fragment)


@pytest.mark.parametrize("name", ["train.json", "inference.json", "metadata.json"])
@pytest.mark.parametrize("content", ["[1]", "3", '{"a": '])
def test_what_fails_in_a_check_is_a_mistake_and_still_written(
    name: str, content: str, place: Path, capsys: Capsys
) -> None:
    (place / "toy" / "configs" / name).write_text(content)
    before = listing(place)
    assert main(["bundle", "check", "toy", "--json", "found.json"]) == 2
    shown = capsys.readouterr()
    assert "checks failed: configurations parse" in shown.err
    assert "Traceback" not in shown.err
    assert changed(before, listing(place)) == {"found.json"}
    refused_in(place, capsys, ["bundle", "pack", "toy", "x.zip"], f"'toy/configs/{name}' ")


def test_a_packed_bundle_is_not_written_over(place: Path, capsys: Capsys) -> None:
    assert main(["bundle", "pack", "toy", "x.zip"]) == 0
    fragment = "'x.zip' exists already; give --overwrite or another name"
    refused_in(place, capsys, ["bundle", "pack", "toy", "x.zip"], fragment)
