"""Objects of a table as layers: their centroids as points, their rows and colours for predicted labels, seams.

It must not know files or napari.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from seg3d_monai.viewing.layer_data import LayerData
from seg3d_monai.viewing.place import Place
from seg3d_monai.viewing.stack import Floats
from seg3d_monai.viewing.table import CENTROID, GREY, column_colors, median_diameter

OBJECTS, SEAMS = "objects", "seams"
MOST_COLORED = 2**16
"""Labels that napari colours one by one: more need numba and minutes."""
_POINT_SHARE = 0.25  # of a median object's diameter
_POINT_VOXELS = 4.0
_logger = logging.getLogger(__name__)


def prediction_options(
    table: pd.DataFrame | None, color_by: str | None, place: Place, factor: Floats
) -> dict[str, Any]:
    """Options of the layer of predicted labels: rows of the table for each id, and colours.

    Args:
        table: of the objects, None where there is none.
        color_by: its column that gives the colours, None for napari's own.
        place: what is viewed.
        factor: (z, y, x) voxels of full resolution per voxel of the table.
    """
    options: dict[str, Any] = {"opacity": 0.5}
    if table is None:
        return options
    seen = viewed(table, place, factor, margin=True)
    ids = seen["id"].to_numpy(np.int64)
    options["features"] = seen.drop(columns="id").assign(index=ids).reset_index(drop=True)
    if color_by is None:
        return options
    if len(seen) > MOST_COLORED:
        _logger.warning(
            "--color_by colours the points only: napari colours up to %d labels, %d are viewed; view a part with --roi",
            MOST_COLORED,
            len(seen),
        )
        return options
    colors = column_colors(seen[color_by])
    options["colormap"] = {
        **{number: tuple(color) for number, color in zip(ids.tolist(), colors.rgba.tolist(), strict=True)},
        0: (0.0, 0.0, 0.0, 0.0),
        None: GREY,
    }
    return options | {"opacity": 0.7, "name": f"prediction, {colors.text}"}


def object_layer(
    table: pd.DataFrame,
    color_by: str | None,
    place: Place,
    factor: Floats,
    times: Sequence[int],
    time: int | Literal["all"],
) -> LayerData:
    """Objects as points at their centroids, each with its row of the table.

    Args:
        table: of the objects, with a column `time` in a series.
        color_by: column that gives the colours.
        place: what is viewed.
        factor: (z, y, x) voxels of full resolution per voxel of the table.
        times: the time points of a series.
        time: which of them is viewed, or "all".
    """
    if "time" in table and time != "all":
        table = table[table["time"] == time]
    seen = viewed(table, place, factor)
    centroid = seen[CENTROID].to_numpy(np.float64).reshape(-1, 3)
    is_series = place.is_series and "time" in table
    if is_series:
        step = seen["time"].map({one: index for index, one in enumerate(times)}).to_numpy(np.float64)
        centroid = np.concatenate([step[:, None], centroid], axis=1)
    spacing = [s * f for s, f in zip(place.spacing, factor, strict=True)]
    diameter = median_diameter(seen, spacing)
    size = _POINT_VOXELS if diameter is None else max(1.0, _POINT_SHARE * diameter)
    options = _point_options(OBJECTS, seen, size) | {"face_color": "white"}
    if color_by is not None and len(seen):
        options |= {"face_color": column_colors(seen[color_by]).rgba, "border_color": "white"}
    return LayerData(centroid, {**options, **place.layer(factor, is_series=is_series)}, "points")


def seam_layer(seams: pd.DataFrame, place: Place, factor: Floats) -> LayerData:
    """Places where two grids of blocks disagree, as rings coloured by kind.

    Args:
        seams: of `read_seams`.
        place: what is viewed.
        factor: (z, y, x) voxels of full resolution per voxel of the report.
    """
    seen = viewed(seams, place, factor)
    options = _point_options(SEAMS, seen, 3 * _POINT_VOXELS)
    options |= {"face_color": "transparent", "symbol": "ring", "border_color": "red"}
    if len(seen):
        options["border_color"] = options["face_color"] = column_colors(seen["kind"]).rgba
    where = place.layer(factor)
    return LayerData(seen[CENTROID].to_numpy(np.float64).reshape(-1, 3), {**options, **where}, "points")


def viewed(table: pd.DataFrame, place: Place, factor: Floats, margin: bool = False) -> pd.DataFrame:
    """Objects of the viewed region.

    Args:
        table: of the objects.
        place: what is viewed.
        factor: (z, y, x) voxels of full resolution per voxel of the table.
        margin: whether those count whose box, where the table has it, reaches in; else those whose centroid lies in it.
    """
    centroid = table[CENTROID].to_numpy(float).reshape(-1, 3)
    box = [f"{axis}{end}" for end in (1, 2) for axis in "zyx"]
    if place.roi is None or not margin or not set(box) <= set(table):
        return table[place.inside(centroid, factor)]
    corners = table[box].to_numpy(float).reshape(-1, 6)
    low, high = (np.asarray(place.roi[k : k + 3]) * place.shown.factor / np.asarray(factor) for k in (0, 3))
    return table[((corners[:, :3] < high) & (corners[:, 3:] > low)).all(axis=1)]


def _point_options(name: str, features: pd.DataFrame, size: float) -> dict[str, Any]:
    return {
        "name": name,
        "features": features.reset_index(drop=True),
        "size": size,
        "border_color": "black",
        "border_width": 0.1,
        "blending": "translucent_no_depth",
    }
