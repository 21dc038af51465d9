"""A folder in which the documents' commands run: everything that they name as given is there, as small as can be.

It is made once: a specimen of `seg3d synth`, a training of two steps, a stack with its prediction, an index, a plan,
regions to annotate, a packed bundle. Who runs a command copies it first.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import tifffile
import torch
from doc_blocks import ROOT, blocks
from monai.bundle import ConfigParser
from scipy import ndimage
from small_networks import SMALL_NETWORK

from seg3d_monai.cli import main
from seg3d_monai.data import open_volume
from seg3d_monai.inference import Instances, predict_volume

DETECTORS = ("maskrcnn3d", "maskdino3d", "mask2former3d")
BUNDLES = (*DETECTORS, "pretrain3d")
SPACING = [2.0, 0.8, 0.8]
FAST: dict[str, Any] = {"device": "cpu", "amp": "off", "backbone#width": 8}
TRAINING = {"crop_size": [16, 32, 40], "train#dataset#num_samples": 4, "train#trainer#max_epochs": 1}
DETECTING = {"score_threshold": 0.1, "min_voxels": 5, "mask_threshold": 0.3}
NOTHING_FOUND = {"score_threshold": 0.9}
"""Of trainings: what two steps have taught is nothing to wait for."""
FEW_LAYERS = {"network_def#encoder_layers": 1, "network_def#decoder_layers": 1}
NETWORK: dict[str, dict[str, Any]] = {
    "maskdino3d": {**SMALL_NETWORK["maskdino3d"], **FEW_LAYERS, "network_def#denoising_queries": 4},
    "mask2former3d": {**SMALL_NETWORK["mask2former3d"], **FEW_LAYERS},
    "maskrcnn3d": {
        **SMALL_NETWORK["maskrcnn3d"],
        "network_def#max_detections": 20,
        "network_def#pre_nms_top_n": [100, 100],
        "network_def#post_nms_top_n": [50, 50],
    },
    "pretrain3d": {"network_def#decoder_channels": 12},
}
TUNING = {"candidates": {"mask_threshold": [0.4], "min_voxels": [5], "min_visible": []}}


def toy(use: str, bundle: str) -> str:
    """The overlay in the workspace that makes a bundle small.

    Args:
        use: train, tune, inference, suggest or plan.
        bundle: its name.
    """
    return f"toy/{use}_{bundle}.json"


def make(folder: Path) -> None:
    """Fill an empty folder, which has to be the one that the process stands in."""
    (folder / "bundles").symlink_to(ROOT / "bundles")
    _write_toys(folder / "toy")
    shapes = [word for split in ("train", "val", "test") for word in (f"--{split}_shape", "[20,64,64]")]
    counts = ["--train_volumes", "2", "--val_volumes", "1", "--test_volumes", "1", "--unlabelled_volumes", "1"]
    _do("synth", "DATA", *shapes, *counts, "--unlabelled_shape", "[20,64,64]", "--seed", "1")
    _do("train", "maskrcnn3d", "--dataset_dir", "DATA", "--output_dir", "RUN", "--overlay", toy("train", "maskrcnn3d"))
    (folder / "RUN" / "tuned.json").write_text('{"score_threshold": 0.4}\n')
    write_weights(folder / "PRETRAINED" / "model.pt", "pretrain3d")
    _write_stacks(folder)
    _write_embryos(folder / "BBBC050")
    _do("index", "DATA/manifest.csv", "crops.sqlite", "--crop_size", "[16,32,40]")
    _do("plan", "crops.sqlite", "--bundle", "maskrcnn3d", "--overlay", toy("plan", "maskrcnn3d"))
    words = ["--checkpoint", "RUN/model.pt", "--output", "round1", "--num", "2", "--candidates", "3"]
    overlay = ["--overlay", toy("suggest", "maskrcnn3d")]
    _do("annotate suggest", "crops.sqlite", *words, *overlay, "--crop_size", "[12,32,32]", "--margin", "[2,4,4]")
    correct(folder / "round1")
    shutil.copytree(ROOT / "bundles" / "maskrcnn3d", folder / "BUNDLE")
    (folder / "BUNDLE" / "eval").mkdir()
    for place in ("BUNDLE/eval/schema.json", "meta_schema_20240725.json"):  # the zoo's own is on GitHub
        (folder / place).write_text('{"type": "object"}')
    (recipe,) = blocks("json", ROOT / "docs" / "synthesis.md")
    (folder / "own.json").write_text(recipe.text)
    overlay = ["--overlay", toy("inference", "maskrcnn3d")]
    _do("bundle pack", "maskrcnn3d", "nuclei.zip", "--checkpoint", "RUN/model.pt", *overlay)
    with zipfile.ZipFile("nuclei.zip") as archive:
        archive.extractall("FOLDER")


def make_lab(folder: Path, workspace: Path) -> None:
    """Fill an empty folder with what a lab has: stacks of three specimens as planes, and the bundles."""
    (folder / "bundles").symlink_to(ROOT / "bundles")
    shutil.copytree(workspace / "toy", folder / "toy")
    (folder / "stacks").mkdir()
    whole = open_volume(workspace / "stack.ome.zarr").read((0, 0, 0, 40, 80, 80))[0]
    for brain in (1, 2, 3):
        for z, plane in enumerate(np.roll(whole, 13 * brain, axis=1)):
            tifffile.imwrite(folder / "stacks" / f"brain{brain}_Z{z:03}.tif", plane)


def write_weights(path: Path, bundle: str, overlays: tuple[str, ...] | None = None) -> None:
    """Weights of a bundle's network as it is before training.

    Args:
        path: file to write.
        bundle: its name.
        overlays: files of overlays; the last one is to make it small. Default is that one alone.
    """
    parser = ConfigParser()
    files = (toy("inference", bundle),) if overlays is None else overlays
    parser.read_config([f"bundles/{bundle}/configs/inference.json", *files])
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)


def bright_parts(block: torch.Tensor, roi: tuple[int, ...]) -> Instances:
    """A predictor that needs no training: connected voxels above a grey value."""
    labels, count = ndimage.label(block[0].numpy() > 400)
    places = ndimage.find_objects(labels)
    corners = [[side.start for side in place] + [side.stop for side in place] for place in places]
    return Instances(
        boxes=np.array(corners, dtype=float).reshape(-1, 6),
        scores=np.linspace(0.95, 0.55, count),
        classes=np.zeros(count, dtype=int),
        masks=[labels[place] == number for number, place in enumerate(places, start=1)],
    )


def _do(command: str, *words: str) -> None:
    assert main([*command.split(), *words]) == 0, f"seg3d {command} failed"


def _write_toys(folder: Path) -> None:
    folder.mkdir()
    for bundle in BUNDLES:
        network, detects = NETWORK[bundle], bundle in DETECTORS
        scores: dict[str, Any] = NOTHING_FOUND if detects else {"validate#dataset#num_samples": 2}
        files: dict[str, dict[str, Any]] = {
            "train": {**FAST, **TRAINING, **network, **scores},
            "tune": {**FAST, **TRAINING, **network, **TUNING, **scores},
            "inference": {**FAST, **network, **(DETECTING if detects else {})},
            "suggest": {**FAST, **network},
            "plan": {"backbone#width": 8, **network},
        }
        if bundle == "maskrcnn3d":
            files["tune"]["network_candidates"] = {"detection_nms_threshold": []}
            files["inference"]["network_def#mask_scoring"] = False  # masks of two steps are clear nowhere
        for use, content in files.items():
            (folder / f"{use}_{bundle}.json").write_text(json.dumps(content))
    (folder / "plan_all.json").write_text('{"backbone#width": 8}')


def _write_stacks(folder: Path) -> None:
    """The test volume as a stack in each form that the documents name, with objects and truth.

    In capitals the volume itself; in small letters a larger one, of which they show regions.
    """
    image = open_volume("DATA/test_0/image.zarr").read((0, 0, 0, 20, 64, 64))[0]
    labels = open_volume("DATA/test_0/labels.zarr").read((0, 0, 0, 20, 64, 64))[0].astype(np.uint32)
    write_tiff(folder / "IMAGE.tif", image)
    write_tiff(folder / "TRUTH.tif", labels)
    write_tiff(folder / "ATLAS.tif", 1 + (np.indices(labels.shape)[0] // 10).astype(np.uint16))
    write_predicted(image, ("STACK", "STACK.ome.zarr"), "OUT.zarr")
    write_tiff(folder / "truth.tif", np.tile(labels, (3, 2, 2)))
    write_tiff(folder / "atlas.tif", 1 + (np.indices((16, 16, 16))[0] // 8).astype(np.uint16))
    write_predicted(np.tile(image, (3, 2, 2)), ("IMAGE", "stack.ome.zarr"), "cells.zarr")
    _do("measure", "cells.zarr", "stack.ome.zarr", "--atlas", "atlas.tif", "--atlas_spacing", "[7.5,6.4,6.4]")
    write_tiff(folder / "brain_mask.tif", np.ones((6, 12, 12), np.uint8))
    nibabel.save(nibabel.Nifti1Image(labels.T.astype(np.int32), np.diag([0.8, 0.8, 2, 1])), folder / "labels.nii.gz")
    (folder / "planes").mkdir()
    for z, plane in enumerate(image[:6]):
        tifffile.imwrite(folder / "planes" / f"brain_C00_Z{z:04}.tif", plane)


def write_predicted(
    image: npt.NDArray[Any], names: tuple[str, ...], output: str, block_size: tuple[int, int, int] = (32, 64, 64)
) -> None:
    """OME-Zarrs of a volume, and its objects as `seg3d predict` writes them."""
    write_tiff(Path("whole.tif"), image)
    _do("convert", "whole.tif", "whole.zarr", "--spacing", json.dumps(SPACING))
    for name in names:
        shutil.copytree("whole.zarr", name)
    shutil.rmtree("whole.zarr")
    predict_volume(names[0], bright_parts, output, block_size=block_size, halo=(8, 16, 16))


def _write_embryos(folder: Path) -> None:
    """`NAME/image.tif` and `NAME/labels.tif`, as BBBC050: a volume of each of a few embryos."""
    for number, name in enumerate(("Emb01_t101", "Emb02_t101", "Emb10_t501", "Emb11_t501")):
        (folder / name).mkdir(parents=True)
        for kind in ("image", "labels"):
            voxels = tifffile.imread(f"DATA/train_{number % 2}/{kind}.tif")
            write_tiff(folder / name / f"{kind}.tif", np.roll(voxels, number, axis=0))


def correct(folder: Path) -> None:
    """Do as an annotator with regions that `seg3d annotate suggest` wrote: one object more, in the middle."""
    for file in folder.glob("*/labels.tif"):
        labels = tifffile.imread(file)
        middle = tuple(slice(size // 2 - 3, size // 2 + 3) for size in labels.shape)
        labels[middle] = labels[labels < np.iinfo(labels.dtype).max].max() + 1
        tifffile.imwrite(file, labels)


def write_tiff(path: Path, voxels: npt.NDArray[Any]) -> None:
    """A TIFF that names its axes and no voxel size."""
    tifffile.imwrite(path, voxels, metadata={"axes": "ZYX"})
