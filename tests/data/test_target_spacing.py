"""Crops at one voxel size: against volumes resampled by hand, by integrals and at voxels' centres."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from crop_toys import image_volume, label_volume, write_dataset

from seg3d_monai.data import CropDataset, CropIndex, DataConfig, VolumeDataset, build_index, read_manifest
from seg3d_monai.data.crop_sampling import CropSampler
from seg3d_monai.data.synthetic import NucleiModel, make_volume
from seg3d_monai.data.transforms import train_transforms

CROP = (4, 9, 7)
FINE, TARGET = (1.0, 0.5, 0.4), (2.0, 0.75, 0.4)
MAX16 = 65535


def indexed(
    folder: Path,
    volumes: Mapping[str, tuple[np.ndarray, np.ndarray]],
    spacings: Sequence[Sequence[float] | None],
    **config: Any,
) -> CropIndex:
    columns: dict[str, list[object]] = {
        f"spacing_{axis}_um": ["" if spacing is None else spacing[i] for spacing in spacings]
        for i, axis in enumerate("zyx")
    }
    images = [image for image, _ in volumes.values()]
    columns |= {"axes": ["CZYX" if image.ndim == 4 else "ZYX" for image in images], "split": ["train"] * len(images)}
    options = {"crop_size": CROP, "stride": (2, 4, 3), "min_voxels": 3, "percentiles": (0.0, 100.0)}
    manifest = write_dataset(folder, volumes, columns)
    return build_index(manifest, folder / "i.sqlite", DataConfig(**(options | config)), progress=False)


def means(array: np.ndarray, axis: int, step: float, count: int) -> np.ndarray:
    """The mean of a volume, taken as constant within its voxels, over each of `count` longer voxels."""
    faces, edges = np.arange(array.shape[axis] + 1), (np.arange(count + 1) * step).clip(0, array.shape[axis])

    def of_line(line: np.ndarray) -> np.ndarray:
        return np.diff(np.interp(edges, faces, np.concatenate([[0], np.cumsum(line)]))) / np.diff(edges)

    return np.apply_along_axis(of_line, axis, array.astype(np.float64))


def at_centres(array: np.ndarray, axis: int, step: float, count: int) -> np.ndarray:
    """Linear interpolation at the centres of shorter voxels, the outermost values continued."""
    places, centres = (np.arange(count) + 0.5) * step, np.arange(array.shape[axis]) + 0.5
    return np.apply_along_axis(lambda line: np.interp(places, centres, line), axis, array.astype(np.float64))


def by_hand(image: np.ndarray, label: np.ndarray, step: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A volume [Z, Y, X] and its labels on voxels that are `step` times as long, without the code under test."""
    shape = [int(np.ceil(round(n / s, 6))) for n, s in zip(label.shape, step, strict=True)]
    result = image
    for axis, (s, count) in enumerate(zip(step, shape, strict=True)):
        result = means(result, axis, s, count) if s > 1 else at_centres(result, axis, s, count)
    places = [
        np.minimum(np.floor((np.arange(count) + 0.5) * s + 1e-9).astype(int), n - 1)
        for s, count, n in zip(step, shape, label.shape, strict=True)
    ]
    return result, label[np.ix_(*places)]


def raw(sample: Mapping[str, Any], index: CropIndex) -> np.ndarray:
    """Grey values again, of a volume whose percentiles are its extremes."""
    record = next(volume for volume in index.volumes() if volume.name == sample["volume"])
    low, high = record.intensity.low[0], record.intensity.high[0]
    values: np.ndarray = sample["image"][0].numpy().astype(np.float64) * (high - low) + low
    return values


def draws(index: CropIndex, num_samples: int, crop_size: Sequence[int] = CROP, **options: Any) -> list[Any]:
    """The draws of a dataset of seed 0, epoch 0."""
    sampler = CropSampler(index=index, crop_size=crop_size, **options)
    return [sampler.draw(np.random.default_rng([0, 0, position])) for position in range(num_samples)]


class Spy:
    """A transform that changes nothing and remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.seen.append(data)
        return data


def test_a_specimen_resampled_by_hand_gives_the_same_targets(tmp_path: Path) -> None:
    nuclei = NucleiModel(density=6e-4, diameter_um=(6.0, 8.0))
    image, label = make_volume((24, 60, 48), seed=3, spacing_um=FINE, nuclei=nuclei)
    label = label.astype(np.uint16)
    step = (2.0, 1.5, 1.0)
    coarse_image, coarse_label = by_hand(image, label, step)
    assert set(np.unique(coarse_label)) == set(np.unique(label))  # no nucleus is too thin
    stored = np.rint(coarse_image).astype(np.uint16)
    fine = indexed(tmp_path / "fine", {"v": (image, label)}, [FINE])
    coarse = indexed(tmp_path / "coarse", {"v": (stored, coarse_label)}, [TARGET])
    options: dict[str, Any] = {"num_samples": 30, "crop_size": (6, 20, 18), "foreground_prob": 0.0, "min_voxels": 8}
    resampled = CropDataset(fine, target_spacing_um=TARGET, **options)
    plain = CropDataset(coarse, **options)
    num_targets = 0
    for position in range(30):
        a, b = resampled[position], plain[position]
        ids = sorted({*a["targets"]["ids"].tolist(), *b["targets"]["ids"].tolist()})
        known = {int(i): box for i, box in zip(a["targets"]["ids"], a["targets"]["boxes"], strict=True)}
        wanted = {int(i): box for i, box in zip(b["targets"]["ids"], b["targets"]["boxes"], strict=True)}
        assert ids == sorted(known) == sorted(wanted)
        for i in ids:
            assert (known[i] - wanted[i]).abs().max() <= 1
        num_targets += len(ids)
        np.testing.assert_array_equal(a["targets"]["label"], b["targets"]["label"])
        np.testing.assert_allclose(raw(a, fine), raw(b, coarse), atol=0.51)
    assert num_targets > 40


@pytest.mark.parametrize(
    ("spacing", "step"),
    [
        ((1.0, 0.5, 0.4), (2.0, 1.5, 1.0)),
        ((4.0, 0.3, 0.4), (0.5, 2.5, 1.0)),
        ((2.0, 1.2, 0.25), (1.0, 0.625, 1.6)),
        ((0.31, 0.75, 0.1), (2 / 0.31, 1.0, 4.0)),
    ],
)
def test_a_crop_is_that_of_the_volume_resampled_as_a_whole(
    tmp_path: Path, spacing: Sequence[float], step: Sequence[float]
) -> None:
    shape = (13, 25, 31)
    boxes = {2: (0, 0, 0, 6, 8, 9), 5: (4, 10, 5, 12, 20, 16), 9: (3, 12, 20, 13, 25, 31), 11: (0, 0, 15, 5, 9, 30)}
    label = label_volume(shape, boxes)
    label[6:, 3:9, 18:] = MAX16
    image = image_volume(shape)
    index = indexed(tmp_path, {"v": (image, label)}, [spacing])
    expected_image, expected_label = by_hand(image, label, step)
    extent = np.array(expected_label.shape)
    spy = Spy()
    options: dict[str, Any] = {"foreground_prob": 0.5, "target_spacing_um": TARGET}
    dataset = CropDataset(index, num_samples=40, margin=(1, 2, 3), transform=spy, min_visible=0.0, **options)
    for position, draw in enumerate(draws(index, 40, **options)):
        sample = dataset[position]
        assert draw.step == pytest.approx(step)
        low, high = np.array(draw.region[:3]), np.array(draw.region[3:])
        assert (low >= 0).all()
        assert (high <= extent).all()
        assert (high - low == np.minimum(CROP, extent)).all()
        # What the volume has of the region and its margin is there, the rest is ignore.
        seen = spy.seen[-1]
        assert seen["spacing_um"].tolist() == list(TARGET)
        start, stop = low - (1, 2, 3), low + CROP + (1, 2, 3)
        inside = tuple(slice(max(a, 0), min(b, n)) for a, b, n in zip(start, stop, extent, strict=True))
        there = tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, start, strict=True))
        codes = np.full(stop - start, MAX16, np.int64)
        codes[there] = expected_label[inside]
        found = seen["label"][0].numpy()
        np.testing.assert_array_equal(found == -1, codes == MAX16)
        np.testing.assert_array_equal(found == 0, codes == 0)
        grey = np.zeros(stop - start)
        grey[there] = (expected_image[inside] - image.min()) / (int(image.max()) - int(image.min()))
        np.testing.assert_allclose(seen["image"][0].numpy(), grey, atol=1e-5)
        # The place on disk: as many micrometres, up to a voxel at each face.
        for axis in range(3):
            a, b = sample["roi"][axis], sample["roi"][axis + 3]
            assert 0 <= a < b <= shape[axis]
            assert a <= low[axis] * step[axis] + 1e-6 < a + 1 + 1e-6
            assert b == min(shape[axis], int(np.ceil(round(high[axis] * step[axis], 6))))


def test_volumes_near_the_target_are_read_as_without_one_to_the_bit(tmp_path: Path) -> None:
    label = label_volume((9, 20, 22), {1: (0, 0, 0, 5, 9, 8), 4: (3, 8, 9, 9, 20, 22)})
    volumes = {name: (image_volume((2, 9, 20, 22), seed), label) for seed, name in enumerate(("a", "b", "c"))}
    index = indexed(tmp_path, volumes, [(2.0, 0.75, 0.4), (2.1, 0.7, 0.42), (1.9, 0.8, 0.38)])
    options: dict[str, Any] = {"num_samples": 30, "margin": (1, 2, 2), "foreground_prob": 0.6}
    strong = {"tilt_degrees": 10.0, "elastic_prob": 0.5, "elastic_um": (0.2, 0.5), "elastic_period_um": 2.0}
    plain = CropDataset(index, transform=train_transforms(crop_size=CROP, **strong), **options)
    asked = CropDataset(
        index, transform=train_transforms(crop_size=CROP, **strong), target_spacing_um=TARGET, **options
    )
    assert {asked[position]["volume"] for position in range(30)} == {"a", "b", "c"}
    for position in range(30):
        a, b = plain[(2, position)], asked[(2, position)]
        assert torch.equal(a["image"], b["image"])
        for key in ("label", "ids", "boxes", "classes"):
            assert torch.equal(a["targets"][key], b["targets"][key])  # type: ignore[literal-required]
        assert (a["roi"], a["crop_id"], a["volume"]) == (b["roi"], b["crop_id"], b["volume"])
    assert asked.spacing_um == TARGET
    assert plain.spacing_um == (2.0, 0.75, 0.4)


def test_volumes_of_two_sizes_show_cells_of_one_size_and_repeat(tmp_path: Path) -> None:
    """A box of (8, 9, 8) micrometres is the same box in voxels of the target, whichever volume it is in."""
    fine = label_volume((20, 60, 70), {3: (4, 12, 10, 12, 30, 30)})
    coarse = label_volume((10, 40, 70), {7: (2, 8, 10, 6, 20, 30)})
    index = indexed(
        tmp_path,
        {"fine": (image_volume(fine.shape), fine), "coarse": (image_volume(coarse.shape), coarse)},
        [FINE, TARGET],
    )
    dataset = CropDataset(
        index, num_samples=20, crop_size=(6, 20, 30), foreground_prob=1.0, target_spacing_um=list(TARGET)
    )
    assert CropDataset(index, num_samples=1).spacing_um is None
    assert dataset.spacing_um == TARGET
    names = set()
    for position in range(20):
        sample = dataset[position]
        names.add(sample["volume"])
        (box,) = sample["targets"]["boxes"]
        assert (box[3:] - box[:3]).tolist() == [4, 12, 20]
        extents = np.subtract(sample["roi"][3:], sample["roi"][:3])
        assert extents.tolist() in ([[12, 30, 30], [12, 31, 30]] if sample["volume"] == "fine" else [[6, 20, 30]])
        again = CropDataset(
            CropIndex(index.path), num_samples=20, crop_size=(6, 20, 30), foreground_prob=1.0, target_spacing_um=TARGET
        )[position]
        assert torch.equal(again["image"], sample["image"])
        assert torch.equal(again["targets"]["label"], sample["targets"]["label"])
    assert names == {"fine", "coarse"}


def test_no_id_is_gained_and_ignore_stays_ignore(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 400, (12, 24, 22)).astype(np.uint16)
    label[rng.random(label.shape) < 0.2] = MAX16
    mask = np.zeros(label.shape, np.uint8)
    mask[:, :, 15:] = 1
    index = indexed(tmp_path, {"v": (image_volume(label.shape), label)}, [(0.7, 0.31, 0.9)])
    tifffile.imwrite(tmp_path / "v" / "ignore.tif", mask)
    lines = (tmp_path / "manifest.csv").read_text().splitlines()
    (tmp_path / "manifest.csv").write_text(f"{lines[0]},ignore\n{lines[1]},v/ignore.tif\n")
    index = build_index(read_manifest(tmp_path / "manifest.csv"), tmp_path / "i.sqlite", index.config, progress=False)
    dataset = CropDataset(
        index, num_samples=10, min_voxels=0, min_visible=0.0, foreground_prob=0.0, target_spacing_um=TARGET
    )
    on_disk = np.array([0, *index.instances(1).labels])
    step = np.array(TARGET) / (0.7, 0.31, 0.9)
    for position, draw in enumerate(draws(index, 10, foreground_prob=0.0, target_spacing_um=TARGET)):
        found = dataset[position]["targets"]["label"].numpy()
        where = [(np.arange(a, b) + 0.5) * s for a, b, s in zip(draw.region[:3], draw.region[3:], step, strict=True)]
        places = np.ix_(
            *[np.minimum(np.floor(w + 1e-9).astype(int), n - 1) for w, n in zip(where, label.shape, strict=True)]
        )
        truth, is_ignored = label[places], (label[places] == MAX16) | (mask[places] != 0)
        window = tuple(slice(0, n) for n in truth.shape)
        np.testing.assert_array_equal(found[window] == -1, is_ignored)
        np.testing.assert_array_equal(on_disk[found[window]][~is_ignored], truth[~is_ignored])
        outside = np.ones(CROP, bool)
        outside[window] = False
        assert (found[outside] == -1).all()


def test_counts_are_of_the_targets_voxels(tmp_path: Path) -> None:
    # In the fine volume 4 x 6 x 5 = 120 voxels, a third of which are the target's: 2 x 4 x 5 = 40.
    label = label_volume((12, 30, 24), {1: (4, 12, 8, 8, 18, 13)})
    index = indexed(tmp_path, {"v": (image_volume(label.shape), label)}, [FINE])

    def is_target(**options: Any) -> bool:
        dataset = CropDataset(
            index, num_samples=1, crop_size=(6, 20, 24), foreground_prob=1.0, target_spacing_um=TARGET, **options
        )
        return dataset[0]["targets"]["ids"].tolist() == [1]

    assert is_target(min_object_voxels=40)
    assert not is_target(min_object_voxels=41)

    class Half:
        """Leave the object's first plane of two, at the crop's face."""

        def __call__(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            first = int(torch.nonzero(data["label"][0] > 0)[0, 0])
            label = torch.full_like(data["label"], 0)
            label[:, -1] = data["label"][:, first]
            return {**data, "label": label}

    # Twenty voxels of forty are left: half of it, not a sixth.
    assert is_target(transform=Half(), min_voxels=20, min_visible=0.5)
    assert not is_target(transform=Half(), min_voxels=21, min_visible=0.5)
    assert not is_target(transform=Half(), min_voxels=20, min_visible=0.51)


def test_a_filter_over_crops_and_volumes_of_one_plane_or_less_than_a_crop(tmp_path: Path) -> None:
    plane = label_volume((1, 12, 10), {6: (0, 2, 1, 1, 8, 9)})
    wide = label_volume((16, 60, 40), {1: (2, 40, 20, 10, 58, 38)})
    index = indexed(
        tmp_path,
        {"plane": (image_volume(plane.shape), plane), "wide": (image_volume(wide.shape), wide)},
        [(1.0, 1.5, 0.8), FINE],
    )
    where = "num_instances > 0"
    dataset = CropDataset(
        index,
        num_samples=30,
        where=where,
        foreground_prob=0.5,
        target_spacing_um=TARGET,
        min_voxels=0,
        min_visible=0.0,
    )
    names = set()
    for position in range(30):
        sample = dataset[position]
        names.add(sample["volume"])
        assert sample["image"].shape == (1, *CROP)
        crop = index.crop(sample["crop_id"])
        assert crop.num_instances > 0
        # Within half a stride of the crop that matched, and up to a voxel of either size.
        middle = np.add(sample["roi"][:3], sample["roi"][3:]) / 2
        if sample["volume"] == "wide":
            assert (np.abs(middle - np.add(crop.roi[:3], crop.roi[3:]) / 2) <= (3, 5.5, 4)).all()
        else:
            # One plane of 1 um is the only one of the target's 2 um; 18 um are 24 voxels, 8 um are 20.
            assert sample["roi"][0::3] == (0, 1)
            assert not sample["image"][0, 1:].any()
            assert (sample["targets"]["label"][1:] == -1).all()
            assert (sample["targets"]["label"][0] != -1).all()
    assert names == {"plane", "wide"}


def test_what_cannot_be_resampled_is_refused_by_name(tmp_path: Path) -> None:
    label = label_volume((6, 12, 10), {1: (1, 2, 3, 5, 9, 8)})
    volumes = {name: (image_volume(label.shape, seed), label) for seed, name in enumerate(("known", "unknown", "nm"))}
    index = indexed(tmp_path, volumes, [FINE, None, (1000.0, 500.0, 400.0)])
    with pytest.raises(ValueError, match=r"^unknown: no voxel size is known.*spacing_z_um.*manifest.*null"):
        CropDataset(index, num_samples=1, target_spacing_um=TARGET)
    with pytest.raises(ValueError, match=r"^unknown: no voxel size is known"):
        VolumeDataset(index, target_spacing_um=TARGET)
    named = 'name != "unknown"'
    with pytest.raises(ValueError, match=r"^nm: voxels are more than 50 times .* micrometres"):
        CropDataset(index, num_samples=1, where=named, target_spacing_um=TARGET)
    assert len(CropDataset(index, num_samples=1, where='name == "known"', target_spacing_um=TARGET)) == 1
    assert len(CropDataset(index, num_samples=1)) == 1
    assert len(VolumeDataset(index)) == 3
    for wrong in ((1.0, 0.5), (1.0, 0.0, 0.5), "fine"):
        with pytest.raises(ValueError, match=r"target_spacing_um=.* is not three positive numbers"):
            CropDataset(index, num_samples=1, target_spacing_um=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"target_spacing_um=.* is not three positive numbers"):
            VolumeDataset(index, target_spacing_um=wrong)  # type: ignore[arg-type]
