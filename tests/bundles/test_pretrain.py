"""The bundle of pre-training: it parses, learns from volumes without labels, and its weights start every detector."""

import csv
import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from monai.bundle import ConfigParser
from small_networks import SMALL_NETWORK
from test_bundles import BUNDLES, CONFIGS, ROOT, SCHEMAS, SMALL, overrides, run_bundle, write_dataset

from seg3d_monai.cli import main
from seg3d_monai.data import open_volume
from seg3d_monai.engine import check_config, start_from

PRETRAIN = ROOT / "bundles" / "pretrain3d" / "configs"
TINY = SMALL | {"validate#dataset#num_samples": 4, "network_def#decoder_channels": 12, "network_def#decoder_depth": 1}
SEEN = {"crop_size", "amp", "device", "backbone#width", "network_def#decoder_channels", "network_def#decoder_depth"}
"""Keys of `TINY` that an inference has too."""
VIT = {
    "backbone": {
        "_target_": "seg3d_monai.backbones.ViT",
        "in_channels": "@in_channels",
        "channels": 16,
        "depth": 2,
        "num_heads": 2,
        "patch_size": [2, 8, 8],
    }
}


def without_labels(folder: Path) -> Path:
    """The volumes of `write_dataset`, of which one has labels, or, called twice, none."""
    manifest = folder / "manifest.csv"
    header, *lines = manifest.read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    for row in rows[1:] if any(row["label"] for row in rows[1:]) else rows:
        row["label"] = row["classes"] = ""
    manifest.write_text("\n".join([header, *(",".join(row.values()) for row in rows)]) + "\n")
    return folder


def network(bundle: str, **changes: object) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(str(CONFIGS[bundle] / "train.json"))
    if "backbone" in changes:
        parser["backbone"] = changes.pop("backbone")
        changes["backbone#in_channels"] = "@in_channels"
    small = {
        key: value for key, value in SMALL.items() if not ("backbone#" in key and "backbone#in_channels" in changes)
    }
    for key, value in (small | SMALL_NETWORK[bundle] | changes).items():
        parser[key] = value
    built: torch.nn.Module = parser.get_parsed_content("network")
    return built


@pytest.mark.parametrize("overlay", ["", *(path.stem for path in sorted((PRETRAIN / "overlays").glob("*.json")))])
def test_each_overlay_passes_the_strict_check(overlay: str) -> None:
    parser = ConfigParser()
    files = [PRETRAIN / "train.json", *([PRETRAIN / "overlays" / f"{overlay}.json"] if overlay else [])]
    parser.read_config([str(file) for file in files])
    parser.parse()
    check_config(parser=parser)
    if overlay:
        others = [CONFIGS[bundle] / "overlays" / f"{overlay}.json" for bundle in BUNDLES]
        contents = {json.dumps(json.loads(other.read_text())) for other in [*others, files[1]] if other.exists()}
        assert len(contents) == 1


@pytest.mark.skipif(not SCHEMAS, reason="the model zoo's published schema is not beside the project")
def test_metadata_satisfies_the_published_schema() -> None:
    jsonschema.validate(json.loads((PRETRAIN / "metadata.json").read_text()), json.loads(SCHEMAS[0].read_text()))


def test_it_trains_without_labels_and_goes_on_and_starts_every_detector(tmp_path: Path) -> None:
    dataset = without_labels(without_labels(write_dataset(tmp_path / "data")))
    run = tmp_path / "run"
    arguments = [
        *("training", "--config_file", str(PRETRAIN / "train.json"), "--dataset_dir", str(dataset)),
        *("--output_dir", str(run), *overrides(TINY)),
    ]
    done = run_bundle(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((run / "validation.csv").read_text().splitlines()))
    assert len(rows) == 1
    explained, loss = (float(rows[0][name]) for name in ("explained", "reconstruction"))
    assert explained == pytest.approx(1 - loss, abs=1e-4)
    done = run_bundle(*arguments, "--resume", "true", "--train#trainer#max_epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(run / "last.pt", weights_only=True)["iteration"] == 4

    look_at_it(dataset, run, tmp_path)
    weights = torch.load(run / "model.pt", weights_only=True)
    beneath = {
        k.removeprefix("backbone.backbone."): v for k, v in weights.items() if k.startswith("backbone.backbone.")
    }
    for bundle in BUNDLES:
        plain = network(bundle)
        found = network(bundle, backbone_weights=str(run / "model.pt"))
        prefix = "backbone.backbone." if bundle == "maskrcnn3d" else "backbone."
        for key, value in beneath.items():
            assert torch.equal(found.state_dict()[prefix + key], value)
            assert plain.state_dict()[prefix + key].shape == value.shape
        with pytest.raises(ValueError, match=r"does not fit the network: .*differently shaped: stages.* instead of"):
            start_from(network(bundle, **{"backbone#width": 16}), None, run / "model.pt")
        two = network(bundle, backbone_weights=str(run / "model.pt"), in_channels=2)
        assert torch.equal(
            two.state_dict()[prefix + "stages.c1.0.body.0.0.weight"], beneath["stages.c1.0.body.0.0.weight"]
        )
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no backbone"):
        start_from(plain, None, tmp_path / "other.pt")


def look_at_it(dataset: Path, run: Path, folder: Path) -> None:
    """Evaluate the weights, draw what they know of a stack, and make a page of the training."""
    files = f"['{PRETRAIN / 'train.json'}','{PRETRAIN / 'evaluate.json'}']"
    words = ["evaluating", "--config_file", files, "--dataset_dir", str(dataset), "--output_dir", str(run)]
    done = run_bundle(*words, *overrides(TINY), cwd=folder)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert set(metrics) == {"reconstruction", "explained"}
    assert done.stdout.splitlines()[-1] == f"explained = {metrics['explained']:.3f}"
    best = max(float(row["explained"]) for row in csv.DictReader((run / "validation.csv").read_text().splitlines()))
    assert metrics["explained"] == pytest.approx(best, abs=1e-4)

    image = dataset / "v3" / "image.tif"
    words = ["--config_file", str(PRETRAIN / "inference.json"), "--input", str(image), "--output", "seen.tif"]
    words += ["--checkpoint", str(run / "model.pt"), "--spacing", "[2,0.8,0.8]"]
    small = {key: value for key, value in TINY.items() if key in SEEN}
    done = run_bundle(*words, *overrides(small), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^explained = -?\d\.\d{3} in \[0, 0, 0, ", done.stdout, re.MULTILINE), done.stdout
    seen = open_volume(folder / "seen.tif")
    assert seen.shape == (3, *open_volume(image).shape[1:])
    assert seen.spacing_um == (2.0, 0.8, 0.8)
    assert main(["report", str(run)]) == 0
    assert "share of the hidden that is known" in (run / "report.html").read_text()


@pytest.mark.parametrize("overlay", ["", *(path.stem for path in sorted((PRETRAIN / "overlays").glob("[bm]*.json")))])
def test_overlays_of_the_network_serve_an_inference(overlay: str) -> None:
    parser = ConfigParser()
    files = [PRETRAIN / "inference.json", *([PRETRAIN / "overlays" / f"{overlay}.json"] if overlay else [])]
    parser.read_config([str(file) for file in files])
    parser.parse()
    check_config(["dense_net_def"], parser=parser)
    metadata = json.loads((PRETRAIN / "metadata.json").read_text())
    assert overlay or metadata["network_data_format"]["outputs"]["pred"]["num_channels"] == 256


def test_the_network_of_an_inference_is_that_of_the_training() -> None:
    train, inference = (json.loads((PRETRAIN / f"{name}.json").read_text()) for name in ("train", "inference"))
    for key in ("backbone", "network_def", "loss", "crop_size", "mask_ratio", "block_patches", "in_channels"):
        assert inference[key] == train[key], key


def test_a_vision_transformer_trains_on_some_volumes_with_labels(tmp_path: Path) -> None:
    dataset = without_labels(write_dataset(tmp_path / "data"))
    run = tmp_path / "run"
    tiny = {key: value for key, value in TINY.items() if key != "backbone#width"} | VIT
    done = run_bundle(
        *("training", "--config_file", str(PRETRAIN / "train.json"), "--dataset_dir", str(dataset)),
        *("--output_dir", str(run), *overrides(tiny | {"network_def#decoder_heads": 2})),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = network("maskdino3d", backbone_weights=str(run / "model.pt"), **VIT)
    weights = torch.load(run / "model.pt", weights_only=True)
    assert torch.equal(found.state_dict()["backbone.blocks.1.qkv.weight"], weights["backbone.blocks.1.qkv.weight"])
