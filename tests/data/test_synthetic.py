"""The synthetic specimen: repeatable, crowded, hard enough for the classical baseline, safe to interrupt."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from scipy import ndimage

from seg3d_monai.data import open_volume, read_manifest, synthetic, synthetic_makers
from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.synthetic import (
    ImagingModel,
    NucleiModel,
    make_volume,
    make_volume_with_classes,
    write_specimen,
)
from seg3d_monai.metrics import InstanceMetrics
from seg3d_monai.report.watershed import otsu_watershed

SMALL = {"train_shape": (8, 24, 20), "test_shape": (12, 30, 34), "train_volumes": 2, "val_volumes": 1}


def touching_share(labels: np.ndarray) -> float:
    touching: set[int] = set()
    for axis in range(3):
        low = np.moveaxis(labels, axis, 0)[:-1]
        high = np.moveaxis(labels, axis, 0)[1:]
        meets = (low != high) & (low > 0) & (high > 0)
        touching |= set(low[meets].tolist()) | set(high[meets].tolist())
    return len(touching) / int(labels.max())


def test_same_seed_same_bits_and_another_seed_another_volume() -> None:
    first = make_volume((12, 40, 33), seed=3)
    again = make_volume((12, 40, 33), seed=3)
    other = make_volume((12, 40, 33), seed=4)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).mean() > 0.5
    assert first[0].dtype == np.uint16
    assert first[1].dtype == np.uint32
    assert first[0].shape == first[1].shape == (12, 40, 33)


def test_nuclei_are_whole_crowded_and_of_the_asked_size() -> None:
    spacing = (2.0, 0.8, 0.8)
    _, labels = make_volume((48, 128, 128), seed=0, spacing_um=spacing)
    voxels = np.bincount(labels.ravel())[1:]
    assert 50 <= len(voxels) <= 100
    assert voxels.min() >= 25
    assert touching_share(labels) >= 0.4
    inner = [
        index
        for index, part in enumerate(ndimage.find_objects(labels), start=1)
        if all(s.start > 0 and s.stop < size for s, size in zip(part, labels.shape, strict=True))
    ]
    diameters = (6 / np.pi * voxels[np.array(inner) - 1] * np.prod(spacing)) ** (1 / 3)
    # Neighbours press on each other, so a few are smaller than free ones.
    assert 9.5 <= np.median(diameters) <= 14.5
    for index in inner:
        _, pieces = ndimage.label(labels == index, structure=np.ones((3, 3, 3)))
        assert pieces == 1


def test_the_baseline_fails_and_deep_nuclei_are_dimmer() -> None:
    image, labels = make_volume((96, 160, 160), seed=1)
    metrics = InstanceMetrics()
    metrics.update(labels, otsu_watershed(image, (2.0, 0.8, 0.8)))
    assert 0.2 < metrics.compute()["thresholds"]["0.5"]["f1"] < 0.60
    shallow = np.median(image[:30][labels[:30] > 0]) - 100
    deep = np.median(image[-30:][labels[-30:] > 0]) - 100
    assert deep < 0.6 * shallow
    # Still visible: the median deep nucleus voxel is far outside the spread of the deep background.
    background = image[-30:][labels[-30:] == 0].astype(float) - 100
    assert deep > np.median(background) + 3 * background.std()


def test_blur_is_wider_along_z() -> None:
    # One bright round nucleus, no neighbours: its image is longer along z than its label, in micrometres.
    nuclei = NucleiModel(density=1e-9, attach_prob=0.0, elongation=0.0, deformation=0.0, texture=0.0)
    imaging = ImagingModel(stripes=0.0, haze=0.0, autofluorescence=0.0, attenuation_um=1e6, photons=5000.0)
    for seed in range(40):
        image, labels = make_volume((48, 60, 54), seed=seed, spacing_um=(1, 1, 1), nuclei=nuclei, imaging=imaging)
        part = ndimage.find_objects(labels)
        if part and all(s.start > 8 and s.stop < n - 8 for s, n in zip(part[0], labels.shape, strict=True)):
            break
    else:
        pytest.fail("no seed puts its nucleus inside")
    signal = np.clip(image.astype(float) - 140, 0, None)
    grid = np.indices(labels.shape)
    widths = []
    for axis in range(3):
        middle = (grid[axis] * signal).sum() / signal.sum()
        widths.append(((grid[axis] - middle) ** 2 * signal).sum() / signal.sum())
    assert widths[0] > widths[1] + 1.0
    assert widths[0] > widths[2] + 1.0
    assert abs(widths[1] - widths[2]) < 0.5


def test_depth_makes_the_same_nuclei_dimmer() -> None:
    top, labels = make_volume((10, 40, 48), seed=2)
    deep, deep_labels = make_volume((10, 40, 48), seed=2, depth_um=110.0)
    np.testing.assert_array_equal(labels, deep_labels)
    ratio = (deep[labels > 0].mean() - 100) / (top[labels > 0].mean() - 100)
    assert 0.25 < ratio < 0.5  # exp(-1) = 0.37, and a little is lost to the wider blur


def test_two_channels_and_two_classes() -> None:
    image, labels, classes = make_volume_with_classes((24, 80, 90), seed=5, channels=2, num_classes=2)
    assert image.shape == (2, 24, 80, 90)
    assert classes.shape == (labels.max(),)
    assert set(classes.tolist()) == {0, 1}
    voxels = np.bincount(labels.ravel())[1:]
    light = ndimage.mean(image[0].astype(float), labels, np.arange(1, labels.max() + 1))
    assert np.median(voxels[classes == 0]) > 1.5 * np.median(voxels[classes == 1])
    assert np.median(light[classes == 1]) > 1.2 * np.median(light[classes == 0])
    # The second stain is at the rims: an eroded nucleus is darker there than its shell.
    core = ndimage.binary_erosion(labels > 0, iterations=2)
    shell = (labels > 0) & ~core
    assert image[1][core].mean() < image[1][shell].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (4, 5)}, "shape"),
        ({"shape": (0, 5, 5)}, "shape"),
        ({"spacing_um": (1.0, 0.0, 1.0)}, "spacing_um"),
        ({"spacing_um": (1.0, 1.0)}, "spacing_um"),
        ({"channels": 3}, "channels"),
        ({"num_classes": 0}, "num_classes"),
        ({"depth_um": -1.0}, "depth_um"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    arguments = {"shape": (6, 8, 10), "seed": 0, **options}
    with pytest.raises(ValueError, match=message):
        make_volume(arguments.pop("shape"), **arguments)


def test_a_volume_smaller_than_a_nucleus() -> None:
    image, labels = make_volume((1, 2, 3), seed=0)
    assert image.shape == labels.shape == (1, 2, 3)
    assert labels.max() == 0


def read_manifest_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_written_specimen(tmp_path: Path) -> None:
    lines: list[str] = []
    manifest = write_specimen(tmp_path / "specimen", seed=7, report=lines.append, **SMALL)
    rows = read_manifest_rows(manifest)
    assert [row["split"] for row in rows] == ["train", "train", "val", "test"]
    assert len(lines) == 4
    assert len({row["specimen"] for row in rows}) == 4
    for row in rows:
        assert [float(row[f"spacing_{a}_um"]) for a in "zyx"] == [2.0, 0.8, 0.8]
        assert np.isfinite(float(row["quality_image"]))
        image_path, label_path = manifest.parent / row["image"], manifest.parent / row["label"]
        if row["split"] == "test":
            (multiscale,) = zarr.open_group(image_path, mode="r").attrs["ome"]["multiscales"]
            assert [axis["name"] for axis in multiscale["axes"]] == ["c", "z", "y", "x"]
            assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 2.0, 0.8, 0.8]
            whole = (0, 0, 0, 12, 30, 34)
            image, labels = open_volume(image_path).read(whole)[0], open_volume(label_path).read(whole)[0]
            made = make_volume((12, 30, 34), seed=(7, 4))
            np.testing.assert_array_equal(image, made[0])
            np.testing.assert_array_equal(labels, made[1])
        else:
            with tifffile.TiffFile(image_path) as file:
                assert 'PhysicalSizeZ="2.0"' in (file.ome_metadata or "")
                assert file.series[0].axes == "ZYX"
            image, labels = tifffile.imread(image_path), tifffile.imread(label_path)
            assert image.shape == (8, 24, 20)
        assert image.dtype == np.uint16
        assert labels.dtype == np.uint32
        assert labels.max() == int(row["nuclei"])
        assert row["synthetic"] == "1"
    assert [row.name for row in read_manifest(manifest).rows] == ["train_0", "train_1", "val_0", "test_0"]


def test_a_finished_specimen_is_reused_and_another_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "specimen"
    manifest = write_specimen(out, seed=7, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished specimen was made again")

    monkeypatch.setattr(synthetic_makers, "make_volume_with_classes", refuse)
    assert write_specimen(out, seed=7, **SMALL) == manifest
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match="seed"):
        write_specimen(out, seed=8, **SMALL)
    with pytest.raises(ValueError, match="train_shape"):
        write_specimen(out, seed=7, **{**SMALL, "train_shape": (8, 24, 21)})


def test_an_interrupted_write_goes_on_and_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_specimen(tmp_path / "whole", seed=7, **SMALL)
    out = tmp_path / "interrupted"
    write_tiff = synthetic.write_ome_tiff
    calls: list[Path] = []

    def break_at_the_fourth(path: Path, *rest: object, **options: object) -> None:
        calls.append(path)
        if len(calls) == 4:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        write_tiff(path, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "write_ome_tiff", break_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        write_specimen(out, seed=7, **SMALL)
    assert not (out / "manifest.csv").exists()
    assert sorted(path.name for path in out.iterdir()) == ["specimen.json", "train_0"]
    monkeypatch.undo()
    resumed = write_specimen(out, seed=7, **SMALL)
    files = sorted(path.relative_to(whole.parent) for path in whole.parent.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    for file in files:
        assert (whole.parent / file).read_bytes() == (out / file).read_bytes(), file
    assert resumed.read_text() == whole.read_text()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        write_specimen(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="is a file"):
        write_specimen(tmp_path / "notes.txt", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "specimen.json").write_text("{")
    with pytest.raises(ValueError, match="unreadable"):
        write_specimen(tmp_path / "odd", **SMALL)


def test_wrong_counts_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_volumes"):
        write_specimen(tmp_path / "a", val_volumes=-1)
    with pytest.raises(ValueError, match="at least one"):
        write_specimen(tmp_path / "a", train_volumes=0, val_volumes=0, test_volumes=0)
    with pytest.raises(ValueError, match="test_shape"):
        write_specimen(tmp_path / "a", test_shape=(5, 5))
    with pytest.raises(ValueError, match="channels"):
        write_specimen(tmp_path / "a", channels=0)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="annotated_fraction"):
            write_specimen(tmp_path / "a", annotated_fraction=fraction)
    with pytest.raises(ValueError, match="unlabelled_volumes"):
        write_specimen(tmp_path / "a", unlabelled_volumes=-2)
    assert not (tmp_path / "a").exists()


def test_two_channels_and_two_classes_on_disk(tmp_path: Path) -> None:
    manifest = write_specimen(tmp_path / "specimen", channels=2, num_classes=2, **SMALL)
    for row in read_manifest_rows(manifest):
        rows = read_manifest_rows(manifest.parent / row["classes"])
        assert [int(entry["id"]) for entry in rows] == list(range(1, int(row["nuclei"]) + 1))
        assert {int(entry["class"]) for entry in rows} <= {0, 1}
        if row["split"] == "test":
            assert open_volume(manifest.parent / row["image"]).shape == (2, 12, 30, 34)
        else:
            with tifffile.TiffFile(manifest.parent / row["image"]) as file:
                assert file.series[0].axes == "CZYX"
                assert file.series[0].shape == (2, 8, 24, 20)
    assert json.loads((manifest.parent / "specimen.json").read_text())["channels"] == 2


def test_a_specimen_of_an_earlier_version_is_read_and_reused(tmp_path: Path) -> None:
    """Then a stack was one level at the root, the manifest had no column synthetic, specimen.json fewer keys."""
    out = tmp_path / "specimen"
    manifest = write_specimen(out, seed=7, **SMALL)
    described = json.loads((out / "specimen.json").read_text())
    for name in ("unlabelled_volumes", "unlabelled_shape", "annotated_fraction", "stream"):
        del described[name]
    (out / "specimen.json").write_text(json.dumps(described, indent=2) + "\n")
    lines = manifest.read_text().splitlines()
    assert lines[0].endswith(",synthetic")
    manifest.write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in lines))
    for name, voxels in zip(("image", "labels"), make_volume((12, 30, 34), seed=(7, 4)), strict=True):
        shutil.rmtree(out / "test_0" / f"{name}.zarr")
        group = zarr.create_group(out / "test_0" / f"{name}.zarr", zarr_format=3)
        group.create_array("0", data=voxels, chunks=(12, 30, 34))
        axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
        scale = [{"type": "scale", "scale": [2.0, 0.8, 0.8]}]
        datasets = [{"path": "0", "coordinateTransformations": scale}]
        ome = {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}
        group.attrs["ome"] = ome | ({"image-label": {"version": "0.5"}} if name == "labels" else {})
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_specimen(out, seed=7, **SMALL) == manifest
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    stack = read_manifest(manifest).rows[3]
    np.testing.assert_array_equal(stack.open_label().read((0, 0, 0, 12, 30, 34))[0], voxels)
    with pytest.raises(ValueError, match="different: annotated_fraction"):
        write_specimen(out, seed=7, annotated_fraction=0.5, **SMALL)


def test_volumes_without_labels(tmp_path: Path) -> None:
    manifest = write_specimen(tmp_path / "a", seed=7, unlabelled_volumes=2, unlabelled_shape=(6, 20, 22), **SMALL)
    *others, first, second = read_manifest(manifest).rows
    assert [row.name for row in others] == ["train_0", "train_1", "val_0", "test_0"]
    for row in (first, second):
        assert row.label is None
        assert row.split == "train"
        assert row.attributes["synthetic"] == 1
        assert row.open_image().shape == (1, 6, 20, 22)
    assert first.specimen != second.specimen
    assert not (manifest.parent / "unlabelled_0" / "labels.tif").exists()
    # The other volumes are those of a specimen without them.
    bare = write_specimen(tmp_path / "b", seed=7, **SMALL).parent
    for name in ("train_0/image.tif", "train_1/labels.tif", "val_0/image.tif"):
        assert (bare / name).read_bytes() == (manifest.parent / name).read_bytes()
    alone = write_specimen(
        tmp_path / "c", train_volumes=0, val_volumes=0, test_volumes=0, unlabelled_volumes=1, train_shape=(4, 9, 8)
    )
    assert [row.label for row in read_manifest(alone).rows] == [None]


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.7])
def test_partly_annotated_labels(fraction: float) -> None:
    _, labels = make_volume((20, 64, 50), seed=4)
    rng = np.random.default_rng(1)
    found, kept = synthetic.annotate_partly(labels, fraction, rng)
    ignore = np.iinfo(np.uint32).max
    assert sorted(set(np.unique(found)) - {0, ignore}) == list(range(1, len(kept) + 1))
    known = found != ignore
    assert set(np.unique(labels[known & (found == 0)])) <= {0}  # background is background
    for number, before in enumerate(kept, start=1):
        np.testing.assert_array_equal(found == number, labels == before)  # whole, though it leaves the box
    background = np.argwhere(found == 0)
    low, high = background.min(axis=0), background.max(axis=0) + 1
    assert np.prod(high - low) <= np.prod(np.rint(np.array(labels.shape) * fraction ** (1 / 3)) + 1)
    outside = np.ones(labels.shape, bool)
    outside[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = False
    assert (found[outside] != 0).all()
    again, _ = synthetic.annotate_partly(labels, fraction, np.random.default_rng(1))
    np.testing.assert_array_equal(found, again)


def test_partly_annotated_volumes_are_those_for_training_only(tmp_path: Path) -> None:
    # Two classes: the table of classes follows the ids that are left.
    nuclei = NucleiModel(density=6e-4, diameter_um=(6.0, 8.0))
    options = {"seed": 7, "train_shape": (16, 60, 50), "train_volumes": 1, "test_shape": (8, 30, 34), "nuclei": nuclei}
    partial = write_specimen(tmp_path / "a", annotated_fraction=0.4, num_classes=2, **options)  # type: ignore[arg-type]
    whole = write_specimen(tmp_path / "b", num_classes=2, **options)  # type: ignore[arg-type]
    for name in ("train_0/image.tif", "val_0/labels.tif", "val_0/classes.csv"):
        assert (partial.parent / name).read_bytes() == (whole.parent / name).read_bytes()
    first, all_of_it = (read_manifest(manifest).rows[0] for manifest in (partial, whole))
    some, every = (row.open_label().read((0, 0, 0, 16, 60, 50))[0] for row in (first, all_of_it))
    ignore = np.iinfo(np.uint32).max
    assert 0.3 < (some == ignore).mean() < 0.7
    ids = sorted(set(np.unique(some)) - {0, ignore})
    assert 0 < len(ids) == first.attributes["nuclei"] < all_of_it.attributes["nuclei"]
    assert isinstance(first.classes, dict)
    assert isinstance(all_of_it.classes, dict)
    assert sorted(first.classes) == ids
    for number in ids:
        (before,) = np.unique(every[some == number])
        assert first.classes[number] == all_of_it.classes[before]


def test_a_stack_that_is_made_by_the_plane_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"seed": 7, "train_volumes": 0, "val_volumes": 0, "test_shape": (30, 40, 34), "stream": True}
    whole = write_specimen(tmp_path / "whole", **options)  # type: ignore[arg-type]
    calls: list[Path] = []

    def break_at_the_labels(image: object, output: Path, **rest: object) -> object:
        calls.append(output)
        if rest:
            raise KeyboardInterrupt
        return convert_volume(image, output)

    monkeypatch.setattr(synthetic, "convert_volume", break_at_the_labels)
    with pytest.raises(KeyboardInterrupt):
        write_specimen(tmp_path / "cut", **options)  # type: ignore[arg-type]
    monkeypatch.undo()
    image = tmp_path / "cut" / ".partial-test_0" / "image.zarr"
    written = {path: path.stat().st_mtime_ns for path in image.rglob("*") if path.is_file()}
    manifest = write_specimen(tmp_path / "cut", **options)  # type: ignore[arg-type]
    assert manifest.read_bytes() == whole.read_bytes()
    moved = tmp_path / "cut" / "test_0" / "image.zarr"
    assert {moved / path.relative_to(image): time for path, time in written.items()} == {
        path: path.stat().st_mtime_ns for path in moved.rglob("*") if path.is_file()
    }
    (row,) = read_manifest(manifest).rows
    labels = row.open_label().read((0, 0, 0, 30, 40, 34))
    np.testing.assert_array_equal(np.unique(labels), np.arange(row.attributes["nuclei"] + 1))
    np.testing.assert_array_equal(labels[0], make_volume((30, 40, 34), seed=(7, 1))[1])
    with pytest.raises(ValueError, match="different: stream"):
        write_specimen(tmp_path / "cut", **(options | {"stream": False}))  # type: ignore[arg-type]
