"""Weights that bundles ship: small, safe to load, and good on nuclei of another instrument that they never saw."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from monai.bundle import ConfigParser

from seg3d_monai.cli import main
from seg3d_monai.engine import load_weights
from seg3d_monai.metrics import InstanceMetrics

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "bbbc050"
SHIPPED = [path.parts[-3] for path in sorted((ROOT / "bundles").glob("*/models/model.pt"))]
MEGABYTE = 10**6
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/bbbc050 is not beside the project")


def test_some_are_shipped() -> None:
    assert "maskrcnn3d" in SHIPPED


@pytest.mark.parametrize("bundle", SHIPPED)
def test_they_are_small_and_fit_the_bundle(bundle: str) -> None:
    folder = ROOT / "bundles" / bundle
    file = folder / "models" / "model.pt"
    assert file.stat().st_size < 25 * MEGABYTE
    weights = torch.load(file, weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser["bundle_root"] = str(folder)
    assert Path(parser.get_parsed_content("checkpoint")) == file
    network = load_weights(parser.get_parsed_content("network_def"), file)
    assert network.state_dict().keys() == weights.keys()
    license_text = (folder / "docs" / "data_license.txt").read_text()
    assert "synthetic" in license_text


@needs_real
@pytest.mark.parametrize("bundle", SHIPPED)
def test_they_find_nuclei_of_another_instrument(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = InstanceMetrics()
    for name in ("Emb02_t201", "Emb06_t301", "Emb09_t351", "Emb11_t401"):
        output = tmp_path / f"{name}.zarr"
        words = ["predict", str(REAL / name / "image.tif"), str(output), "--spacing", "[1.75,0.8,0.8]"]
        assert main([*words, "--bundle", bundle, "--device", "cpu"]) == 0, capsys.readouterr().err
        found = np.asarray(zarr.open(output)["labels/instances/0"])
        metrics.update(tifffile.imread(REAL / name / "labels.tif").astype(np.int64), found.astype(np.int64))
    scores = metrics.compute()
    assert scores["thresholds"]["0.5"]["f1"] > 0.75, json.dumps(scores["thresholds"]["0.5"])
