"""Two steps of scripts/quickstart that need Python: the watershed baseline, and the picture.

`watershed IMAGE OUTPUT.tif` segments a stack without learning; `picture IMAGE TRUTH PREDICTION OUTPUT.png` draws three
orthogonal slices with the outlines of both label volumes.
"""

import sys

import numpy as np
import tifffile

from seg3d_monai.data import open_volume
from seg3d_monai.report.slices import save_slices
from seg3d_monai.report.watershed import otsu_watershed


def read_whole(path: str) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The first channel [Z, Y, X] of a stack and its voxel size in micrometres, (1, 1, 1) where unknown."""
    volume = open_volume(path)
    return volume.read((0, 0, 0, *volume.shape[1:]))[0], volume.spacing_um or (1.0, 1.0, 1.0)


def watershed(image: str, output: str) -> None:
    """Write the labels of Otsu's threshold and a distance watershed."""
    voxels, spacing_um = read_whole(image)
    tifffile.imwrite(output, otsu_watershed(voxels, spacing_um), compression="zlib", metadata={"axes": "ZYX"})


def picture(image: str, truth: str, prediction: str, output: str) -> None:
    """Draw slices with the outlines of truth and prediction."""
    voxels, spacing_um = read_whole(image)
    true, predicted = read_whole(truth)[0], read_whole(f"{prediction}/labels/instances")[0]
    save_slices(output, voxels, true, predicted, spacing_um, "outlines of truth and prediction")


if __name__ == "__main__":
    step = watershed if sys.argv[1] == "watershed" else picture
    step(*sys.argv[2:])
