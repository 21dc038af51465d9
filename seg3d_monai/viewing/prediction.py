"""Which files of a prediction are meant: its labels and the object table beside them. Reads no voxels."""

from __future__ import annotations

import os
from pathlib import Path

from seg3d_monai.data.pyramid import partial_path
from seg3d_monai.data.zarr_volume import UNFINISHED

LABELS = "labels/instances"


AnyPath = str | os.PathLike[str]


def inner_labels(path: AnyPath) -> AnyPath:
    """`labels/instances` of an OME-Zarr that has them, else the path itself."""
    inner = Path(path) / LABELS
    return inner if inner.is_dir() else path


def prediction_labels(path: AnyPath) -> AnyPath:
    """What to open for a prediction: `labels/instances` of an OME-Zarr, or the path itself.

    Args:
        path: what the user gave.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is not finished, or the folder of a training.
    """
    place = Path(path)
    if place.name.endswith(UNFINISHED) and place.is_dir():
        raise ValueError(_unfinished(place.with_name(place.name.removesuffix(UNFINISHED))))
    if not place.exists():
        if partial_path(place).is_dir() or _journal(place).is_file():
            raise ValueError(_unfinished(place))
        if any(sign in str(path) for sign in ("://", "*", "?", "[")):
            return path  # whoever opens it knows URLs and patterns
        raise FileNotFoundError(
            f"prediction {str(path)!r} does not exist; give what seg3d predict wrote, or a label volume"
        )
    if place.is_dir() and not (place / LABELS).is_dir() and (place / "config.json").is_file():
        raise ValueError(f"prediction {str(path)!r} is the folder of a training; {_instead(place)}")
    return inner_labels(path)


def prediction_table(path: AnyPath) -> Path | None:
    """The object table beside a prediction, X.instances.parquet or .csv for X.zarr; None where there is none.

    Args:
        path: what the user gave: X.zarr, X.zarr/labels/instances, or X.labels.tif.
    """
    place = Path(path)
    if place.as_posix().endswith(f".zarr/{LABELS}"):
        place = place.parent.parent
    stem = place.name
    for suffix in (".zarr", ".labels.tif"):
        stem = stem.removesuffix(suffix)
    files = (place.with_name(f"{stem}.instances{suffix}") for suffix in (".parquet", ".csv"))
    return next((file for file in files if file.is_file()), None)


def is_labels_alone(path: AnyPath) -> bool:
    """Whether an OME-Zarr holds predicted labels and no image."""
    place = Path(path)
    return (place / LABELS).is_dir() and not (place / "0").exists()


def _journal(output: Path) -> Path:
    return output.with_name(f"{output.name.removesuffix('.zarr')}.journal.sqlite")


def _unfinished(output: Path) -> str:
    return (
        f"prediction {str(output)!r} is not finished; give its seg3d predict command once more and it goes on from "
        "where it was"
    )


def _instead(run: Path) -> str:
    found = sorted(place for place in run.glob("*.zarr") if (place / LABELS).is_dir())
    if found:
        return f"give a prediction, such as {found[0]}"
    return f"give what it predicts: seg3d predict IMAGE OUT.zarr --bundle BUNDLE --checkpoint {run / 'model.pt'}"
