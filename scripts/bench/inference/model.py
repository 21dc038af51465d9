"""The model whose time is measured: the bundle's tiny Mask R-CNN with its shipped inference.json, briefly trained."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

from bench.inference.stacks import SPACING_UM, Triple, write_tiled
from bench.models.training import BUNDLES
from seg3d_monai.data.synthetic import make_volume
from seg3d_monai.engine import load_weights
from seg3d_monai.inference import InstancePredictor

BUNDLE = BUNDLES / "maskrcnn3d"
SPECIMEN_SHAPE, CHUNKS = (128, 384, 384), (32, 64, 64)
QUICK_SPECIMEN_SHAPE = (32, 64, 64)
QUICK_SETTINGS: dict[str, Any] = {"block_size": [16, 48, 48], "halo": [4, 8, 8]}


def train(folder: Path, minutes: float) -> Path:
    """Train the bundle by its own command on the built-in synthetic specimen.

    Args:
        folder: for the run's files.
        minutes: how long.

    Returns:
        The weights, without which the network would find nothing and all that follows it would cost nothing.
    """
    command = [sys.executable, "-m", "monai.bundle", "run", "training"]
    options = {"config_file": BUNDLE / "configs" / "train.json", "output_dir": folder, "max_minutes": minutes}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    subprocess.run([*command, *words], check=True, cwd=BUNDLES.parent, stdout=sys.stderr)
    return folder / "model.pt"


def read_predictor(checkpoint: Path | None, is_quick: bool) -> tuple[InstancePredictor, dict[str, Any]]:
    """The bundle's predictor and the options of its configuration that say how a stack is cut.

    Args:
        checkpoint: weights; None leaves the network as it is made.
        is_quick: smaller blocks.
    """
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "inference.json")
    parser["device"] = "cpu"
    for key, value in QUICK_SETTINGS.items() if is_quick else ():
        parser[key] = value
    parser.parse(True)
    torch.manual_seed(0)
    predictor = parser.get_parsed_content("inferer")
    if checkpoint is not None:
        load_weights(predictor.network, checkpoint)
    return predictor, {key: parser[key] for key in ("block_size", "halo")}


def write_specimen_stack(path: Path, shape: Triple, is_quick: bool) -> Path:
    """Write a stack of synthetic nuclei that repeats one specimen.

    Args:
        path: of the Zarr array to write.
        shape: (Z, Y, X) voxels.
        is_quick: a smaller specimen.
    """
    image, _ = make_volume(QUICK_SPECIMEN_SHAPE if is_quick else SPECIMEN_SHAPE, seed=7, spacing_um=SPACING_UM)
    return write_tiled(path, image.astype(np.uint16), shape, CHUNKS)
