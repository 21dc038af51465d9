"""Crops for a pre-training: of volumes with and without labels, without targets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seg3d_monai.data import CropDataset, index_for
from seg3d_monai.data.synthetic import write_specimen
from seg3d_monai.data.transforms import train_transforms

SMALL: dict[str, Any] = {
    "train_volumes": 2,
    "val_volumes": 1,
    "test_volumes": 0,
    "unlabelled_volumes": 3,
    "train_shape": (14, 40, 36),
}
SIZE = (8, 20, 24)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_specimen(tmp_path_factory.mktemp("specimen") / "a", **SMALL)


def crops(index: Any, **options: Any) -> CropDataset:
    return CropDataset(
        index, **({"num_samples": 60, "crop_size": SIZE, "split": "train", "images_only": True} | options)
    )


def test_crops_come_from_volumes_with_and_without_labels(manifest: Path, tmp_path: Path) -> None:
    index = index_for(manifest, tmp_path / "crops.sqlite", crop_size=SIZE, progress=False)
    seen = set()
    dataset = crops(index, balance="crop")
    for position in range(60):
        crop = dataset[position]
        seen.add(crop["volume"])
        assert (crop["image"].shape, crop["image"].dtype) == ((1, *SIZE), torch.float32)
        assert crop["targets"]["boxes"].shape == (0, 6)
        assert (crop["targets"]["label"] == -1).all()
    assert seen == {"train_0", "train_1", "unlabelled_0", "unlabelled_1", "unlabelled_2"}
    assert {crops(index, images_only=False)[n]["volume"] for n in range(30)} == {"train_0", "train_1"}
    assert {crops(index, split="val")[n]["volume"] for n in range(5)} == {"val_0"}


def test_images_are_those_of_crops_with_labels(manifest: Path, tmp_path: Path) -> None:
    index = index_for(manifest, tmp_path / "crops.sqlite", crop_size=SIZE, progress=False)
    transform = train_transforms(crop_size=SIZE, affine_prob=1.0)
    options = {"where": "name == 'train_1'", "foreground_prob": 0.0, "transform": transform, "margin": (2, 4, 4)}
    bare, labelled = crops(index, **options), crops(index, images_only=False, **options)
    for position in range(4):
        assert torch.equal(bare[position]["image"], labelled[position]["image"])
        assert bare[position]["roi"] == labelled[position]["roi"]


def test_crops_of_one_voxel_size(manifest: Path, tmp_path: Path) -> None:
    index = index_for(manifest, tmp_path / "crops.sqlite", crop_size=SIZE, progress=False)
    crop = crops(index, target_spacing_um=(2.0, 1.6, 1.6))[0]
    assert crop["image"].shape == (1, *SIZE)
    assert np.isfinite(crop["image"].numpy()).all()


def test_a_manifest_without_any_label(tmp_path: Path) -> None:
    bare = {**SMALL, "train_volumes": 0, "val_volumes": 0, "unlabelled_shape": (14, 40, 36)}
    manifest = write_specimen(tmp_path / "a", **bare)
    with pytest.raises(ValueError, match="no row of the manifest has a label volume"):
        index_for(manifest, tmp_path / "crops.sqlite", crop_size=SIZE, progress=False)
    index = index_for(manifest, tmp_path / "crops.sqlite", crop_size=SIZE, needs_labels=False, progress=False)
    assert {crops(index)[n]["volume"] for n in range(20)} == {"unlabelled_0", "unlabelled_1", "unlabelled_2"}
    rows = [line.split(",") for line in manifest.read_text().splitlines()]
    place = rows[0].index("split")
    manifest.write_text("\n".join(",".join(row[:place] + row[place + 1 :]) for row in rows) + "\n")
    index = index_for(
        manifest, tmp_path / "other.sqlite", crop_size=SIZE, needs_labels=False, val_fraction=0.3, progress=False
    )
    assert {crops(index, split=split)[0]["volume"] for split in ("train", "val")} <= {
        f"unlabelled_{n}" for n in range(3)
    }
    assert len(index.volumes(split="val", labelled=None)) == 1
