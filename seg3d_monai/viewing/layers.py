"""What is viewed, as plain descriptions of layers: image channels, predicted and true labels, objects, seams.

A description is what napari's `Layer.create` takes: data, options, kind. Nothing here imports napari, and no voxels are
read but a sample for the contrast.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from seg3d_monai.data.volume import Roi, Volume, check_roi, check_spacing
from seg3d_monai.viewing.layer_data import LayerData
from seg3d_monai.viewing.lazy import LazyArray
from seg3d_monai.viewing.objects import object_layer, prediction_options, seam_layer
from seg3d_monai.viewing.place import Place
from seg3d_monai.viewing.prediction import inner_labels, is_labels_alone, prediction_labels, prediction_table
from seg3d_monai.viewing.stack import AnyPath, Floats, Level, Stack, open_stack
from seg3d_monai.viewing.table import check_column, check_table, read_seams, read_table

IMAGE, PREDICTION, TRUTH = "image", "prediction", "truth"
CHANNEL_COLORS = ("green", "magenta", "cyan", "yellow", "red", "blue")
TRUTH_COLOR = (1.0, 0.25, 1.0, 1.0)
"""Pink: no colour of viridis and no grey."""
PERCENTILES = (1.0, 99.8)
SAMPLE = (16, 256, 256)
"""Voxels in the middle of what is viewed from which the contrast is taken, at most."""
_logger = logging.getLogger(__name__)
Source = AnyPath | Volume | Sequence[Volume]


def build_layers(
    image: Source,
    prediction: Source | None = None,
    *,
    truth: Source | None = None,
    table: AnyPath | pd.DataFrame | None = None,
    roi: Sequence[int] | None = None,
    level: int | str | None = None,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    channels: Sequence[int] | int | None = None,
    time: int | Literal["all"] = 0,
    color_by: str | None = None,
    seam_report: AnyPath | None = None,
) -> list[LayerData]:
    """Describe the layers of a view, the lowest first.

    Labels may have the shape of any level of the image; they, their table and a report of seams lie where that level
    does. Voxels that are not annotated are background of the truth.

    Args:
        image: path as `open_volume` takes it, a volume, or the volumes of its levels, finest first.
        prediction: what `seg3d predict` wrote, or labels of the same kinds as `image`.
        truth: true labels.
        table: .parquet or .csv, or the table itself, with `id` and the centroids in voxels of the prediction; None is
            the one beside the prediction, if there is one.
        roi: (z1, y1, x1, z2, y2, x2) in voxels of the level; then one level alone is shown.
        level: the one that is shown alone, as `open_volume` takes it; None is all from full resolution on.
        spacing: (z, y, x) micrometres per voxel of the level; None takes the files'.
        axes: order of the image's stored axes.
        channels: of the image; None shows all.
        time: time point, or "all" for layers with an axis of time.
        color_by: column of the table by which predicted labels and objects are coloured.
        seam_report: X.json of `seg3d seam-check`.

    Returns:
        The layers in the order in which a viewer adds them.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: shapes, time points, the region, the table or the column do not fit, or labels are no integers.
    """
    if isinstance(image, str | os.PathLike) and prediction is None and is_labels_alone(image):
        raise ValueError(f"image {str(image)!r} is a prediction and holds no image; give the image first, then it")
    stack = open_stack(image, axes=axes, channels=channels)
    shown = stack.find_level(0 if level is None else level)
    labels = {}
    if prediction is not None:
        found = prediction_labels(prediction) if isinstance(prediction, str | os.PathLike) else prediction
        labels[PREDICTION] = open_stack(found)
    if truth is not None:
        labels[TRUTH] = open_stack(inner_labels(truth) if isinstance(truth, str | os.PathLike) else truth)
    bases = {name: _base(name, one, stack) for name, one in labels.items()}
    place = Place(
        **_spacing(stack, shown, spacing, [(one, bases[name]) for name, one in labels.items()]),
        shown=stack.levels[shown],
        roi=None if roi is None else _checked_roi(roi, stack.levels[shown]),
        is_single=level is not None or roi is not None,
        is_series=time == "all" and stack.num_times > 1,
    )
    if time != "all" and not 0 <= time < stack.num_times:
        raise ValueError(f"time={time} is not there; choose 0 to {stack.num_times - 1}, or all")
    objects = _object_table(prediction, table)
    if color_by is not None:
        if objects is None:
            raise ValueError(f"--color_by {color_by}: there is no object table; give it with --table")
        check_column(objects, color_by)
    layers = _image_layers(stack, shown, place, time)
    base = bases.get(PREDICTION, stack.levels[shown].factor)
    times = _times(labels[PREDICTION], stack, objects) if PREDICTION in labels else list(range(stack.num_times))
    if PREDICTION in labels:
        options = prediction_options(objects, color_by, place, base)
        layers.append(_label_layer(PREDICTION, labels[PREDICTION], base, place, _at(time, times), options))
    if TRUTH in labels:
        one = labels[TRUTH]
        options = {"colormap": {0: (0, 0, 0, 0), None: TRUTH_COLOR}, "opacity": 1.0, "metadata": {"contour": 1}}
        layers.append(_label_layer(TRUTH, one, bases[TRUTH], place, _at(time, _times(one, stack, None)), options))
    if objects is not None:
        layers.append(object_layer(objects, color_by, place, base, times, time))
    if seam_report is not None:
        layers.append(seam_layer(read_seams(Path(seam_report)), place, base))
    return layers


def _base(name: str, labels: Stack, image: Stack) -> Floats:
    """Factor of the image's level whose shape labels have."""
    if labels.dtype.kind not in "biu":
        raise ValueError(f"{name} holds voxels of type {labels.dtype}; labels are integers")
    if len(labels.channels) != 1:
        raise ValueError(f"{name} has {len(labels.channels)} channels; labels have one")
    for level in image.levels:
        if level.shape == labels.levels[0].shape:
            return level.factor
    raise ValueError(
        f"{name} has {labels.levels[0].shape} voxels (z, y, x) and the image {image.levels[0].shape}; they must agree"
    )


def _spacing(
    stack: Stack, shown: int, spacing: Sequence[float] | None, labels: Sequence[tuple[Stack, Floats]]
) -> dict[str, Any]:
    """Voxel size at full resolution and its unit: the user's, the image's, or that of labels."""
    if spacing is not None:
        at_level = check_spacing(spacing)
        z, y, x = (s / f for s, f in zip(at_level, stack.levels[shown].factor, strict=True))
        return {"spacing": (z, y, x), "unit": "um"}
    known = [stack.spacing_um] if stack.spacing_um is not None else []
    for one, factor in labels:
        if one.spacing_um is not None:
            z, y, x = (s / f for s, f in zip(one.spacing_um, factor, strict=True))
            known.append((z, y, x))
    if not known:
        _logger.warning("the voxel size is unknown: distances are in voxels; pass --spacing to set it")
        return {"spacing": (1.0, 1.0, 1.0), "unit": "pixel"}
    for other in known[1:]:
        if not np.allclose(other, known[0], rtol=0.01):
            _logger.warning("the files give voxel sizes %s and %s um; the first is taken for all", known[0], other)
    return {"spacing": known[0], "unit": "um"}


def _checked_roi(roi: Sequence[int], level: Level) -> Roi:
    checked = check_roi(roi, level.shape)
    if any(a == b for a, b in zip(checked[:3], checked[3:], strict=True)):
        raise ValueError(f"roi={checked} is empty; its second corner is the first voxel outside")
    return checked


def _times(labels: Stack, image: Stack, table: pd.DataFrame | None) -> list[int]:
    """The image's time point of each of the labels'; of labels without an axis of time none."""
    if labels.num_times == image.num_times:
        return list(range(labels.num_times))
    if labels.num_times == 1:
        return []
    found = sorted(set(table["time"].tolist())) if table is not None and "time" in table else []
    if len(found) != labels.num_times or not set(found) <= set(range(image.num_times)):
        raise ValueError(
            f"labels have {labels.num_times} time points and the image {image.num_times}, and nothing says which are "
            "which"
        )
    return [int(one) for one in found]


def _at(time: int | Literal["all"], times: list[int]) -> list[int] | int:
    """Which time points of labels are shown."""
    if not times:
        return 0
    if time == "all":
        return list(range(len(times))) if len(times) > 1 else 0
    if time not in times:
        raise ValueError(f"time={time} was not predicted; choose from {times}")
    return times.index(time)


def _image_layers(stack: Stack, shown: int, place: Place, time: int | Literal["all"]) -> list[LayerData]:
    layers = []
    levels = [shown] if place.is_single else list(range(len(stack.levels)))
    for number, channel in enumerate(stack.channels):
        times: range | int = range(stack.num_times) if place.is_series else 0 if time == "all" else time

        def part(level: int, channel: int = channel, times: range | int = times) -> LazyArray:
            return _lazy(stack, level, channel, times, place.roi_of(stack.levels[level], stack.levels[level].factor))

        data = [part(level) for level in levels]
        first = stack.levels[levels[0]]
        limits, seen = _contrast(data[0])
        is_only = len(stack.channels) == 1
        options = {
            "name": IMAGE if is_only else f"channel {channel}",
            "colormap": "gray" if is_only else CHANNEL_COLORS[number % len(CHANNEL_COLORS)],
            "blending": "additive",
            "contrast_limits": limits,
            "metadata": {"seen": seen},
            **place.layer(first.factor, place.roi_of(first, first.factor)[:3], place.is_series),
        }
        layers.append(LayerData(*_levels(data, options), "image"))
    return layers


def _levels(data: list[LazyArray], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One array, or a list of several, and which of both it is."""
    return (data, options | {"multiscale": True}) if len(data) > 1 else (data[0], options | {"multiscale": False})


def _lazy(stack: Stack, level: int, channel: int, times: range | int, roi: Roi, is_label: bool = False) -> LazyArray:
    def read(time: int, region: Roi) -> np.ndarray:
        voxels = stack.read(level, channel, time, region)
        return _shown_labels(voxels) if is_label else voxels

    spans = [range(a, b) for a, b in zip(roi[:3], roi[3:], strict=True)]
    is_bool = stack.dtype == bool
    return LazyArray(read, [times, *spans], np.dtype(np.uint8) if is_bool else stack.dtype)


def _shown_labels(labels: np.ndarray) -> np.ndarray:
    """Labels with 0 where nothing is annotated: the maximum of an unsigned dtype, -1 of a signed one."""
    if labels.dtype == bool:
        return labels.astype(np.uint8)
    ignore = np.iinfo(labels.dtype).max if labels.dtype.kind == "u" else -1
    return np.where(labels == ignore, labels.dtype.type(0), labels)


def _contrast(data: LazyArray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits from percentiles of a sample in the middle, and the least and greatest value of it."""
    middle = tuple(
        slice((n - min(n, most)) // 2, (n - min(n, most)) // 2 + min(n, most))
        for n, most in zip(data.shape[-3:], SAMPLE, strict=True)
    )
    part = data[data.shape[0] // 2] if data.ndim == 4 else data
    sample = np.asarray(part[middle]).astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return (0.0, 1.0), (0.0, 1.0)
    low, high = (float(value) for value in np.percentile(sample, PERCENTILES))
    seen = (float(sample.min()), float(sample.max()))
    if high <= low:
        low, high = (seen[0], seen[1]) if seen[1] > seen[0] else (low, low + 1)
    return (low, high), (min(seen[0], low), max(seen[1], high))


def _label_layer(
    name: str, labels: Stack, base: Floats, place: Place, times: list[int] | int, options: dict[str, Any]
) -> LayerData:
    factors = [
        (level.factor[0] * base[0], level.factor[1] * base[1], level.factor[2] * base[2]) for level in labels.levels
    ]
    rois = [place.roi_of(level, factor) for level, factor in zip(labels.levels, factors, strict=True)]
    chosen = list(range(len(factors)))
    if place.is_single:
        alike = [i for i, level in enumerate(labels.levels) if factors[i] == place.shown.factor]
        chosen = alike[:1] or [0]
    span = times if isinstance(times, int) else range(times[0], times[-1] + 1)
    data = [_lazy(labels, i, labels.channels[0], span, rois[i], is_label=True) for i in chosen]
    where = place.layer(factors[chosen[0]], rois[chosen[0]][:3], isinstance(span, range))
    return LayerData(*_levels(data, {"name": name, **options, **where}), "labels")


def _object_table(prediction: Source | None, table: AnyPath | pd.DataFrame | None) -> pd.DataFrame | None:
    if isinstance(table, pd.DataFrame):
        return check_table(table, "table")
    beside = prediction_table(prediction) if isinstance(prediction, str | os.PathLike) else None
    if table is None:
        return None if beside is None else read_table(beside)
    return read_table(Path(table), beside)
