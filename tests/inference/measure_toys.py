"""A stack with objects, as `seg3d predict` leaves it, and its measurements."""

import numpy as np
import pandas as pd
from inference_toys import crop, tissue_seeds, voronoi

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference.blocks import BlockPlan
from seg3d_monai.inference.measure import measure_objects
from seg3d_monai.inference.writer import LabelWriter

SHAPE = (11, 23, 17)
SPACING = (4.0, 1.5, 1.0)
BLOCK_SIZES = [(64, 256, 256), (4, 9, 5), (1, 23, 17), (11, 1, 6)]


def write_output(folder, labels, spacing_um=SPACING, image=None):
    """An OUTPUT as `seg3d predict` writes it."""
    plan = BlockPlan.make(shape=labels.shape, block_size=(4, 8, 8), halo=1)
    kind = None if image is None else (image.shape[0], image.dtype)
    writer = LabelWriter(
        folder, plan, dtype="uint32", spacing_um=spacing_um, version="0.5", facts={"provenance": {}}, image=kind
    )
    writer.create()
    for block in plan:
        writer.write(block, crop(labels, block.owned))
        if image is not None:
            writer.copy(block, image[:, *(slice(a, b) for a, b in zip(block.owned[:3], block.owned[3:], strict=True))])
    writer.publish()
    return folder


def crowded(shape=SHAPE):
    """Many touching objects, some in two pieces, with gaps between the ids and some background."""
    labels = voronoi(tissue_seeds(shape, (4, 6, 5), 0), (0, 0, 0, *shape)) * 3
    labels[np.random.default_rng(1).random(shape) < 0.1] = 0
    return labels


def pictures(shape=SHAPE, dtype=np.uint16):
    return np.random.default_rng(2).integers(0, 65536, (2, *shape)).astype(dtype)


def measured(folder, labels, image, spacing_um=SPACING, **options):
    output = write_output(folder / "x.zarr", labels, spacing_um)
    if isinstance(image, np.ndarray):
        image = ArrayVolume(image, spacing_um)
    return pd.read_parquet(measure_objects(output, image, progress=False, **options))
