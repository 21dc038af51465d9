"""Synthetic, unlabelled and a user's own volumes: one manifest, one index, one training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage

from seg3d_monai.data import (
    CropDataset,
    CropLoader,
    DataConfig,
    VolumeDataset,
    build_index,
    read_manifest,
    write_manifest,
)
from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.synthetic import NucleiModel, write_specimen
from seg3d_monai.data.transforms import train_transforms

CROP = (8, 24, 20)
SPACING = (2.0, 0.8, 0.8)


def own_volumes(folder: Path) -> Path:
    """Two TIFFs of boxes, one for training and one for validation, as a user has them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,label,spacing_z_um,spacing_y_um,spacing_x_um,split,stain"]
    for name, split in (("one", "train"), ("two", "val")):
        label = np.zeros((12, 40, 44), np.uint16)
        for number, (z, y, x) in enumerate([(1, 3, 4), (1, 22, 24), (6, 4, 26)], start=1):
            label[z : z + 5, y : y + 14, x : x + 12] = number
        image = (rng.normal(100, 5, label.shape) + 60 * (label > 0)).astype(np.uint16)
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="minisblack")
        tifffile.imwrite(folder / f"{name}_labels.tif", label, photometric="minisblack")
        lines.append(f"{name}.tif,{name}_labels.tif,2,0.8,0.8,{split},H2B")
    (folder / "mine.csv").write_text("\n".join(lines) + "\n")
    return folder / "mine.csv"


def test_one_manifest_of_all_kinds_builds_one_index_and_trains(tmp_path: Path) -> None:
    mine = own_volumes(tmp_path / "mine")
    synthetic = write_specimen(
        tmp_path / "synthetic",
        train_volumes=1,
        train_shape=(12, 40, 44),
        val_volumes=0,
        test_shape=(12, 36, 40),
        unlabelled_volumes=1,
        annotated_fraction=0.6,
        nuclei=NucleiModel(density=6e-4, diameter_um=(6.0, 8.0)),
    )
    manifest = write_manifest(tmp_path / "all.csv", [*read_manifest(mine).rows, *read_manifest(synthetic).rows])
    index = build_index(read_manifest(manifest), tmp_path / "i.sqlite", DataConfig(crop_size=CROP), progress=False)

    def names(**options: object) -> list[str]:
        return [volume.name for volume in index.volumes(**options)]  # type: ignore[arg-type]

    assert names() == ["one", "two", "train_0", "test_0"]
    assert names(labelled=False) == ["unlabelled_0"]
    assert names(where="synthetic == 1") == ["train_0", "test_0"]
    assert names(where="synthetic == None", split="train") == ["one"]
    assert names(where='stain == "H2B"') == ["one", "two"]

    dataset = CropDataset(
        index, split="train", num_samples=12, transform=train_transforms(crop_size=CROP), margin=(1, 3, 3)
    )
    assert dataset.spacing_um == SPACING
    volumes, ignored = set(), {}
    for batch in CropLoader(dataset, batch_size=3):
        assert batch["image"].shape == (3, 1, *CROP)
        volumes |= set(batch["volume"])
        for name, targets in zip(batch["volume"], batch["targets"], strict=True):
            ignored[name] = ignored.get(name, 0) + int((targets["label"] == -1).sum())
    assert volumes == {"one", "train_0"}
    assert ignored["train_0"] > 0
    (only_mine,) = {s["volume"] for s in CropDataset(index, split="train", num_samples=5, where="synthetic == None")}  # type: ignore[attr-defined]
    assert only_mine == "one"

    # One step of an optimizer on a batch of both, and the volumes that are left for validation.
    network = torch.nn.Conv3d(1, 1, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    batch = next(iter(CropLoader(dataset, batch_size=8)))
    assert set(batch["volume"]) == {"one", "train_0"}

    def loss() -> torch.Tensor:
        label = torch.stack([targets["label"] for targets in batch["targets"]])
        logits = network(batch["image"])[:, 0]
        wanted = (label > 0).float()
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return each[label != -1].mean()

    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before
    assert [item["name"] for item in VolumeDataset(index, split="val")] == ["two"]  # type: ignore[attr-defined]
    assert [item["name"] for item in VolumeDataset(index, split="test")] == ["test_0"]  # type: ignore[attr-defined]

    # A row more leaves what is indexed as it is; a synthetic specimen of another split is refused by name.
    rows = list(read_manifest(manifest).rows)
    with pytest.raises(ValueError, match="specimen 'specimen_train_0' is in 2 splits"):
        write_manifest(manifest, [*rows, replace(rows[-1], specimen="specimen_train_0", split="val", name="x")])
    assert list(read_manifest(manifest).rows) == rows


def test_labels_that_were_converted_are_indexed_as_those_they_came_from(tmp_path: Path) -> None:
    """`seg3d convert` of image and labels, then manifest and index: the same instances, boxes, voxels and crops."""
    rng = np.random.default_rng(3)
    seeds = rng.random((14, 70, 90))
    label = ndimage.label(ndimage.gaussian_filter(seeds, (1, 3, 3)) > 0.51)[0].astype(np.uint32)
    label[:, :20, 70:] = np.iinfo(np.uint32).max
    label[label == 5] = 70_000  # ids with a gap
    image = rng.integers(0, 4000, label.shape).astype(np.uint16)
    for name, array in (("image", image), ("labels", label)):
        tifffile.imwrite(tmp_path / f"{name}.tif", array, photometric="minisblack")
        convert_volume(
            tmp_path / f"{name}.tif",
            tmp_path / f"{name}.zarr",
            spacing=SPACING,
            labels=name == "labels",
            chunk_size=(8, 32, 32),
            shard_size=(16, 64, 64),
            num_workers=2,
        )
    rows = {}
    for suffix in ("tif", "zarr"):
        spacing = ",spacing_z_um,spacing_y_um,spacing_x_um" if suffix == "tif" else ""
        text = f"name,image,label{spacing}\nv,image.{suffix},labels.{suffix}{',2,0.8,0.8' if spacing else ''}\n"
        (tmp_path / f"{suffix}.csv").write_text(text)
        manifest = read_manifest(tmp_path / f"{suffix}.csv")
        assert manifest.rows[0].spacing_um == SPACING
        rows[suffix] = build_index(manifest, tmp_path / f"{suffix}.sqlite", DataConfig(crop_size=CROP), progress=False)
    tif, zarr = rows["tif"], rows["zarr"]
    assert len(tif) == len(zarr) > 20
    assert tif.volume(1).intensity == zarr.volume(1).intensity
    assert tif.volume(1).num_instances == len(np.unique(label)) - 2
    for field in ("ids", "labels", "classes", "boxes", "voxels"):
        np.testing.assert_array_equal(getattr(tif.instances(1), field), getattr(zarr.instances(1), field))
    for crop_id in range(1, len(tif) + 1):
        assert tif.crop(crop_id) == zarr.crop(crop_id)
        np.testing.assert_array_equal(tif.crop_instances(crop_id).ids, zarr.crop_instances(crop_id).ids)
    for position in range(4):
        a, b = (CropDataset(index, num_samples=4)[position] for index in (tif, zarr))
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["targets"]["label"], b["targets"]["label"])
