"""A synthetic light-sheet specimen on disk: a folder that trains and tests a detector.

Volumes are made by a `Maker` and go through the writers that serve any data: OME-TIFF, the conversion to OME-Zarr, and
the manifest with its checks. So synthetic, unlabelled and annotated volumes are rows of one kind. Everything is a
function of the seed.

It must not know models, training or metrics.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.manifest import KNOWN_COLUMNS, SPACING_COLUMNS, read_manifest
from seg3d_monai.data.manifest_tables import Cell, write_table
from seg3d_monai.data.synthesis import read_recipe
from seg3d_monai.data.synthetic_imaging import ImagingModel
from seg3d_monai.data.synthetic_makers import Maker, Microscope, Scenes, middle_of
from seg3d_monai.data.synthetic_nuclei import NucleiModel
from seg3d_monai.data.synthetic_volume import (
    check_kinds,
    checked_shape,
    checked_spacing,
    make_volume,
    make_volume_with_classes,
)
from seg3d_monai.data.tiff_write import write_ome_tiff
from seg3d_monai.data.volume import ArrayVolume, Spacing

__all__ = ["ImagingModel", "NucleiModel", "make_volume", "make_volume_with_classes", "write_specimen"]

SPECIMEN_VERSION = 1
SPACING_UM: Spacing = (2.0, 0.8, 0.8)
_LATER = {
    "unlabelled_volumes": 0,
    "unlabelled_shape": None,
    "annotated_fraction": 1.0,
    "stream": False,
    "recipe": None,
    "nuclei": None,
    "imaging": None,
}
"""What specimens were made with before they said so."""

Array = np.ndarray


@dataclass(frozen=True)
class _Order:
    """A volume to be made.

    Attributes:
        name: of its folder.
        split: its split.
        kind: "train", "val", "test" or "unlabelled".
        shape: (z, y, x) voxels.
        depth_um: of its first plane.
        seed: of all of its draws.
    """

    name: str
    split: str
    kind: str
    shape: tuple[int, int, int]
    depth_um: float
    seed: tuple[int, int]


def write_specimen(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    recipe: str | os.PathLike[str] | None = None,
    spacing_um: Sequence[float] | None = None,
    train_volumes: int = 4,
    train_shape: Sequence[int] = (48, 128, 128),
    val_volumes: int = 1,
    val_shape: Sequence[int] | None = None,
    test_volumes: int = 1,
    test_shape: Sequence[int] = (96, 256, 256),
    unlabelled_volumes: int = 0,
    unlabelled_shape: Sequence[int] | None = None,
    annotated_fraction: float = 1.0,
    stream: bool = False,
    channels: int = 1,
    num_classes: int = 1,
    nuclei: NucleiModel | None = None,
    imaging: ImagingModel | None = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Write training, validation and test volumes with labels, others without, and the manifest that lists them.

    `out/NAME/image.tif` and `labels.tif` (OME-TIFF) for training and validation, `image.tif` alone for volumes without
    labels, `image.zarr` and `labels.zarr` (OME-Zarr 0.5) for the test stacks, `classes.csv` beside them with two
    classes; `out/manifest.csv` comes last, so a folder without it is unfinished. Its column `synthetic` is 1 in every
    row. An unfinished folder of the same specimen goes on, a finished one is reused as it is, in the layout of earlier
    versions too. Training volumes lie at depths spread over the depth of the test stack.

    Args:
        out: folder; created where needed; must be empty or hold the same specimen.
        seed: integer >= 0.
        recipe: name of a preset, or JSON file, of the scenes of all volumes (`synthesis`); None for the built-in
            microscope, which `nuclei` and `imaging` change.
        spacing_um: voxel size (z, y, x); None is `SPACING_UM`, or what the recipe draws.
        train_volumes: how many volumes for training, >= 0.
        train_shape: their shape in voxels (z, y, x).
        val_volumes: how many volumes for validation, >= 0.
        val_shape: their shape; None is train_shape.
        test_volumes: how many test stacks, >= 0.
        test_shape: their shape.
        unlabelled_volumes: how many volumes of split "train" without labels, for pre-training, >= 0.
        unlabelled_shape: their shape; None is train_shape.
        annotated_fraction: share of each training volume in which nuclei are annotated, above 0; the rest is ignore.
        stream: whether test stacks are made some planes at a time, of any depth and in bounded memory; their voxels are
            other ones than without.
        channels: 1 or 2, as in `make_volume`.
        num_classes: 1 or 2, as in `make_volume`.
        nuclei: how nuclei look; None is the default model.
        imaging: the microscope; None is the default model.
        report: called with one line for each volume written; None is silence.

    Returns:
        Path of `manifest.csv`.

    Raises:
        ValueError: an argument is out of its range, or `out` holds something else.
    """
    folder = Path(out)
    counts = {"train": train_volumes, "val": val_volumes, "test": test_volumes, "unlabelled": unlabelled_volumes}
    for kind, value in counts.items():
        if int(value) != value or value < 0:
            raise ValueError(f"{kind}_volumes must be an integer >= 0, got {value}")
    if sum(counts.values()) == 0:
        raise ValueError(
            "train_volumes, val_volumes, test_volumes and unlabelled_volumes are all 0; ask for at least one volume"
        )
    if int(seed) != seed or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed}")
    asked = {"train": train_shape, "val": val_shape, "test": test_shape, "unlabelled": unlabelled_shape}
    shapes = {
        kind: checked_shape(f"{kind}_shape", train_shape if shape is None else shape) for kind, shape in asked.items()
    }
    check_kinds(channels, num_classes)
    if not 0 < annotated_fraction <= 1:
        raise ValueError(f"annotated_fraction must be above 0 and at most 1, got {annotated_fraction}")
    maker = _maker(recipe, spacing_um, channels, num_classes, nuclei, imaging)
    parameters = {
        "kind": "seg3d_monai synthetic specimen",
        "version": SPECIMEN_VERSION,
        "seed": int(seed),
        **{f"{kind}_volumes": int(value) for kind, value in counts.items()},
        **{f"{kind}_shape": list(shape) for kind, shape in shapes.items() if kind != "unlabelled" or counts[kind]},
        "annotated_fraction": float(annotated_fraction),
        "stream": bool(stream),
        "channels": int(channels),
        "num_classes": int(num_classes),
        **maker.described(),
    }
    _claim(folder, parameters)

    rows: list[dict[str, Cell]] = []
    for order in _orders(counts, shapes, int(seed), maker):
        place = folder / order.name
        if not place.is_dir():
            if report is not None:
                report(f"{order.name}: {' x '.join(map(str, order.shape))} voxels")
            if order.kind == "test" and stream:
                _write_stack(place, order, maker, num_classes)
            else:
                _write_volume(place, order, maker, num_classes, annotated_fraction if order.kind == "train" else 1.0)
        rows.append(_manifest_row(place, order, maker.spacing_um(order.seed), num_classes))
    manifest = folder / "manifest.csv"
    if not manifest.is_file():  # a finished one is the user's: it may have more rows, or lie where nobody can write
        _write_manifest(manifest, rows)
    return manifest


def _maker(
    recipe: str | os.PathLike[str] | None,
    spacing_um: Sequence[float] | None,
    channels: int,
    num_classes: int,
    nuclei: NucleiModel | None,
    imaging: ImagingModel | None,
) -> Maker:
    """What was asked for, checked; see `write_specimen`."""
    spacing: Spacing | None = None
    if spacing_um is not None:
        z, y, x = checked_spacing(spacing_um).tolist()
        spacing = (z, y, x)
    if recipe is None:
        return Microscope(
            spacing or SPACING_UM, channels, num_classes, nuclei or NucleiModel(), imaging or ImagingModel()
        )
    if nuclei is not None or imaging is not None:
        raise ValueError("nuclei and imaging are of the built-in microscope; a recipe has its own numbers for them")
    if num_classes != 1:
        raise ValueError(f"num_classes is {num_classes}; the objects of a recipe are of one class")
    if spacing is not None and spacing[1] != spacing[2]:
        raise ValueError(f"spacing_um is {list(spacing)}; the voxels of a recipe are as long along y as along x")
    return Scenes(read_recipe(recipe), spacing, channels)


def _orders(counts: dict[str, int], shapes: dict[str, tuple[int, int, int]], seed: int, maker: Maker) -> list[_Order]:
    orders: list[_Order] = []
    for kind, count in counts.items():
        shape = shapes[kind]
        for number in range(count):
            own_seed = (seed, len(orders) + 1)
            spare = max(0.0, (shapes["test"][0] - shape[0]) * maker.spacing_um(own_seed)[0])
            orders.append(
                _Order(
                    name=f"{kind}_{number}",
                    split="train" if kind == "unlabelled" else kind,
                    kind=kind,
                    shape=shape,
                    # One volume lies in the middle, several reach from the top to the bottom.
                    depth_um=spare * (number / (count - 1) if count > 1 else 0.5),
                    seed=own_seed,
                )
            )
    return orders


def _claim(folder: Path, parameters: dict[str, object]) -> None:
    """Make the folder this specimen's, or say what else it holds."""
    described = folder / "specimen.json"
    wanted = _LATER | json.loads(json.dumps(parameters))
    if described.is_file():
        try:
            found = json.loads(described.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"out={str(folder)!r} holds an unreadable specimen.json; choose another folder")
        found = _LATER | found
        different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if different:
            raise ValueError(
                f"out={str(folder)!r} already holds another synthetic specimen (different: {', '.join(different)}); "
                "choose another folder or remove it"
            )
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r} is a file; give a folder")
    if folder.is_dir() and any(not entry.name.startswith(".partial-") for entry in folder.iterdir()):
        raise ValueError(f"out={str(folder)!r} holds other files; choose an empty or new folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(described, json.dumps(wanted, indent=2) + "\n")


def _partial(path: Path) -> Path:
    return path.with_name(f".partial-{path.name}-{os.getpid()}")


def _write_text(path: Path, text: str) -> None:
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_volume(place: Path, order: _Order, maker: Maker, num_classes: int, annotated_fraction: float) -> None:
    """Write a volume's folder under another name and rename it when it is whole."""
    image, labels, classes = maker.volume(order.shape, order.seed, order.depth_um)
    facts = {"quality_image": _contrast_to_noise(image if image.ndim == 3 else image[0], labels)}
    if annotated_fraction < 1:
        labels, kept = annotate_partly(labels, annotated_fraction, np.random.default_rng((*order.seed, 1)))
        classes = classes[kept - 1]
    spacing = maker.spacing_um(order.seed)
    partial = _partial(place)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        if order.kind == "test":
            convert_volume(ArrayVolume(image, spacing), partial / "image.zarr")
            convert_volume(ArrayVolume(labels, spacing), partial / "labels.zarr", labels=True)
        else:
            write_ome_tiff(partial / "image.tif", image, spacing)
            if order.kind != "unlabelled":
                write_ome_tiff(partial / "labels.tif", labels, spacing, compressed=True)
        _write_facts(partial, facts, None if order.kind == "unlabelled" else classes, num_classes)
        _put_in_place(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_stack(place: Path, order: _Order, maker: Maker, num_classes: int) -> None:
    """Write a stack's folder a part at a time; what an interrupted run has written stays and is gone on with."""
    image, labels, classes = maker.stack(order.shape, order.seed, order.depth_um)
    partial = place.with_name(f".partial-{place.name}")
    partial.mkdir(exist_ok=True)
    convert_volume(image, partial / "image.zarr")
    convert_volume(labels, partial / "labels.zarr", labels=True)
    middle = middle_of(image)
    quality = _contrast_to_noise(image.read(middle)[0], labels.read(middle)[0])
    _write_facts(partial, {"quality_image": quality}, classes, num_classes)
    _put_in_place(partial, place)


def _write_facts(folder: Path, facts: dict[str, float], classes: Array | None, num_classes: int) -> None:
    """`volume.json`, which the manifest's row is made from, and `classes.csv`; `classes` is None without labels."""
    if classes is not None and num_classes > 1:
        lines = [f"{number},{kind}" for number, kind in enumerate(classes, start=1)]
        (folder / "classes.csv").write_text("\n".join(["id,class", *lines]) + "\n", encoding="utf-8")
    counted = {} if classes is None else {"nuclei": len(classes)}
    (folder / "volume.json").write_text(json.dumps(facts | counted) + "\n", encoding="utf-8")


def _put_in_place(partial: Path, place: Path) -> None:
    try:
        os.rename(partial, place)
    except OSError:
        # Another process finished the same volume first; its bytes are the same.
        if not place.is_dir():
            raise


def annotate_partly(labels: Array, fraction: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Labels as of somebody who annotated, in a box somewhere, every nucleus that lies mostly in it.

    Args:
        labels: unsigned integers [Z, Y, X], 0 background, ids compact from 1; the dtype's maximum is ignore.
        fraction: of the volume that the box takes, above 0.
        rng: for its place.

    Returns:
        The labels: annotated nuclei whole, with ids compact from 1, background in the box, and all other voxels ignore,
        the dtype's maximum. And the ids that the annotated nuclei had, ascending.
    """
    shape = np.array(labels.shape)
    extent = np.clip(np.rint(shape * fraction ** (1 / 3)).astype(int), 1, shape)
    start = rng.integers(0, shape - extent + 1)
    box = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
    inside = np.zeros(labels.shape, bool)
    inside[box] = True
    ignore = np.iinfo(labels.dtype).max
    known = np.where(labels == ignore, 0, labels)
    voxels = np.bincount(known.ravel())
    is_kept = 2 * np.bincount(known[box].ravel(), minlength=len(voxels)) > voxels
    is_kept[0] = False
    kept = np.flatnonzero(is_kept)
    new_id = np.zeros(len(voxels), labels.dtype)
    new_id[kept] = np.arange(1, len(kept) + 1)
    result = new_id[known]
    result[(result == 0) & (~inside | (labels > 0))] = ignore
    return result, kept


def _contrast_to_noise(image: Array, labels: Array) -> float:
    inside, outside = image[(labels > 0) & (labels < np.iinfo(labels.dtype).max)], image[labels == 0]
    if inside.size == 0 or outside.size == 0:
        return 0.0
    return round(float((np.median(inside) - np.median(outside)) / max(float(outside.std()), 1e-6)), 3)


def _manifest_row(place: Path, order: _Order, spacing: Spacing, num_classes: int) -> dict[str, Cell]:
    facts = json.loads((place / "volume.json").read_text(encoding="utf-8"))
    suffix = "zarr" if order.kind == "test" else "tif"
    row: dict[str, Cell] = {"name": order.name, "image": f"{order.name}/image.{suffix}"}
    if order.kind != "unlabelled":
        row["label"] = f"{order.name}/labels.{suffix}"
    row |= dict(zip(SPACING_COLUMNS, spacing, strict=True))
    row |= {"specimen": f"specimen_{order.name}", "split": order.split}
    if order.kind != "unlabelled":
        row |= {"classes": f"{order.name}/classes.csv"} if num_classes > 1 else {"class": 0}
    return row | facts | {"synthetic": 1}


def _write_manifest(path: Path, rows: list[dict[str, Cell]]) -> None:
    """Write it under another name, and give it its own when the layer reads it as meant."""
    partial = _partial(path)
    try:
        write_table(partial, rows, KNOWN_COLUMNS)
        read_manifest(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
