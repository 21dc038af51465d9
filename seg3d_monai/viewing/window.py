"""Layers in napari: a window, or a picture of what it would show. The only file that imports napari.

It must not know files or formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seg3d_monai.user_errors import write_whole
from seg3d_monai.viewing.display import need_display
from seg3d_monai.viewing.layer_data import LayerData

PICTURE = (900, 1200)
"""(height, width) of a screenshot in pixels."""
_MISSING = 'seg3d view needs napari with Qt, {}; pip install "seg3d_monai[view]"'


def show(layers: Sequence[LayerData], *, title: str = "seg3d view", screenshot: Path | None = None) -> None:
    """Open a window and wait until it is closed, or write a picture and open none.

    Args:
        layers: of `build_layers`, the lowest first.
        title: of the window.
        screenshot: PNG to write; None opens a window.

    Raises:
        ImportError: napari or Qt is not installed.
        ValueError: there is no display.
    """
    check_napari()
    need_display(for_picture=screenshot is not None)
    import napari

    viewer = napari.Viewer(title=title, show=screenshot is None)
    try:
        fill(viewer, layers)
        if screenshot is not None:
            _take_picture(viewer, screenshot)
    except BaseException:
        viewer.close()
        raise
    if screenshot is None:
        napari.run()
    else:
        viewer.close()


def check_napari() -> None:
    """See that napari and a binding of Qt are installed.

    Raises:
        ImportError: one of them is not.
    """
    try:
        import napari  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING.format(f"which is not installed ({error})")) from error
    try:
        import qtpy.QtWidgets  # noqa: F401
    except Exception as error:  # qtpy has kinds of its own
        raise ImportError(_MISSING.format(f"and Qt cannot be imported ({type(error).__name__})")) from error


def fill(viewer: Any, layers: Sequence[LayerData]) -> None:
    """Add layers to a viewer, or to a `ViewerModel`, which has no window.

    Args:
        viewer: napari's.
        layers: of `build_layers`, the lowest first.
    """
    from napari.layers import Layer

    for one in layers:
        layer = Layer.create(*one)
        extra = one.options.get("metadata", {})
        if "contour" in extra:
            layer.contour = extra["contour"]
        if "seen" in extra:
            layer.contrast_limits_range = extra["seen"]
        # Nothing is changed here: annotations are made in files of their own.
        layer.editable = one.kind == "image"
        viewer.add_layer(layer)
    labels = [layer for layer, one in zip(viewer.layers, layers, strict=True) if one.kind == "labels"]
    if labels:
        viewer.layers.selection.active = labels[0]
    viewer.scale_bar.visible = True
    viewer.text_overlay.visible = True
    viewer.tooltip.visible = True
    viewer.mouse_drag_callbacks.append(_tell_clicked)


def _tell_clicked(viewer: Any, event: Any) -> None:
    """Write the row of the object that was clicked into the corner of the canvas."""
    for layer in reversed(list(viewer.layers)):
        features = getattr(layer, "features", None)
        if features is None or not layer.visible or not len(features):
            continue
        value = layer.get_value(
            event.position, view_direction=event.view_direction, dims_displayed=event.dims_displayed, world=True
        )
        text = clicked_text(features, value)
        if text:
            viewer.text_overlay.text = text
            return
    viewer.text_overlay.text = ""


def clicked_text(features: pd.DataFrame, value: Any) -> str:
    """The row of one object as lines.

    Args:
        features: of a layer; with a column `index` of labels, without it of points, in their order.
        value: what lies under the mouse: a label or a number of a point, with its level before it in several; or None.
    """
    if isinstance(value, tuple):
        value = value[-1]
    if value is None:
        return ""
    rows = features[features["index"] == value] if "index" in features else features.iloc[[int(value)]]
    if not len(rows):
        return ""
    row: Mapping[str, Any] = rows.iloc[0].to_dict()
    names = {"index": "id"}
    ordered = sorted(row, key=lambda name: name not in ("id", "index"))
    return "\n".join(f"{names.get(name, name)}: {_shown(row[name])}" for name in ordered)


def _shown(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)


def _take_picture(viewer: Any, file: Path) -> None:
    from PIL import Image
    from qtpy import QtCore, QtWidgets

    qt: Any = QtCore  # its names come from whichever binding is installed
    # A window that was never shown draws nothing; this one is, but not on the screen.
    viewer.window._qt_window.setAttribute(qt.Qt.WidgetAttribute.WA_DontShowOnScreen, True)
    viewer.show()
    viewer.reset_view()
    # That fits the window, which is smaller than the picture. Zoom is pixels per micrometre.
    extent, shown = viewer.layers.extent, list(viewer.dims.displayed)
    size = (extent.world[1] - extent.world[0] + extent.step)[shown]
    viewer.camera.zoom = 0.95 * float(np.min(np.array(PICTURE) / size[-2:]))
    # Levels of a pyramid are chosen when the canvas is drawn, so it is drawn once before.
    viewer.screenshot(size=PICTURE, canvas_only=True, flash=False)
    QtWidgets.QApplication.processEvents()
    picture = BytesIO()
    pixels = viewer.screenshot(size=PICTURE, canvas_only=True, flash=False)
    Image.fromarray(pixels).save(picture, format="png")
    write_whole(file, picture.getvalue())
