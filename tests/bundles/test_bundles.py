"""The bundles: they parse, satisfy MONAI's properties, train, predict, and refuse what is misspelt."""

import json
import subprocess
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import zarr
from monai.bundle import ConfigParser, ConfigWorkflow
from small_networks import SMALL_NETWORK
from warm_processes import run_module

from seg3d_monai.cli import main
from seg3d_monai.engine import read_spacing

ROOT = Path(__file__).parents[2]
BUNDLES = ["maskrcnn3d", "maskdino3d", "mask2former3d"]
CONFIGS = {name: ROOT / "bundles" / name / "configs" for name in BUNDLES}
SCHEMAS = sorted((ROOT.parent / "shared" / "schemas").glob("meta_schema_*.json"))
OVERLAYS = [(name, path.stem) for name in BUNDLES for path in sorted((CONFIGS[name] / "overlays").glob("*.json"))]
SMALL = {
    "crop_size": [16, 32, 40],
    "backbone#width": 8,
    "train#dataset#num_samples": 4,
    "train#trainer#max_epochs": 1,
    "amp": "off",
}
"""Overrides that make a training of two steps; those of each network come on top."""
bundles = pytest.mark.parametrize("bundle", BUNDLES)


def run_bundle(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_module("monai.bundle", "run", *arguments, cwd=cwd)


def overrides(values: dict[str, object]) -> list[str]:
    return [
        text
        for key, value in values.items()
        for text in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def write_dataset(folder: Path, channels: int = 1, classes: int = 1) -> Path:
    """Four specimens of small bright boxes in noise: two for training, one for validation, one for the test."""
    rng = np.random.default_rng(0)
    lines = ["name,image,label,axes,spacing_z_um,spacing_y_um,spacing_x_um,specimen,split,classes"]
    for i, split in enumerate(["train", "train", "val", "test"]):
        label = np.zeros((18, 40, 44), np.uint16)
        boxes = [(2, 3, 4), (2, 3, 24), (9, 20, 6), (10, 21, 28)]
        for k, (z, y, x) in enumerate(boxes, start=1):
            label[z : z + 6, y : y + 12, x : x + 14] = k
        image = rng.normal(100, 5, (channels, *label.shape)) + 80 * (label > 0)
        name = f"v{i}"
        (folder / name).mkdir(parents=True)
        tifffile.imwrite(folder / name / "image.tif", image.astype(np.uint16).squeeze())
        tifffile.imwrite(folder / name / "labels.tif", label)
        rows = "".join(f"{k},{k % classes}\n" for k in range(1, 5))
        (folder / name / "classes.csv").write_text("id,class\n" + rows)
        axes = "CZYX" if channels > 1 else "ZYX"
        lines.append(f"{name},{name}/image.tif,{name}/labels.tif,{axes},2,0.8,0.8,s{i},{split},{name}/classes.csv")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@bundles
@pytest.mark.parametrize(
    ("workflow_type", "name"), [("train", "train.json"), ("infer", "inference.json")], ids=["train", "inference"]
)
def test_properties_are_complete(bundle: str, workflow_type: str, name: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    run = {"dataset_dir": str(dataset), "output_dir": str(tmp_path / "run")}
    extra = (
        run | SMALL | SMALL_NETWORK[bundle] if name == "train.json" else {}
    )  # an inference has no input, output or weights yet
    workflow = ConfigWorkflow(
        config_file=str(CONFIGS[bundle] / name),
        meta_file=str(CONFIGS[bundle] / "metadata.json"),
        logging_file=False,
        workflow_type=workflow_type,
        **extra,
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize(("bundle", "overlay"), OVERLAYS)
def test_each_overlay_passes_the_strict_check(bundle: str, overlay: str) -> None:
    from seg3d_monai.engine import check_config

    parser = ConfigParser()
    parser.read_config([str(CONFIGS[bundle] / "train.json"), str(CONFIGS[bundle] / "overlays" / f"{overlay}.json")])
    parser.parse()
    check_config(parser=parser)


@bundles
def test_inference_describes_the_same_network_as_training(bundle: str) -> None:
    train, inference = (json.loads((CONFIGS[bundle] / name).read_text()) for name in ("train.json", "inference.json"))
    for key in ("backbone", "network_def"):
        assert train[key] == inference[key]


@pytest.mark.parametrize("name", ["train.json", "inference.json"])
def test_bundles_differ_in_network_and_loss_only(name: str) -> None:
    own = {
        *("bundle_root", "output_dir", "checkpoint", "num_queries", "network_def", "loss"),
        *("score_threshold", "block_size"),
    }
    first, *others = (json.loads((CONFIGS[bundle] / name).read_text()) for bundle in BUNDLES)
    for other in others:
        assert {k: v for k, v in other.items() if k not in own} == {k: v for k, v in first.items() if k not in own}


@bundles
def test_the_weights_that_a_training_starts_from_follow_from_its_seed(bundle: str, tmp_path: Path) -> None:
    def weights(run: str, seed: int) -> dict[str, torch.Tensor]:
        torch.seed()  # what was drawn before must not matter
        places = {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / run)}
        workflow = ConfigWorkflow(
            config_file=str(CONFIGS[bundle] / "train.json"),
            logging_file=False,
            workflow_type="train",
            seed=seed,
            **places | SMALL | SMALL_NETWORK[bundle],
        )
        workflow.initialize()
        found: dict[str, torch.Tensor] = workflow.parser.get_parsed_content("network").state_dict()
        return found

    write_dataset(tmp_path / "data")
    first, again, other = weights("first", 3), weights("again", 3), weights("other", 4)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@bundles
def test_metadata_fits_the_model_zoo(bundle: str) -> None:
    meta = json.loads((CONFIGS[bundle] / "metadata.json").read_text())
    assert meta["required_packages_version"]["seg3d_monai"]
    assert set(meta["network_data_format"]) == {"inputs", "outputs"}
    for key in ("version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task", "description"):
        assert meta[key]


@pytest.mark.skipif(not SCHEMAS, reason="the model zoo's published schema is not beside the project")
@bundles
def test_metadata_satisfies_the_published_schema(bundle: str) -> None:
    jsonschema.validate(json.loads((CONFIGS[bundle] / "metadata.json").read_text()), json.loads(SCHEMAS[0].read_text()))


@bundles
def test_a_training_starts_from_other_weights(bundle: str, tmp_path: Path) -> None:
    def network(**changes: object) -> torch.nn.Module:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS[bundle] / "train.json"))
        for key, value in (SMALL | SMALL_NETWORK[bundle] | changes).items():
            parser[key] = value
        built: torch.nn.Module = parser.get_parsed_content("network")
        return built

    weights = network(in_channels=2).state_dict()
    torch.save(weights, tmp_path / "model.pt")
    found = network(initial_weights=str(tmp_path / "model.pt")).state_dict()
    assert found.keys() == weights.keys()
    (adapted,) = [key for key in weights if found[key].shape != weights[key].shape]
    torch.testing.assert_close(found.pop(adapted), weights.pop(adapted).sum(1, keepdim=True))
    torch.testing.assert_close(found, weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bundle", "channels", "classes"),
    [("maskrcnn3d", 1, 1), ("maskrcnn3d", 2, 2), ("maskdino3d", 2, 2), ("mask2former3d", 2, 2)],
)
def test_trains_evaluates_and_predicts(tmp_path: Path, bundle: str, channels: int, classes: int) -> None:
    dataset = write_dataset(tmp_path / "data", channels, classes)
    run = tmp_path / "run"
    configs = CONFIGS[bundle]
    network = {"in_channels": channels, "num_classes": classes, **SMALL_NETWORK[bundle]}
    arguments = [
        *("training", "--config_file", str(configs / "train.json"), "--dataset_dir", str(dataset)),
        *("--output_dir", str(run), *overrides(SMALL | network)),
    ]
    done = run_bundle(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("F1@0.5 = ")
    assert {p.name for p in run.iterdir()} >= {"model.pt", "last.pt", "best.pt", "validation.csv", "config.json"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "run"]
    for name in ("model.pt", "last.pt", "best.pt"):
        assert read_spacing(run / name) == (2.0, 0.8, 0.8)

    both = f"['{configs / 'train.json'}','{configs / 'evaluate.json'}']"
    arguments[:3] = ["evaluating", "--config_file", both]
    done = run_bundle(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("F1@0.5 = ")
    assert (run / "evaluation" / "metrics.json").exists()

    small = {key: value for key, value in SMALL.items() if key.startswith(("backbone", "network_def", "amp"))}
    output = tmp_path / "out.zarr"
    done = run_bundle(
        *("--config_file", str(configs / "inference.json"), "--input", str(dataset / "v3" / "image.tif")),
        *("--output", str(output), "--checkpoint", str(run / "model.pt"), "--axes", "CZYX" if channels > 1 else "ZYX"),
        *("--spacing", "[2,0.8,0.8]", "--block_size", "[8,20,24]", "--halo", "[4,8,8]", "--score_threshold", "0.0"),
        *overrides(small | network),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "of the stack 2 x 0.8 x 0.8: blocks are not resampled, as they agree to 10%" in done.stderr
    labels = zarr.open(output / "labels" / "instances" / "0")[:]
    table = pd.read_parquet(tmp_path / "out.instances.parquet")
    assert labels.shape == (18, 40, 44)
    assert sorted(set(np.unique(labels)) - {0}) == table["id"].tolist()


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("dataset_dri", "dataset_dir"),
        ("train#trainer#max_epoch", "max_epochs"),
        ("backbone#widht", "width"),
        ("loss#weights#mask_bec", "mask_bce"),
    ],
)
def test_a_misspelt_override_is_refused_before_anything_is_written(tmp_path: Path, flag: str, nearest: str) -> None:
    done = run_bundle(
        *(
            "training",
            "--config_file",
            str(CONFIGS["maskrcnn3d"] / "train.json"),
            "--output_dir",
            str(tmp_path / "run"),
        ),
        *(f"--{flag}", "3"),
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert nearest in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_misspelt_section_on_the_way_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output_dir", str(tmp_path / "run"), "--train#datset#seed", "3"]
    assert main(["train", str(CONFIGS["maskrcnn3d"].parent), *flags]) == 2
    assert "did you mean --train#dataset?" in capsys.readouterr().err
    # MONAI applies overrides before it evaluates anything of the bundle, so there it has the word.
    done = run_bundle("training", "--config_file", str(CONFIGS["maskrcnn3d"] / "train.json"), *flags, cwd=tmp_path)
    assert done.returncode != 0
    assert "datset" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
