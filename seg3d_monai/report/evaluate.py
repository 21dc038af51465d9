"""Evaluation of label volumes on disk: pairs them, streams both of a pair, pools the counts.

It must not know models or how the prediction was made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seg3d_monai.data.volume import Volume, open_volume, storage_rois
from seg3d_monai.data.zarr_volume import is_zarr
from seg3d_monai.metrics import ContingencyTable, InstanceMetrics

# Longest first: NAME.ome.tif is called NAME.
VOLUME_SUFFIXES = (".ome.tiff", ".ome.zarr", ".ome.tif", ".nii.gz", ".tiff", ".zarr", ".tif", ".nii")
FOLDER_VOLUMES = tuple(f"labels{suffix}" for suffix in reversed(VOLUME_SUFFIXES))
OUTPUT_LABELS = "labels/instances"
MAX_VOXELS = 2**24
MAX_LISTED = 10


def evaluate_paths(
    truth: str | os.PathLike[str], prediction: str | os.PathLike[str], *, progress: bool = False
) -> dict[str, Any]:
    """Score predicted label volumes against true ones.

    Each of the two is a volume that `open_volume` reads (a Zarr with `labels/instances`, as `seg3d predict` writes it,
    stands for those labels), or both are folders whose volumes are paired by name: `NAME/labels.tif`, `NAME.tif` or
    `NAME.zarr` (also `.tiff`, `.ome.tif`, `.nii.gz` …). Volumes are read a slab at a time.

    Args:
        truth: the true labels; the maximum of an unsigned dtype, or -1, marks voxels to ignore.
        prediction: the predicted labels.
        progress: show a progress bar.

    Returns:
        The scores of `InstanceMetrics.compute`, pooled over the pairs, and "volumes": for each name num_truth,
        num_predicted, and its own f1 (at IoU 0.5), map and seg.

    Raises:
        FileNotFoundError: one of the two is not there.
        ValueError: the two do not pair, or shapes or types do not fit; all such faults are listed together.
    """
    pairs = _pairs(Path(truth), Path(prediction))
    opened: dict[str, tuple[Volume, Volume]] = {}
    faults: list[str] = []
    for name, (true_path, predicted_path) in pairs.items():
        volumes = open_volume(true_path), open_volume(predicted_path)
        for path, volume in zip((true_path, predicted_path), volumes, strict=True):
            if volume.shape[0] != 1:
                faults.append(f"{path} has {volume.shape[0]} channels; labels have one")
            if volume.dtype.kind not in "iub":
                faults.append(f"{path} has dtype {volume.dtype}; labels must be integers")
        if volumes[0].shape[1:] != volumes[1].shape[1:]:
            faults.append(
                f"{name}: truth has shape {volumes[0].shape[1:]} and prediction {volumes[1].shape[1:]} (z, y, x)"
            )
        opened[name] = volumes
    if faults:
        raise ValueError(f"cannot evaluate: {_listed(faults)}")

    pooled = InstanceMetrics()
    by_volume: dict[str, dict[str, float | int]] = {}
    total = sum(volume.shape[1] * volume.shape[2] * volume.shape[3] for volume, _ in opened.values())
    with tqdm(total=total, unit="voxel", unit_scale=True, desc="evaluate", disable=not progress) as bar:
        for name, volumes in opened.items():
            table = ContingencyTable()
            # The deeper chunks lead: reading them by halves would decode them twice.
            for roi in storage_rois(max(volumes, key=lambda volume: volume.chunk_shape[0]), MAX_VOXELS):
                true_block = volumes[0].read(roi)
                table.add(true_block, volumes[1].read(roi))
                bar.update(true_block.size)
            alone = InstanceMetrics()
            alone.add_table(table)
            pooled.merge(alone)
            scores = alone.compute()
            by_volume[name] = {
                "num_truth": scores["num_truth"],
                "num_predicted": scores["num_predicted"],
                "f1": scores["thresholds"]["0.5"]["f1"],
                "map": scores["map"],
                "seg": scores["seg"],
            }
    return {**pooled.compute(), "volumes": by_volume}


def _pairs(truth: Path, prediction: Path) -> dict[str, tuple[Path, Path]]:
    for name, path in (("truth", truth), ("prediction", prediction)):
        if not path.exists():
            raise FileNotFoundError(f"{name}: no file or folder {str(path)!r}")
    is_folder = {"truth": _is_plain_folder(truth), "prediction": _is_plain_folder(prediction)}
    if not any(is_folder.values()):
        only = truth.parent.name if truth.name in FOLDER_VOLUMES else _volume_name(truth)
        return {only or truth.name: (_labels_in(truth), _labels_in(prediction))}
    if not all(is_folder.values()):
        folder = next(name for name, value in is_folder.items() if value)
        raise ValueError(
            f"truth={str(truth)!r} and prediction={str(prediction)!r}: only {folder} is a folder of volumes; "
            "give two volumes or two folders"
        )
    true_volumes, predicted_volumes = _find_volumes(truth), _find_volumes(prediction)
    faults = [
        f"{folder} holds no volume (NAME/labels.tif, NAME.tif, NAME.zarr)"
        for folder, volumes in ((truth, true_volumes), (prediction, predicted_volumes))
        if not volumes
    ]
    if not faults:
        faults += [f"{name} has no prediction" for name in sorted(true_volumes.keys() - predicted_volumes.keys())]
        faults += [f"{name} has no truth" for name in sorted(predicted_volumes.keys() - true_volumes.keys())]
    if faults:
        raise ValueError(f"{truth} and {prediction} do not pair by name: {_listed(faults)}")
    return {name: (path, predicted_volumes[name]) for name, path in true_volumes.items()}


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not is_zarr(path)


def _find_volumes(folder: Path) -> dict[str, Path]:
    """Label volumes in a folder by name, in the order of their names."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if _is_plain_folder(entry):
            for file in FOLDER_VOLUMES:
                if (entry / file).exists():
                    found.setdefault(entry.name, []).append(entry / file)
            continue
        name = _volume_name(entry)
        if name is not None:
            found.setdefault(name, []).append(_labels_in(entry))
    ambiguous = [f"{name}: {', '.join(map(str, paths))}" for name, paths in found.items() if len(paths) > 1]
    if ambiguous:
        raise ValueError(f"{folder} holds several volumes of one name: {_listed(ambiguous)}; keep one of each")
    return {name: paths[0] for name, paths in sorted(found.items())}


def _volume_name(path: Path) -> str | None:
    for suffix in VOLUME_SUFFIXES:
        if path.name.lower().endswith(suffix) and len(path.name) > len(suffix):
            return path.name[: -len(suffix)]
    return None


def _labels_in(path: Path) -> Path:
    """The labels of a prediction's Zarr, which may hold a copy of the image too; else the path itself."""
    labels = path / OUTPUT_LABELS
    return labels if path.is_dir() and labels.is_dir() else path


def _listed(faults: list[str]) -> str:
    more = f"; and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    return "; ".join(faults[:MAX_LISTED]) + more
