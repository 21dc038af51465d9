"""The commands with the bundles' own networks: suggest, correct, import, and two steps of training on the result."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from monai.bundle import ConfigParser
from small_networks import SMALL_NETWORK
from warm_processes import run_module

from seg3d_monai.annotation.task import read_task
from seg3d_monai.cli import main
from seg3d_monai.data import DataConfig, build_index, read_manifest

BUNDLES = ["maskrcnn3d", "maskdino3d", "mask2former3d"]
CONFIGS = {name: Path(__file__).parents[2] / "bundles" / name / "configs" for name in BUNDLES}
TRAINING = {
    "crop_size": [16, 32, 40],
    "train#dataset#num_samples": 4,
    "train#trainer#max_epochs": 1,
    "val_interval": 1000,
}


def flags(values: dict[str, object]) -> list[str]:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [word for key, text in texts.items() for word in (f"--{key}", text)]


def network_keys(bundle: str) -> dict[str, object]:
    return {"backbone#width": 8, "in_channels": 2, "amp": "off", **SMALL_NETWORK[bundle]}


def write_data(folder: Path) -> Path:
    """Two channels: a labelled volume to train on, one without labels, one to judge on."""
    rng = np.random.default_rng(0)
    lines = ["name,image,label,axes,spacing_z_um,spacing_y_um,spacing_x_um,specimen,split"]
    for name, split in {"known": "train", "bare": "", "judged": "val"}.items():
        label = np.zeros((18, 40, 44), np.uint16)
        for number, (z, y, x) in enumerate([(2, 3, 4), (2, 3, 24), (9, 20, 6), (10, 21, 28)], start=1):
            label[z : z + 6, y : y + 12, x : x + 14] = number
        image = rng.normal(100, 5, (2, *label.shape)) + 80 * (label > 0)
        (folder / name).mkdir(parents=True)
        tifffile.imwrite(folder / name / "image.tif", image.astype(np.uint16))
        tifffile.imwrite(folder / name / "labels.tif", label)
        cell = "" if name == "bare" else f"{name}/labels.tif"
        lines.append(f"{name},{name}/image.tif,{cell},CZYX,2,0.8,0.8,{name},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def test_the_bundles_annotate_alike() -> None:
    first, *others = ((CONFIGS[bundle] / "annotate.json").read_text() for bundle in BUNDLES)
    assert others == [first, first]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_configuration_passes_the_strict_check(bundle: str) -> None:
    from seg3d_monai.engine import check_config

    parser = ConfigParser()
    parser.read_config([str(CONFIGS[bundle] / name) for name in ("inference.json", "annotate.json")])
    parser.parse()
    check_config(["seam_check"], parser=parser)
    # A misspelt key is one of the two files that nothing reads.
    parser["candidate"] = 3
    with pytest.raises(ValueError, match=r"candidate: nothing in the config refers to this id; .*candidates"):
        check_config(["seam_check"], parser=parser)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_from_suggestion_to_training(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_data(tmp_path / "data")
    parser = ConfigParser()
    parser.read_config(str(CONFIGS[bundle] / "train.json"))
    for key, value in network_keys(bundle).items():
        parser[key] = value
    torch.manual_seed(0)
    torch.save(parser.get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    config = DataConfig(crop_size=(8, 20, 22), stride=(8, 20, 22))
    build_index(read_manifest(manifest), tmp_path / "crops.sqlite", config, progress=False)

    words = ["annotate", "suggest", str(tmp_path / "crops.sqlite"), "--bundle", bundle, "--num", "2"]
    words += ["--checkpoint", str(tmp_path / "model.pt"), "--margin", "[1,0,0]", "--score_threshold", "0.2"]
    words += flags(network_keys(bundle) | {"device": "cpu", "candidates": 12})
    for name in ("first", "again"):
        assert main([*words, "--output", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out
    assert "2 regions in" in said
    task = read_task(tmp_path / "first")
    assert task.training == {
        "bundle": bundle,
        "overlay": None,
        "checkpoint": str(tmp_path / "model.pt"),
        "in_channels": 2,
        "num_classes": 1,
    }
    assert task.regions == read_task(tmp_path / "again").regions
    with (tmp_path / "first" / "suggestions.csv").open(newline="") as file:
        assert {row["volume"] for row in csv.DictReader(file)} == {"bare"}

    truth = tifffile.imread(tmp_path / "data" / "bare" / "labels.tif")
    for region in task.regions:
        z1, y1, x1, z2, y2, x2 = region.window
        tifffile.imwrite(
            tmp_path / "first" / region.folder / "labels.tif",
            truth[z1:z2, y1:y2, x1:x2].astype(np.uint32),
            metadata={"axes": "ZYX"},
        )
    assert main(["annotate", "import", str(tmp_path / "first"), str(manifest), "--allow_empty"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    assert f"--initial_weights {tmp_path / 'model.pt'}" in command

    more = network_keys(bundle) | TRAINING
    del more["in_channels"]  # the command has it
    done = run_module("seg3d_monai", *shlex.split(command)[1:], *flags(more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("F1@0.5 = ")
    assert (tmp_path / "first" / "run" / "model.pt").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["annotate", *words]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "unknown command annotate sugest; did you mean annotate suggest?" in refused("sugest")
    assert "missing --checkpoint and --output" in refused("suggest", "db.sqlite")
    words = ["suggest", "db.sqlite", "--checkpoint", "m.pt", "--output", str(tmp_path / "out")]
    assert "unknown flag --candidtes; did you mean --candidates?" in refused(*words, "--candidtes", "3")
    assert "m.pt" in refused(*words, "--num", "3")
    assert "task.json does not exist" in refused("import", str(tmp_path), str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_group_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["annotate"], ["annotate", "--help"], ["help", "annotate"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert "annotate suggest" in text
        assert "annotate import" in text
        assert "evaluate" not in text
    for words in (["annotate", "suggest", "--help"], ["help", "annotate", "suggest"]):
        assert main(words) == 0
        assert "--candidates" in capsys.readouterr().out
