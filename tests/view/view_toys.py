"""A specimen of few voxels, no cube and anisotropic, with its prediction: numbers that can be counted by hand."""

import json

import numpy as np
import pandas as pd
import zarr

from seg3d_monai.data import Volume
from seg3d_monai.data.pyramid import create_level, multiscale_metadata, put_attributes

SHAPE = (6, 20, 28)
SPACING = (2.0, 0.5, 0.4)
BRIGHT = (3, 9, 14)
WORLD = (6.0, 4.5, 5.6)  # BRIGHT times SPACING
COARSE = (3, 4, 7)  # the voxel of level 1, of factors (1, 2, 2), that holds it
COARSE_WORLD = (6.0, 4.25, 5.8)  # centre of voxels 8, 9 along y and 14, 15 along x


def spot(shape=SHAPE, at=BRIGHT, value=200, dtype=np.uint16):
    """An array of zeros with one voxel that is not."""
    array = np.zeros(shape, dtype)
    array[at] = value
    return array


def write_ome(folder, levels, factors=((1, 1, 1),), axes="zyx", spacing=SPACING, name="image"):
    """An OME-Zarr of given levels."""
    root = zarr.open_group(folder, mode="w", zarr_format=3)
    metadata = multiscale_metadata(name, axes=axes, factors=factors, spacing_um=spacing, kind="mean", version="0.5")
    put_attributes(root, "0.5", {"multiscales": [metadata]})
    for number, array in enumerate(levels):
        create_level(
            root,
            str(number),
            shape=array.shape,
            dtype=array.dtype,
            axes=axes,
            chunks=(2, 8, 8),
            shards=None,
            version="0.5",
        )
        root[str(number)][...] = array
    return str(folder)


def write_pyramid(folder, value=200, dtype=np.uint16):
    """The bright voxel at full resolution and at a level of half of it along y and x."""
    coarse = spot((6, 10, 14), COARSE, value, dtype)
    return write_ome(folder, [spot(value=value, dtype=dtype), coarse], [(1, 1, 1), (1, 2, 2)])


def rows(*centroids, **columns):
    """An object table, ids from 1."""
    places = np.array(centroids, float).reshape(-1, 3)
    table = pd.DataFrame({"id": np.arange(1, len(places) + 1), "score": np.linspace(0.5, 0.9, len(places))})
    for axis, letter in enumerate("zyx"):
        table[f"{letter}1"] = np.floor(places[:, axis]).astype(int)
        table[f"{letter}2"] = np.floor(places[:, axis]).astype(int) + 1
        table[f"centroid_{letter}"] = places[:, axis]
    table["volume_voxels"] = 1
    return table.assign(**columns)


def write_prediction(folder, labels, table, factors=((1, 1, 1),), axes="zyx", spacing=SPACING):
    """What `seg3d predict` writes: labels/instances, and the table beside."""
    root = zarr.open_group(folder, mode="w", zarr_format=3)
    put_attributes(root, "0.5", {})
    put_attributes(root.create_group("labels"), "0.5", {"labels": ["instances"]})
    write_ome(folder / "labels" / "instances", labels, factors, axes, spacing)
    table.to_parquet(folder.with_name(f"{folder.name.removesuffix('.zarr')}.instances.parquet"))
    return str(folder)


def write_seams(file, *centroids):
    """A report of seam-check."""
    cells = [
        {
            "kind": kind,
            "at_face": True,
            "first_ids": [1],
            "second_ids": [2, 3],
            "box": [0] * 6,
            "centroid": [float(n) for n in place],
            "iou": 0.5,
            "shift": None,
        }
        for kind, place in zip(("split", "lost", "split"), centroids, strict=False)
    ]
    file.write_text(json.dumps({"disagreements": cells}))
    return str(file)


def by_name(layers):
    return {layer.options["name"]: layer for layer in layers}


def bright_world(layer):
    """World coordinates of the only voxels of a layer that are not 0, or of its points."""
    data = layer.data[0] if isinstance(layer.data, list) else layer.data
    found = data if layer.kind == "points" else np.argwhere(np.asarray(data))
    return np.asarray(found) * layer.options["scale"] + layer.options["translate"]


class CountingVolume(Volume):
    """A volume without voxels, larger than any memory, that counts what is read of it."""

    def __init__(self, shape, dtype=np.uint16, chunk_shape=(16, 64, 64)):
        self.shape, self.dtype, self.chunk_shape = shape, np.dtype(dtype), chunk_shape
        self.spacing_um, self.path = SPACING, None
        self.num_voxels = 0

    def read(self, roi):
        z1, y1, x1, z2, y2, x2 = roi
        extent = (self.shape[0], z2 - z1, y2 - y1, x2 - x1)
        self.num_voxels += int(np.prod(extent))
        depth = np.arange(z1, z2)[None, :, None, None]
        return np.broadcast_to(depth, extent).astype(self.dtype)
