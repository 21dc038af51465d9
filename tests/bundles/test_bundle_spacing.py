"""A bundle's command on volumes of several voxel sizes: one training, validated and reported in each one's frame."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from small_networks import SMALL_NETWORK
from test_bundles import BUNDLES, CONFIGS, SMALL, overrides, run_bundle

from seg3d_monai.engine import read_spacing

TARGET = [2.0, 0.8, 0.8]
STEPS = {"alike": (1, 1, 1), "fine": (2, 1.5, 1), "coarse": (0.5, 1, 1), "judged": (1, 0.5, 0.5), "unseen": (2, 1, 1)}
"""Voxels along (z, y, x) per voxel of the target."""
SPLITS = {"alike": "train", "fine": "train", "coarse": "train", "judged": "val", "unseen": "test"}


def write_volumes(folder: Path, *, without_spacing: str = "") -> Path:
    """The same bright boxes in noise, at the voxel sizes of `STEPS`."""
    rng = np.random.default_rng(0)
    lines = ["name,image,label,spacing_z_um,spacing_y_um,spacing_x_um,split"]
    for name, steps in STEPS.items():
        step = np.array(steps)
        label = np.zeros((np.array((20, 40, 44)) * step).astype(int), np.uint16)
        for number, corner in enumerate([(2, 2, 4), (2, 2, 24), (10, 20, 6), (12, 22, 28)], start=1):
            low, high = (corner * step).astype(int), ((np.array(corner) + (6, 12, 14)) * step).astype(int)
            label[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = number
        image = rng.normal(100, 5, label.shape) + 80 * (label > 0)
        (folder / name).mkdir(parents=True)
        tifffile.imwrite(folder / name / "image.tif", image.astype(np.uint16))
        tifffile.imwrite(folder / name / "labels.tif", label)
        sizes = ["", "", ""] if name == without_spacing else (np.array(TARGET) / step).tolist()
        cells = [name, f"{name}/image.tif", f"{name}/labels.tif", *sizes, SPLITS[name]]
        lines.append(",".join(map(str, cells)))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def words(bundle: str, tmp_path: Path, *more: str) -> list[str]:
    return [
        *("training", "--config_file", str(CONFIGS[bundle] / "train.json"), "--dataset_dir", str(tmp_path / "data")),
        *("--output_dir", str(tmp_path / "run"), *overrides(SMALL | SMALL_NETWORK[bundle]), *more),
    ]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_volumes_of_several_voxel_sizes_train_and_are_judged_in_their_own(bundle: str, tmp_path: Path) -> None:
    write_volumes(tmp_path / "data")
    more = ["--target_spacing_um", json.dumps(TARGET), "--val_interval", "1"]
    done = run_bundle(*words(bundle, tmp_path, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("F1@0.5 = ")
    for sizes in ("2 x 1.6 x 1.6", "1 x 0.8 x 0.8"):  # of the volume for validation, and of that for the report
        assert f"the model is 2 x 0.8 x 0.8 micrometre, of the stack {sizes}: blocks are resampled" in done.stderr
    for name in ("model.pt", "last.pt"):
        assert read_spacing(tmp_path / "run" / name) == tuple(TARGET)
    assert len((tmp_path / "run" / "validation.csv").read_text().splitlines()) == 2
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    found = report["thresholds"]["0.5"]
    assert found["tp"] + found["fn"] == 4

    # What is evaluated later is shown at the voxel size that the checkpoint keeps.
    both = f"['{CONFIGS[bundle] / 'train.json'}','{CONFIGS[bundle] / 'evaluate.json'}']"
    arguments = words(bundle, tmp_path)
    arguments[:3] = ["evaluating", "--config_file", both]
    done = run_bundle(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of the stack 1 x 0.8 x 0.8: blocks are resampled" in done.stderr
    assert json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text()) == report


@pytest.mark.parametrize("name", ["coarse", "judged"])
def test_a_volume_without_a_voxel_size_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write_volumes(tmp_path / "data", without_spacing=name)
    done = run_bundle(
        *words("maskrcnn3d", tmp_path, "--target_spacing_um", json.dumps(TARGET), "--val_interval", "1"), cwd=tmp_path
    )
    assert done.returncode != 0
    assert f"{name}: no voxel size is known" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "model.pt").exists()
