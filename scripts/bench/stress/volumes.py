"""The volumes: nuclei of three densities to train on, others to count, with planes as thick as is asked.

A length is the same for every ratio of the voxel's depth to its width; only the sampling differs, and with it the
number of planes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from seg3d_monai.data import read_manifest, write_manifest
from seg3d_monai.data.synthetic import NucleiModel, write_specimen
from seg3d_monai.planning.touching import touches_another

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

WIDTH_UM = 0.7
PROPORTIONS = (0.8, 1.0, 1.25)
"""Lengths (z, y, x) of a test volume, of those of a cube of its size."""
NUCLEI = {
    "sparse": NucleiModel(density=3e-5, attach_prob=0.0),
    "crowded": NucleiModel(density=2e-4),
    "packed": NucleiModel(density=7e-4, attach_prob=0.95),
}
"""Nuclei of 10 to 14 micrometres; packed ones take about half of the volume, and nearly all touch another one."""
TRAIN_UM, QUICK_TRAIN_UM = (45.0, 67.0, 90.0), (21.0, 34.0, 45.0)
TRAIN_VOLUMES = {"sparse": 6, "crowded": 3, "packed": 2}
"""How many volumes of each density are trained on; one more of each is validated on."""
TESTS = (("sparse", 10), ("crowded", 50), ("packed", 150), ("packed", 400))
QUICK_TESTS = (("packed", 12),)
SEEDS_APART = 100
"""Seeds between those of two runs: every specimen of a run has its own."""


@dataclass(frozen=True)
class StressVolume:
    """A volume to predict.

    Attributes:
        name: density and objects that were asked for.
        num_asked: these objects; the placement does not always reach them.
        shape: (z, y, x) voxels.
        image: OME-Zarr.
        label: OME-Zarr.
    """

    name: str
    num_asked: int
    shape: Triple
    image: Path
    label: Path

    def described(self) -> dict[str, Any]:
        """What the volume really holds."""
        row = read_manifest(self.image.parents[1] / "manifest.csv").rows[0]
        labels = row.open_label().read((0, 0, 0, *self.shape))[0]
        return {"num_asked": self.num_asked, "shape": list(self.shape), **crowding(labels)}


def spacing_of(ratio: float) -> Spacing:
    """Voxel size (z, y, x) in micrometres whose depth is so many times its width."""
    return (WIDTH_UM * ratio, WIDTH_UM, WIDTH_UM)


def shape_of(lengths_um: tuple[float, float, float], spacing: Spacing) -> Triple:
    """Voxels (z, y, x) over these lengths."""
    z, y, x = (max(1, round(length / size)) for length, size in zip(lengths_um, spacing, strict=True))
    return z, y, x


def shape_for(num_objects: int, density: float, spacing: Spacing) -> Triple:
    """Voxels (z, y, x) of a volume that holds so many objects at so many a cubic micrometre."""
    side = (num_objects / density) ** (1 / 3)
    z, y, x = (part * side for part in PROPORTIONS)
    return shape_of((z, y, x), spacing)


def write_training(folder: Path, ratio: float, seed: int, is_quick: bool) -> Path:
    """Write the volumes to train and validate on, of all densities, where they are not there yet.

    Args:
        folder: for a specimen of each density, and the manifest of all of them.
        ratio: depth of a voxel over its width.
        seed: of the run.
        is_quick: few and small ones.

    Returns:
        The manifest.
    """
    spacing, rows = spacing_of(ratio), []
    shape = shape_of(QUICK_TRAIN_UM if is_quick else TRAIN_UM, spacing)
    for number, (density, nuclei) in enumerate(NUCLEI.items()):
        manifest = write_specimen(
            folder / density,
            seed=SEEDS_APART * seed + number,
            spacing_um=spacing,
            train_volumes=1 if is_quick else TRAIN_VOLUMES[density],
            train_shape=shape,
            test_volumes=0,
            test_shape=shape,  # else volumes would lie at the depths of a deeper stack
            nuclei=nuclei,
        )
        rows += [
            replace(row, name=f"{density}_{row.name}", specimen=f"{density}_{row.specimen}")
            for row in read_manifest(manifest).rows
        ]
    return write_manifest(folder / "manifest.csv", rows)


def write_tests(folder: Path, ratio: float, seed: int, is_quick: bool) -> Iterator[StressVolume]:
    """Write the volumes to predict, where they are not there yet; arguments as of `write_training`."""
    spacing = spacing_of(ratio)
    for number, (density, num_objects) in enumerate(QUICK_TESTS if is_quick else TESTS, start=len(NUCLEI)):
        name, nuclei = f"{density}_{num_objects}", NUCLEI[density]
        shape = shape_for(num_objects, nuclei.density, spacing)
        place = folder / name
        write_specimen(
            place,
            seed=SEEDS_APART * seed + number,
            spacing_um=spacing,
            train_volumes=0,
            val_volumes=0,
            test_shape=shape,
            nuclei=nuclei,
        )
        yield StressVolume(name, num_objects, shape, place / "test_0" / "image.zarr", place / "test_0" / "labels.zarr")


def crowding(labels: NDArray[np.integer]) -> dict[str, Any]:
    """How many objects a volume holds and how they lie.

    Args:
        labels: [Z, Y, X], 0 background, ids compact from 1.

    Returns:
        num_objects; labelled_share of the voxels; of the objects touching_share, that have a face in common with
        another one, and cut_share, that reach the border of the volume; median_planes, z extent of the median object.
    """
    boxes = find_objects(labels)
    touching, cut, planes = 0, 0, []
    for number, box in enumerate(boxes, start=1):
        around = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        touching += touches_another(labels[around], number, ignore=-1)
        cut += any(side.start == 0 or side.stop == size for side, size in zip(box, labels.shape, strict=True))
        planes.append(box[0].stop - box[0].start)
    count = len(boxes)
    return {
        "num_objects": count,
        "labelled_share": float((labels > 0).mean()),
        "touching_share": touching / count if count else 0.0,
        "cut_share": cut / count if count else 0.0,
        "median_planes": float(np.median(planes)) if count else 0.0,
    }
