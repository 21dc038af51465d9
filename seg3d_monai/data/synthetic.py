"""A synthetic light-sheet specimen: volumes with labels, and a folder that trains and tests a detector.

`synthetic_nuclei` says where the nuclei are and `synthetic_imaging` what the camera sees of them; here the two meet and
are written as OME-TIFF, OME-Zarr and a manifest. Everything is a function of the seed.

It must not know models, training or metrics.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tifffile
import zarr

from seg3d_monai.data.synthetic_imaging import ImagingModel, chromatin_texture, expose
from seg3d_monai.data.synthetic_nuclei import NucleiModel, paint_nuclei, place_nuclei

SPECIMEN_VERSION = 1

Array = np.ndarray


def make_volume(
    shape: Sequence[int],
    *,
    seed: int | Sequence[int],
    spacing_um: Sequence[float] = (2.0, 0.8, 0.8),
    depth_um: float = 0.0,
    channels: int = 1,
    num_classes: int = 1,
    nuclei: NucleiModel | None = None,
    imaging: ImagingModel | None = None,
) -> tuple[Array, Array]:
    """Make one volume and its labels; the same arguments give the same bits.

    Args:
        shape: voxels (z, y, x), each at least 1.
        seed: integer(s) >= 0 from which every draw follows.
        spacing_um: voxel size (z, y, x).
        depth_um: depth of the first slice in the specimen, >= 0; deeper is dimmer and more blurred.
        channels: 1 (nuclei) or 2 (nuclei, and a stain of their rims).
        num_classes: 1, or 2: class 0 large and dim, class 1 small and bright (`make_volume_with_classes` returns them).
        nuclei: how nuclei look; None is the default model.
        imaging: the microscope; None is the default model.

    Returns:
        image uint16 [Z, Y, X] (or [2, Z, Y, X]) and labels uint32 [Z, Y, X], 0 background, ids compact from 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    image, labels, _ = make_volume_with_classes(
        shape,
        seed=seed,
        spacing_um=spacing_um,
        depth_um=depth_um,
        channels=channels,
        num_classes=num_classes,
        nuclei=nuclei,
        imaging=imaging,
    )
    return image, labels


def make_volume_with_classes(
    shape: Sequence[int],
    *,
    seed: int | Sequence[int],
    spacing_um: Sequence[float] = (2.0, 0.8, 0.8),
    depth_um: float = 0.0,
    channels: int = 1,
    num_classes: int = 2,
    nuclei: NucleiModel | None = None,
    imaging: ImagingModel | None = None,
) -> tuple[Array, Array, Array]:
    """As `make_volume`, with the class of each instance.

    Returns:
        image, labels, and classes int64 [G]: classes[id - 1] is the class of instance id.

    Raises:
        ValueError: an argument is out of its range.
    """
    size = _checked_shape("shape", shape)
    spacing = _checked_spacing(spacing_um)
    if channels not in (1, 2):
        raise ValueError(f"channels must be 1 or 2, got {channels}")
    if num_classes not in (1, 2):
        raise ValueError(f"num_classes must be 1 or 2, got {num_classes}")
    if not depth_um >= 0:
        raise ValueError(f"depth_um must be >= 0, got {depth_um}")
    nuclei, imaging = nuclei or NucleiModel(), imaging or ImagingModel()
    rng = np.random.default_rng(seed)
    placed = place_nuclei(rng, np.array(size) * spacing, nuclei, num_classes)
    labels, nearest, runner_up, kept = paint_nuclei(placed, size, spacing)
    classes = np.array([nucleus.kind for nucleus in kept], dtype=np.int64)
    brightness = np.array([0.0] + [nucleus.brightness for nucleus in kept], dtype=np.float32)

    # Dimmer towards the rim, and dark where two nuclei meet: there is a membrane and some cytoplasm between them.
    body = 1.0 - 0.35 * np.minimum(nearest, 1.0) ** 2
    seam = np.clip((runner_up - nearest) / 0.22, 0.35, 1.0)
    signal = brightness[labels] * body * seam * chromatin_texture(rng, size, spacing, nuclei.texture)
    stains = [signal]
    if channels == 2:
        rim = np.exp(-(((np.minimum(nearest, 2.0) - 1.0) / 0.1) ** 2)).astype(np.float32)
        stains.append(0.8 * rim)
    images = [expose(rng, stain, spacing, depth_um, imaging) for stain in stains]
    return (images[0] if channels == 1 else np.stack(images)), labels, classes


def _checked_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or any(int(size) != size or size < 1 for size in shape):
        raise ValueError(f"{name} must be three positive integers (z, y, x), got {tuple(shape)}")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _checked_spacing(spacing_um: Sequence[float]) -> Array:
    spacing = np.asarray(spacing_um, dtype=np.float64)
    if spacing.shape != (3,) or not np.all(np.isfinite(spacing)) or not np.all(spacing > 0):
        raise ValueError(f"spacing_um must be three positive numbers (z, y, x), got {tuple(spacing_um)}")
    return spacing


def write_specimen(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    spacing_um: Sequence[float] = (2.0, 0.8, 0.8),
    train_volumes: int = 4,
    train_shape: Sequence[int] = (48, 128, 128),
    val_volumes: int = 1,
    val_shape: Sequence[int] | None = None,
    test_volumes: int = 1,
    test_shape: Sequence[int] = (96, 256, 256),
    channels: int = 1,
    num_classes: int = 1,
    nuclei: NucleiModel | None = None,
    imaging: ImagingModel | None = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Write training, validation and test volumes with labels, and the manifest that lists them.

    `out/NAME/image.tif` and `labels.tif` (OME-TIFF) for training and validation, `image.zarr` and `labels.zarr`
    (OME-Zarr 0.5) for the test stacks, `classes.csv` beside them with two classes; `out/manifest.csv` comes last, so a
    folder without it is unfinished. An unfinished folder of the same specimen goes on, a finished one is reused.
    Training volumes lie at depths spread over the depth of the test stack.

    Args:
        out: folder; created where needed; must be empty or hold the same specimen.
        seed: integer >= 0.
        spacing_um: voxel size (z, y, x).
        train_volumes: how many volumes for training, >= 0.
        train_shape: their shape in voxels (z, y, x).
        val_volumes: how many volumes for validation, >= 0.
        val_shape: their shape; None is train_shape.
        test_volumes: how many test stacks, >= 0.
        test_shape: their shape.
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
    spacing = _checked_spacing(spacing_um)
    counts = {"train_volumes": train_volumes, "val_volumes": val_volumes, "test_volumes": test_volumes}
    for name, value in counts.items():
        if int(value) != value or value < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {value}")
    if sum(counts.values()) == 0:
        raise ValueError("train_volumes, val_volumes and test_volumes are all 0; ask for at least one volume")
    shapes = {
        "train": _checked_shape("train_shape", train_shape),
        "val": _checked_shape("val_shape", train_shape if val_shape is None else val_shape),
        "test": _checked_shape("test_shape", test_shape),
    }
    if channels not in (1, 2) or num_classes not in (1, 2):
        raise ValueError(f"channels and num_classes must be 1 or 2, got {channels} and {num_classes}")
    nuclei_model, imaging_model = nuclei or NucleiModel(), imaging or ImagingModel()
    parameters = {
        "kind": "seg3d_monai synthetic specimen",
        "version": SPECIMEN_VERSION,
        "seed": int(seed),
        "spacing_um": [float(s) for s in spacing],
        **{name: int(value) for name, value in counts.items()},
        **{f"{split}_shape": list(shape) for split, shape in shapes.items()},
        "channels": int(channels),
        "num_classes": int(num_classes),
        "nuclei": asdict(nuclei_model),
        "imaging": asdict(imaging_model),
    }
    _claim(folder, parameters)

    rows: list[dict[str, str | int | float]] = []
    index = 0
    for split in ("train", "val", "test"):
        count = counts[f"{split}_volumes"]
        shape = shapes[split]
        spare = max(0.0, (shapes["test"][0] - shape[0]) * float(spacing[0]))
        for number in range(count):
            name = f"{split}_{number}"
            index += 1
            place = folder / name
            if not place.is_dir():
                if report is not None:
                    report(f"{name}: {' x '.join(map(str, shape))} voxels")
                image, labels, classes = make_volume_with_classes(
                    shape,
                    seed=(int(seed), index),
                    spacing_um=spacing.tolist(),
                    # One volume lies in the middle, several reach from the top to the bottom.
                    depth_um=spare * (number / (count - 1) if count > 1 else 0.5),
                    channels=channels,
                    num_classes=num_classes,
                    nuclei=nuclei_model,
                    imaging=imaging_model,
                )
                _write_volume(place, split, image, labels, classes if num_classes > 1 else None, spacing)
            rows.append(_manifest_row(place, split, spacing, num_classes))
    return _write_manifest(folder / "manifest.csv", rows)


def _claim(folder: Path, parameters: dict[str, object]) -> None:
    """Make the folder this specimen's, or say what else it holds."""
    described = folder / "specimen.json"
    wanted = json.loads(json.dumps(parameters))
    if described.is_file():
        try:
            found = json.loads(described.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"out={str(folder)!r} holds an unreadable specimen.json; choose another folder")
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
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _write_volume(place: Path, split: str, image: Array, labels: Array, classes: Array | None, spacing: Array) -> None:
    """Write a volume's folder under another name and rename it when it is whole."""
    partial = _partial(place)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        if split == "test":
            _write_ome_zarr(partial / "image.zarr", image, spacing, is_label=False)
            _write_ome_zarr(partial / "labels.zarr", labels, spacing, is_label=True)
        else:
            _write_ome_tiff(partial / "image.tif", image, spacing)
            _write_ome_tiff(partial / "labels.tif", labels, spacing)
        if classes is not None:
            lines = [f"{number},{kind}" for number, kind in enumerate(classes, start=1)]
            (partial / "classes.csv").write_text("\n".join(["id,class", *lines]) + "\n", encoding="utf-8")
        statistics = {"quality_image": _contrast_to_noise(image, labels), "nuclei": int(labels.max())}
        (partial / "volume.json").write_text(json.dumps(statistics) + "\n", encoding="utf-8")
        try:
            os.rename(partial, place)
        except OSError:
            # Another process finished the same volume first; its bytes are the same.
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _contrast_to_noise(image: Array, labels: Array) -> float:
    nuclei = image if image.ndim == 3 else image[0]
    inside, outside = nuclei[labels > 0], nuclei[labels == 0]
    if inside.size == 0 or outside.size == 0:
        return 0.0
    return round(float((np.median(inside) - np.median(outside)) / max(float(outside.std()), 1e-6)), 3)


def _manifest_row(place: Path, split: str, spacing: Array, num_classes: int) -> dict[str, str | int | float]:
    statistics = json.loads((place / "volume.json").read_text(encoding="utf-8"))
    suffix = "zarr" if split == "test" else "tif"
    row: dict[str, str | int | float] = {
        "name": place.name,
        "image": f"{place.name}/image.{suffix}",
        "label": f"{place.name}/labels.{suffix}",
        "spacing_z_um": float(spacing[0]),
        "spacing_y_um": float(spacing[1]),
        "spacing_x_um": float(spacing[2]),
        "specimen": f"specimen_{place.name}",
        "split": split,
    }
    if num_classes > 1:
        row["classes"] = f"{place.name}/classes.csv"
    else:
        row["class"] = 0
    row["quality_image"] = statistics["quality_image"]
    row["nuclei"] = statistics["nuclei"]
    return row


def _write_manifest(path: Path, rows: list[dict[str, str | int | float]]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # A finished specimen may lie where nobody can write.
    if not path.is_file() or path.read_text(encoding="utf-8") != text.getvalue():
        _write_text(path, text.getvalue())
    return path


def _write_ome_tiff(path: Path, array: Array, spacing: Array) -> None:
    tifffile.imwrite(
        path,
        array,
        ome=True,
        photometric="minisblack",
        compression="zlib" if array.dtype == np.uint32 else None,
        metadata={
            # tifffile would write its version and an id made of clock and host: the same specimen has the same bytes.
            "Creator": "seg3d_monai",
            "UUID": str(uuid.UUID(bytes=hashlib.blake2b(array.tobytes(), digest_size=16).digest())),
            "axes": "ZYX" if array.ndim == 3 else "CZYX",
            "PhysicalSizeZ": float(spacing[0]),
            "PhysicalSizeY": float(spacing[1]),
            "PhysicalSizeX": float(spacing[2]),
            "PhysicalSizeZUnit": "µm",
            "PhysicalSizeYUnit": "µm",
            "PhysicalSizeXUnit": "µm",
        },
    )


def _write_ome_zarr(path: Path, array: Array, spacing: Array, *, is_label: bool) -> None:
    axes: list[dict[str, str]] = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [float(s) for s in spacing]
    chunks = tuple(min(chunk, size) for chunk, size in zip((32, 64, 64), array.shape[-3:], strict=True))
    if array.ndim == 4:
        axes.insert(0, {"name": "c", "type": "channel"})
        scale.insert(0, 1.0)
        chunks = (1, *chunks)
    ome: dict[str, object] = {
        "version": "0.5",
        "multiscales": [
            {
                "name": path.stem,
                "axes": axes,
                "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}],
            }
        ],
    }
    if is_label:
        ome["image-label"] = {"version": "0.5"}
    group = zarr.create_group(path, zarr_format=3, attributes={"ome": ome})
    level = group.create_array(
        "0", shape=array.shape, dtype=array.dtype, chunks=chunks, dimension_names=[axis["name"] for axis in axes]
    )
    level[...] = array
