"""The description of one layer. It must not know napari."""

from __future__ import annotations

from typing import Any, NamedTuple


class LayerData(NamedTuple):
    """A layer as napari's `Layer.create` takes it.

    data: an array, a list of arrays (the levels, finest first), or points [N, axes].
    options: its keyword arguments; `scale` and `translate` take voxels to micrometres. What napari takes only after a
        layer was made stands in `metadata`: `contour`, and `seen`, the range of the intensities.
    kind: "image", "labels" or "points".
    """

    data: Any
    options: dict[str, Any]
    kind: str
