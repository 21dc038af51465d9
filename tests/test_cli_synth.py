"""`seg3d synth --recipe` and `seg3d match` from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from seg3d_monai.cli import main
from seg3d_monai.data import read_manifest
from seg3d_monai.data.synthesis import Recipe, SyntheticStack

SHAPES = ["--train_volumes", "1", "--train_shape", "[24,40,40]", "--val_volumes", "0", "--test_volumes", "0"]


def test_match_writes_a_recipe_that_synth_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = Recipe({"objects": {"diameter_um": 10.0}}).scene(0)
    image, _ = SyntheticStack(scene, (16, 48, 48)).whole()
    tifffile.imwrite(tmp_path / "image.tif", image[0])
    start = tmp_path / "start.json"
    start.write_text(json.dumps({"objects": {"diameter_um": [8, 14]}, "camera": {"photons": [20, 900]}}))
    words = ["match", str(tmp_path / "image.tif"), str(tmp_path / "own.json"), "--start", str(start)]
    assert main([*words, "--rounds", "2", "--num_scenes", "6"]) == 2
    assert "give --spacing '[z,y,x]' in micrometres" in capsys.readouterr().err
    words += ["--spacing", "[2,0.8,0.8]", "--num_scenes", "12"]
    assert main([*words, "--rounds", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("round 1 of 2: distance ")
    assert shown[-1] == f"recipe: {tmp_path / 'own.json'}"
    found = json.loads((tmp_path / "own.json").read_text())
    assert 8 <= found["objects"]["diameter_um"][0] <= found["objects"]["diameter_um"][1] <= 14
    assert found.get("voxels", {}) == {}  # that of the image is the default
    assert main(["synth", str(tmp_path / "out"), "--recipe", str(tmp_path / "own.json"), *SHAPES]) == 0
    (row,) = read_manifest(tmp_path / "out" / "manifest.csv").rows
    made = tifffile.imread(str(row.image))
    assert np.percentile(made, 50) == pytest.approx(np.percentile(image, 50), rel=0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["match", "no.tif", "x.json"], "no.tif"),
        (["match", "no.tif", "no/x.json"], "its folder does not exist"),
        (["match", "no.tif", "x.json", "--start", "nuclei"], "preset 'nuclei' does not exist"),
        (["synth", "out", "--recipe", "no.json"], "no.json"),
        (["synth", "out", "--recipe", "nuclei"], "preset 'nuclei' does not exist"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []
