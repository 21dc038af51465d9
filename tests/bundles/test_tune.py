"""`seg3d tune` with the bundles: a threshold that is known, networks as they are, and overlays that all take."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from monai.bundle import ConfigParser
from small_networks import SMALL_NETWORK
from test_bundles import BUNDLES, CONFIGS, overrides, write_dataset
from tune_toys import Bright, known_best

from seg3d_monai.cli import main
from seg3d_monai.engine import check_config

FAKE = {
    "network_def": {"_target_": "tune_toys.Bright", "backbone": "@backbone"},
    "backbone#width": 8,
    "inferer#percentiles": [0, 100],
    "device": "cpu",
    "amp": "off",
    "min_visible": 0.0,
}
"""A network whose best settings are known in place of the bundle's."""


def write_known(folder: Path) -> Path:
    """Volumes in which scores from 0.6 are true and those up to 0.5 false: one of train, ten of val; test is empty."""
    image, labels = known_best()
    lines = ["name,image,label,specimen,split"]
    splits = {"a": "train", **dict.fromkeys((f"b{i}" for i in range(10)), "val"), "empty": "test"}
    for name, split in splits.items():
        (folder / name).mkdir(parents=True)
        image[0, 0, 0] += 1  # the same image in two splits would be refused
        tifffile.imwrite(folder / name / "image.tif", image)
        tifffile.imwrite(folder / name / "labels.tif", labels * (name != "empty"))
        lines.append(f"{name},{name}/image.tif,{name}/labels.tif,{name},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def known(tmp_path: Path) -> list[str]:
    """The command with the fake network, its data and weights."""
    run = tmp_path / "run"
    run.mkdir()
    torch.save(Bright().state_dict(), run / "model.pt")
    words = ["tune", str(CONFIGS["maskrcnn3d"].parent), "--output_dir", str(run)]
    return [*words, "--dataset_dir", str(write_known(tmp_path / "data")), *overrides(FAKE)]


def test_the_bundles_tune_alike() -> None:
    first, *others = (json.loads((CONFIGS[bundle] / "tune.json").read_text()) for bundle in BUNDLES)
    assert first.pop("network_candidates") == {"detection_nms_threshold": [0.2, 0.3, 0.4, 0.5, 0.6]}
    for other in others:
        assert other.pop("network_candidates") == {}
        assert other == first


def test_a_threshold_that_is_known_is_found(
    known: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(known) == 0
    run = tmp_path / "run"
    overlay = json.loads((run / "tuned.json").read_text())
    assert overlay["score_threshold"] == 0.55
    assert overlay["network_def#detection_nms_threshold"] == 0.4
    said = capsys.readouterr().out
    assert "f1_50 + seg on 10 volumes with 40 objects: b0, b1, b2, b3 and 6 more" in said
    assert said.splitlines()[-1] == f"overlay: {run / 'tuned.json'}"
    assert (run / "tuned.txt").read_text() in said
    assert {path.name for path in (run / "tuning").iterdir()} == {"config.json", "environment.json"}


def test_volumes_are_chosen_by_a_filter(known: list[str], tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "mine.json"
    assert main([*known, "--tune_where", 'specimen in ("a", "b3")', "--metric", "f1_50", "--out", str(out)]) == 0
    report = out.with_suffix(".txt").read_text()
    assert report.startswith("f1_50 on 2 volumes with 8 objects: a, b3")
    assert "warning: the network was trained on a," in report
    assert not (tmp_path / "run" / "tuned.json").exists()


def test_mistakes_are_one_line(known: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"

    def refused(*words: str) -> str:
        before = sorted(path.name for path in run.iterdir())
        assert main([*known, *words]) == 2
        after = sorted(path.name for path in run.iterdir() if path.name not in ("tuning", "crops.sqlite"))
        assert after == [name for name in before if name not in ("tuning", "crops.sqlite")]
        line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seg3d: error: ")]
        assert len(line) == 1
        return line[0]

    assert "metric='f1_5' holds 'f1_5', which is no metric; did you mean f1_" in refused("--metric", "f1_5")
    assert "no volume of crops.sqlite matches" in refused("--tune_where", 'specimen == "Emb09"')
    assert "there is no object in empty" in refused("--tune_split", "test")
    assert "names 'min_voxel'" in refused("--candidates#min_voxel", "[3]")
    assert "no.pt' does not exist; train first" in refused("--checkpoint", str(run / "no.pt"))
    (run / "tuned.json").write_text("{}")
    assert "tuned.json exists; choose another file with --out" in refused()
    assert (run / "tuned.json").read_text() == "{}"
    assert main([*known, "--restart"]) == 0
    assert json.loads((run / "tuned.json").read_text())["score_threshold"] == 0.55


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_overlay_of_a_bundles_own_network_serves_evaluation_and_prediction(bundle: str, tmp_path: Path) -> None:
    dataset, run, configs = write_dataset(tmp_path / "data"), tmp_path / "run", CONFIGS[bundle]
    small = {"backbone#width": 8, "amp": "off", "device": "cpu", **SMALL_NETWORK[bundle]}
    if bundle == "maskrcnn3d":
        small["network_def#max_detections"] = 20
    parser = ConfigParser()
    parser.read_config(str(configs / "train.json"))
    for key, value in small.items():
        parser[key] = value
    torch.manual_seed(0)
    run.mkdir()
    torch.save(parser.get_parsed_content("network_def").state_dict(), run / "model.pt")
    words = overrides(small)
    few = {"candidates": {"mask_threshold": [0.4], "min_voxels": [5]}, "least_score": 0.0}
    places = ["--dataset_dir", str(dataset), "--output_dir", str(run)]
    assert main(["tune", str(configs.parent), *places, *words, *overrides(few), "--flips", "[x]"]) == 0
    overlay = json.loads((run / "tuned.json").read_text())
    network = {"network_def#detection_nms_threshold"} if bundle == "maskrcnn3d" else set()
    assert overlay.keys() == {"score_threshold", "mask_threshold", "min_voxels", "min_visible", "flips"} | network
    assert overlay["flips"] == ["x"]

    for files in (["train"], ["train", "evaluate"], ["inference"]):
        parser = ConfigParser()
        parser.read_config([*(str(configs / f"{name}.json") for name in files), str(run / "tuned.json")])
        parser.parse()
        check_config(parser=parser, entry_points=["seam_check"])
        assert {key: parser[key] for key in overlay} == overlay

    image, output = dataset / "v3" / "image.tif", tmp_path / "out.zarr"
    command = [
        "predict",
        str(image),
        str(output),
        "--bundle",
        str(configs.parent),
        "--checkpoint",
        str(run / "model.pt"),
    ]
    assert main([*command, "--overlay", str(run / "tuned.json"), "--axes", "ZYX", *words]) == 0
    scores = pd.read_parquet(tmp_path / "out.instances.parquet")["score"].to_numpy()
    assert (scores >= np.float32(overlay["score_threshold"])).all()
