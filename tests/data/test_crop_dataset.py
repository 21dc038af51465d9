"""Crops, loaders and whole volumes: what an item holds, that it repeats, and where crops are drawn."""

import os
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from crop_toys import boxes_by_loop, image_volume, label_volume, write_dataset

from seg3d_monai.data import (
    CropDataset,
    CropIndex,
    CropLoader,
    DataConfig,
    VolumeDataset,
    build_index,
    collate_crops,
    crop_dataset,
)
from seg3d_monai.data.crop_dataset import CropSample
from seg3d_monai.data.loader import EpochSampler
from seg3d_monai.data.transforms import train_transforms

CROP = (4, 8, 6)
STRONG: dict[str, Any] = {
    "affine_prob": 0.8,
    "tilt_degrees": 10.0,
    "shear": 0.1,
    "elastic_prob": 0.5,
    "elastic_um": (0.5, 1.5),
    "elastic_period_um": 4.0,
    "coarse_z_prob": 0.3,
    "channel_drop_prob": 0.3,
}


def toy(folder: Path) -> CropIndex:
    """Three volumes of two channels: gaps in the ids and an ignored corner, smaller than the crop, crowded."""
    first = label_volume((6, 20, 30), {2: (0, 0, 0, 3, 4, 4), 5: (1, 10, 5, 5, 16, 11), 9: (2, 15, 24, 5, 20, 30)})
    first[0, 0, 29] = 65535
    small = label_volume((3, 9, 5), {1: (0, 2, 1, 2, 6, 4)})
    crowd = np.kron(np.arange(1, 301).reshape(5, 6, 10), np.ones((2, 2, 3), int)).astype(np.uint16)
    volumes = {
        name: (image_volume((2, *label.shape), seed), label)
        for seed, (name, label) in enumerate({"first": first, "small": small, "crowd": crowd}.items())
    }
    columns = {
        "axes": ["CZYX"] * 3,
        "specimen": ["s", "s", "t"],
        "split": ["train", "train", "val"],
        "class": [0, 1, 2],
        "quality_image": [3, 2, 1],
    }
    manifest = write_dataset(folder, volumes, columns)
    return build_index(
        manifest, folder / "i.sqlite", DataConfig(crop_size=CROP, stride=(2, 4, 3), min_voxels=3), progress=False
    )


def files(index: CropIndex, name: str) -> tuple[np.ndarray, np.ndarray]:
    record = next(volume for volume in index.volumes() if volume.name == name)
    return tifffile.imread(record.image), tifffile.imread(record.label)


def same(a: CropSample, b: CropSample) -> bool:
    return (
        torch.equal(a["image"], b["image"])
        and all(torch.equal(a["targets"][key], b["targets"][key]) for key in ("label", "ids", "boxes", "classes"))
        and all(a[key] == b[key] for key in ("crop_id", "volume", "roi"))
    )


def test_a_crop_holds_the_voxels_of_its_region(tmp_path: Path) -> None:
    index = toy(tmp_path)
    dataset = CropDataset(index, num_samples=60, foreground_prob=0.5, min_voxels=0, min_visible=0.0)
    seen = set()
    for position in range(60):
        sample = dataset[position]
        seen.add(sample["volume"])
        image, label = files(index, sample["volume"])
        z1, y1, x1, z2, y2, x2 = sample["roi"]
        d, h, w = z2 - z1, y2 - y1, x2 - x1
        record = next(volume for volume in index.volumes() if volume.name == sample["volume"])
        expected = record.intensity.normalise(image[:, z1:z2, y1:y2, x1:x2])
        assert sample["image"].shape == (2, *CROP)
        assert np.array_equal(sample["image"][:, :d, :h, :w].numpy(), expected)
        # ids on disk come back through the index; ignore is -1; beyond the volume is ignore.
        found = sample["targets"]["label"].numpy()
        to_disk = np.array([0, *index.instances(record.id).labels, 65535])
        assert np.array_equal(to_disk[found[:d, :h, :w]], label[z1:z2, y1:y2, x1:x2])
        outside = np.ones(CROP, bool)
        outside[:d, :h, :w] = False
        assert (found[outside] == -1).all()
        assert not sample["image"][:, torch.from_numpy(outside)].any()
        expected_boxes = boxes_by_loop(found)
        assert sample["targets"]["ids"].tolist() == list(expected_boxes)
        assert sample["targets"]["boxes"].tolist() == list(expected_boxes.values())
        assert set(sample["targets"]["classes"].tolist()) <= {{"first": 0, "small": 1, "crowd": 2}[sample["volume"]]}
    assert seen == {"first", "small", "crowd"}


def test_dtypes_and_shapes(tmp_path: Path) -> None:
    dataset = CropDataset(toy(tmp_path), num_samples=1, crop_size=(3, 5, 7))
    sample = dataset[0]
    assert dataset.num_channels == 2
    assert sample["image"].dtype == torch.float32
    assert sample["image"].is_contiguous()
    assert sample["targets"]["label"].shape == (3, 5, 7)
    assert sample["targets"]["boxes"].dtype == torch.float32
    assert isinstance(sample["crop_id"], int)


def test_the_same_item_has_the_same_bits_and_others_differ(tmp_path: Path) -> None:
    index = toy(tmp_path)
    options = {"num_samples": 8, "transform": train_transforms(crop_size=CROP), "margin": (1, 2, 2)}
    dataset = CropDataset(index, **options)  # type: ignore[arg-type]
    first = [dataset[(3, position)] for position in range(8)]
    again = CropDataset(CropIndex(index.path), **options)  # type: ignore[arg-type]
    backwards = [again[(3, position)] for position in reversed(range(8))][::-1]
    assert all(same(a, b) for a, b in zip(first, backwards, strict=True))
    assert same(dataset[5], dataset[(0, 5)])
    assert not any(same(a, dataset[(4, position)]) for position, a in enumerate(first))
    assert not same(first[0], first[1])
    other = CropDataset(index, seed=1, **options)  # type: ignore[arg-type]
    assert not any(same(a, other[(3, position)]) for position, a in enumerate(first))


def test_positions_beyond_the_end(tmp_path: Path) -> None:
    dataset = CropDataset(toy(tmp_path), num_samples=3)
    assert len(dataset) == 3
    assert len(list(dataset)) == 3  # type: ignore[call-overload]
    for position in (3, -1):
        with pytest.raises(IndexError):
            dataset[position]


def test_foreground_crops_hold_an_instance_whole(tmp_path: Path) -> None:
    index = toy(tmp_path)
    dataset = CropDataset(index, num_samples=80, where='name == "first"', foreground_prob=1.0)
    ids: Counter[int] = Counter()
    for position in range(80):
        sample = dataset[position]
        table = index.instances(1)
        start, stop = np.array(sample["roi"][:3]), np.array(sample["roi"][3:])
        whole = ((table.boxes[:, :3] >= start) & (table.boxes[:, 3:] <= stop)).all(axis=1)
        assert whole.any()
        ids.update(table.ids[whole].tolist())
    assert set(ids) == {1, 2, 3}


def test_instances_longer_than_the_crop_fill_it(tmp_path: Path) -> None:
    label = label_volume((6, 8, 40), {4: (1, 1, 5, 5, 7, 35)})
    manifest = write_dataset(tmp_path, {"long": (image_volume(label.shape), label)})
    index = build_index(manifest, tmp_path / "i.sqlite", DataConfig(crop_size=(6, 8, 10)), progress=False)
    dataset = CropDataset(index, num_samples=40, foreground_prob=1.0)
    starts = {dataset[position]["roi"][2] for position in range(40)}
    assert min(starts) >= 5
    assert max(starts) <= 25
    assert len(starts) > 10


def test_positions_are_uniform_without_foreground(tmp_path: Path) -> None:
    index = toy(tmp_path)
    dataset = CropDataset(index, num_samples=300, where='name == "first"', foreground_prob=0.0)
    rois = np.array([dataset[position]["roi"] for position in range(300)])
    # Starts along x run from 0 to 24; every one is hit about 12 times.
    counts = np.bincount(rois[:, 2], minlength=25)
    assert len(counts) == 25
    assert counts.min() >= 2
    assert set(rois[:, 0]) == {0, 1, 2}


def test_balance_by_volume_specimen_crop_and_instance(tmp_path: Path) -> None:
    index = toy(tmp_path)

    def shares(balance: str) -> dict[str, float]:
        dataset = CropDataset(index, num_samples=600, balance=balance, foreground_prob=0.5)  # type: ignore[arg-type]
        counts = Counter(dataset[position]["volume"] for position in range(600))
        return {name: counts[name] / 600 for name in ("first", "small", "crowd")}

    assert shares("volume") == pytest.approx({"first": 1 / 3, "small": 1 / 3, "crowd": 1 / 3}, abs=0.06)
    assert shares("specimen") == pytest.approx({"first": 1 / 4, "small": 1 / 4, "crowd": 1 / 2}, abs=0.06)
    total = sum(volume.num_instances for volume in index.volumes())
    instances = {volume.name: volume.num_instances / total for volume in index.volumes()}
    assert shares("instance") == pytest.approx(instances, abs=0.06)
    crops = {volume.name: volume.num_crops / len(index) for volume in index.volumes()}
    dataset = CropDataset(index, num_samples=600, balance="crop", foreground_prob=0.0)
    counts = Counter(dataset[position]["volume"] for position in range(600))
    assert {name: counts[name] / 600 for name in crops} == pytest.approx(crops, abs=0.06)


def test_splits_and_filters_are_kept_to(tmp_path: Path) -> None:
    index = toy(tmp_path)
    names = {sample["volume"] for sample in CropDataset(index, num_samples=20, split="val")}  # type: ignore[attr-defined]
    assert names == {"crowd"}
    chosen = CropDataset(index, num_samples=20, split="train", where="quality_image >= 3")
    assert {chosen[position]["volume"] for position in range(20)} == {"first"}


@pytest.mark.parametrize("foreground_prob", [0.0, 1.0])
def test_a_filter_on_crops_keeps_draws_near_them(tmp_path: Path, foreground_prob: float) -> None:
    index = toy(tmp_path)
    where = 'name == "first" and x1 == 24 and y1 == 12'
    dataset = CropDataset(index, num_samples=40, where=where, foreground_prob=foreground_prob)
    allowed = set(index.crop_ids(where=where)[:, 0].tolist())
    for position in range(40):
        sample = dataset[position]
        assert sample["crop_id"] in allowed
        crop = index.crop(sample["crop_id"])
        assert np.all(np.abs(np.array(sample["roi"]) - np.array(crop.roi)) <= np.array([1, 2, 1, 1, 2, 1]))


def test_the_crop_id_is_the_nearest_crop(tmp_path: Path) -> None:
    index = toy(tmp_path)
    dataset = CropDataset(index, num_samples=40, foreground_prob=0.5)
    for position in range(40):
        sample = dataset[position]
        volume = next(v for v in index.volumes() if v.name == sample["volume"])
        crops = [index.crop(n) for n in range(volume.first_crop, volume.first_crop + volume.num_crops)]
        distance = {c.id: np.abs(np.array(c.roi) - np.array(sample["roi"])).sum() for c in crops}
        assert distance[sample["crop_id"]] == min(distance.values())


def test_a_margin_is_read_and_cropped_away(tmp_path: Path) -> None:
    index = toy(tmp_path)
    seen = []

    def look(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append({key: value.clone() for key, value in data.items()})
        return data

    plain = CropDataset(index, num_samples=20, min_voxels=0, min_visible=0.0)
    wide = CropDataset(index, num_samples=20, min_voxels=0, min_visible=0.0, margin=(1, 3, 2), transform=look)
    samples = [wide[position] for position in range(20)]
    assert all(same(plain[position], sample) for position, sample in enumerate(samples))
    for data, sample in zip(seen, samples, strict=True):
        assert data["image"].shape == (2, 6, 14, 10)
        assert data["label"].shape == (1, 6, 14, 10)
        assert data["label"].dtype == torch.int32
        assert data["image"].dtype == torch.float32
        label = files(index, sample["volume"])[1]
        z, y, x = (a - m for a, m in zip(sample["roi"][:3], (1, 3, 2), strict=True))
        inside = np.zeros((6, 14, 10), bool)
        for place in np.ndindex(inside.shape):
            where = (place[0] + z, place[1] + y, place[2] + x)
            inside[place] = all(0 <= p < n for p, n in zip(where, label.shape, strict=True))
        assert (data["label"][0].numpy()[~inside] == -1).all()
        assert not data["image"][:, torch.from_numpy(~inside)].any()
        assert (
            (data["label"][0].numpy()[inside] == 0) == (label[_within(z, y, x, label.shape)] == 0).reshape(-1)
        ).all()


def _within(z: int, y: int, x: int, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(max(start, 0), min(start + extent, size))
        for start, extent, size in zip((z, y, x), (6, 14, 10), shape, strict=True)
    )


def test_fragments_are_ignored_by_their_full_size(tmp_path: Path) -> None:
    index = toy(tmp_path)
    dataset = CropDataset(index, num_samples=60, where='name == "first"', min_voxels=20, foreground_prob=0.3)
    full = index.instances(1).voxels
    fragments = 0
    for position in range(60):
        sample = dataset[position]
        label = files(index, "first")[1]
        z1, y1, x1, z2, y2, x2 = sample["roi"]
        part = label[z1:z2, y1:y2, x1:x2]
        for rank, number in enumerate((2, 5, 9)):
            visible = int((part == number).sum())
            kept = rank + 1 in sample["targets"]["ids"].tolist()
            assert kept == (visible > 0 and (visible == full[rank] or visible >= max(20, 0.1 * full[rank])))
            if visible and not kept:
                fragments += 1
                assert (sample["targets"]["label"].numpy()[part == number] == -1).all()
    assert fragments > 0


def test_ids_that_a_transform_removes_vanish(tmp_path: Path) -> None:
    def wipe(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"image": data["image"], "label": torch.where(data["label"] > 0, 0, data["label"])}

    dataset = CropDataset(toy(tmp_path), num_samples=3, foreground_prob=1.0, transform=wipe)
    assert len(dataset[0]["targets"]["ids"]) == 0
    assert dataset[0]["targets"]["boxes"].shape == (0, 6)


def test_an_index_without_any_instance_gives_empty_crops(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, {"v": (image_volume((5, 7, 9)), np.zeros((5, 7, 9), np.uint8))})
    index = build_index(manifest, tmp_path / "i.sqlite", DataConfig(crop_size=(3, 4, 5)), progress=False)
    sample = CropDataset(index, num_samples=2, foreground_prob=1.0)[1]
    assert len(sample["targets"]["ids"]) == 0
    assert (sample["targets"]["label"] == 0).all()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a loader's workers have it: the same bits are promised for the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("num_workers", "is_strong"), [(0, False), (2, False), (0, True), (2, True)])
def test_a_loader_gives_the_same_items_whatever_the_workers(tmp_path: Path, num_workers: int, is_strong: bool) -> None:
    index = toy(tmp_path)
    transform = train_transforms(crop_size=CROP, **(STRONG if is_strong else {}))
    dataset = CropDataset(index, num_samples=7, transform=transform, margin=(1, 2, 2))
    loader = CropLoader(dataset, batch_size=3, num_workers=num_workers)
    assert len(loader) == 3
    for epoch in (0, 4, 4):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch["targets"]) for batch in batches] == [3, 3, 1]
        assert batches[0]["image"].shape == (3, 2, *CROP)
        for position in range(7):
            batch, place = batches[position // 3], position % 3
            sample = dataset[(epoch, position)]
            keys = ("image", "targets", "crop_id", "volume", "roi")
            found = {key: batch[key][place] for key in keys}  # type: ignore[literal-required]
            assert same(found, sample)  # type: ignore[arg-type]
    assert loader.epoch == 4
    with pytest.raises(ValueError, match="epoch=-1"):
        loader.set_epoch(-1)


def test_workers_that_are_spawned_open_the_index_themselves(tmp_path: Path) -> None:
    dataset = CropDataset(toy(tmp_path), num_samples=2)
    expected = dataset[0]  # fills the cache, which must not travel
    loader = CropLoader(dataset, batch_size=1, num_workers=1, multiprocessing_context="spawn")
    batch = next(iter(loader))
    assert torch.equal(batch["image"][0], expected["image"])


def test_shuffling_permutes_and_repeats() -> None:
    sampler = EpochSampler(num_samples=10, shuffle=True, seed=3)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert sorted(first) == [(0, position) for position in range(10)]
    sampler.epoch = 1
    second = list(sampler)
    assert sorted(second) == [(1, position) for position in range(10)]
    assert [p for _, p in second] != [p for _, p in first]


def test_ranks_share_an_epoch_evenly() -> None:
    ranks = [list(EpochSampler(num_samples=7, rank=rank, num_replicas=3)) for rank in range(3)]
    assert [[p for _, p in items] for items in ranks] == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]
    assert len(EpochSampler(num_samples=7, rank=0, num_replicas=3)) == 3
    with pytest.raises(ValueError, match="rank=3"):
        EpochSampler(num_samples=7, rank=3, num_replicas=3)


def test_crops_of_different_shapes_are_not_collated(tmp_path: Path) -> None:
    index = toy(tmp_path)
    a, b = CropDataset(index, num_samples=1)[0], CropDataset(index, num_samples=1, crop_size=(2, 3, 4))[0]
    with pytest.raises(ValueError, match="a batch needs crops of one shape"):
        collate_crops([a, b])
    with pytest.raises(TypeError, match="no length"):
        CropLoader(iter([]), batch_size=1)  # type: ignore[arg-type]


def test_a_cache_is_bounded_and_changes_nothing(tmp_path: Path) -> None:
    index = toy(tmp_path)
    cached = CropDataset(index, num_samples=12)
    bare = CropDataset(index, num_samples=12, cache_bytes=0)
    tight = CropDataset(index, num_samples=12, cache_bytes=30000)
    for position in range(12):
        assert same(cached[position], bare[position])
        assert same(cached[position], tight[position])
    assert bare._cache is not None
    assert bare._cache.num_bytes == 0
    assert tight._cache is not None
    assert 0 < tight._cache.num_bytes <= 30000


def test_a_cache_belongs_to_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CropDataset(toy(tmp_path), num_samples=4)
    expected = dataset[2]
    assert same(dataset[2], expected)
    assert dataset._cache is not None
    assert dataset._cache.max_bytes == 1 << 30
    assert dataset._cache.num_bytes > 0
    travelled = pickle.loads(pickle.dumps(dataset))
    assert travelled._cache is None
    assert same(travelled[2], expected)
    # After a fork the parent's memory is the child's too. A loader's worker keeps its share if all volumes fit into it,
    # else little.
    for step, (num_workers, limit, kept) in enumerate([(3, 1 << 30, (1 << 30) // 3), (1, 6_000, 1 << 27)], start=1):
        monkeypatch.setattr(crop_dataset, "CACHE_BYTES", limit)
        monkeypatch.setattr(
            crop_dataset, "get_worker_info", lambda workers=num_workers: SimpleNamespace(num_workers=workers)
        )
        child = os.getpid() + step
        monkeypatch.setattr(os, "getpid", lambda process=child: process)
        assert same(dataset[2], expected)
        assert dataset._cache.max_bytes == kept
    own = CropDataset(dataset.index, num_samples=4, cache_bytes=12_345)
    assert same(own[2], expected)
    assert own._cache is not None
    assert own._cache.max_bytes == 12_345


def test_boxes_are_those_of_the_warped_labels(tmp_path: Path) -> None:
    index = toy(tmp_path)
    transform = train_transforms(crop_size=CROP, **STRONG)
    dataset = CropDataset(index, num_samples=40, transform=transform, margin=(2, 4, 4), min_visible=0.0)
    counts = set()
    for position in range(40):
        sample = dataset[position]
        label = sample["targets"]["label"].numpy()
        boxes = boxes_by_loop(label)
        assert sample["targets"]["ids"].tolist() == list(boxes)
        assert sample["targets"]["boxes"].tolist() == list(boxes.values())
        volume = next(volume for volume in index.volumes() if volume.name == sample["volume"])
        assert set(np.unique(label)) <= {-1, *range(volume.num_instances + 1)}
        assert sample["image"].shape == (2, *CROP)
        counts.add(len(boxes))
    assert min(counts) <= 1
    assert max(counts) > 10


def test_masked_voxels_are_ignored_whatever_the_labels_say(tmp_path: Path) -> None:
    label = label_volume((6, 20, 30), {2: (0, 0, 0, 3, 4, 4), 5: (1, 10, 5, 5, 16, 11), 9: (2, 15, 24, 5, 20, 30)})
    mask = np.zeros(label.shape, np.uint8)
    mask[:, :, 8:20] = 1  # half of 5, and background
    mask[2:, 14:] = 7  # the other half of 5's end, and all of 9
    tifffile.imwrite(tmp_path / "mask.tif", mask, photometric="minisblack")
    manifest = write_dataset(tmp_path, {"v": (image_volume(label.shape), label)}, {"ignore": ["mask.tif"]})
    index = build_index(manifest, tmp_path / "i.sqlite", DataConfig(crop_size=CROP), progress=False)
    expected = np.where(mask != 0, -1, label.astype(int))
    known = np.unique(expected[expected > 0]).tolist()
    assert known == [2, 5]
    assert index.instances(1).labels.tolist() == known
    dataset = CropDataset(index, num_samples=30, foreground_prob=0.5, min_voxels=0, min_visible=0.0)
    for position in range(30):
        sample = dataset[position]
        z1, y1, x1, z2, y2, x2 = sample["roi"]
        to_disk = np.array([0, *known, -1])
        assert np.array_equal(to_disk[sample["targets"]["label"].numpy()], expected[z1:z2, y1:y2, x1:x2])


def test_a_transform_is_told_the_voxel_size(tmp_path: Path) -> None:
    label = label_volume((6, 9, 8), {1: (0, 0, 0, 3, 4, 4)})
    columns = {"spacing_z_um": [2, ""], "spacing_y_um": [0.5, ""], "spacing_x_um": [0.25, ""]}
    volumes = {name: (image_volume(label.shape, seed), label) for seed, name in enumerate(("known", "unknown"))}
    manifest = write_dataset(tmp_path, volumes, columns)
    index = build_index(manifest, tmp_path / "i.sqlite", DataConfig(crop_size=CROP), progress=False)
    told = {}

    def look(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        told[name] = data["spacing_um"].tolist() if "spacing_um" in data else None
        return data

    for name in volumes:
        CropDataset(index, num_samples=1, where=f'name == "{name}"', transform=look)[0]
    assert told == {"known": [2.0, 0.5, 0.25], "unknown": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "no crop of i.sqlite matches .* its splits are train, val"),
        ({"where": "quality_image > 9"}, "no crop"),
        ({"where": "qualty_image > 9"}, "the nearest is 'quality_image'"),
        ({"foreground_prob": 1.5}, "foreground_prob=1.5"),
        ({"balance": "cell"}, "balance='cell'"),
        ({"margin": (0, -1, 0)}, "margin"),
        ({"crop_size": (3, 4)}, "crop_size"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"min_visible": 2.0}, "min_visible"),
        ({"cache_bytes": -1}, "cache_bytes=-1"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropDataset(toy(tmp_path), **{"num_samples": 4, **options})  # type: ignore[arg-type]


def test_volumes_of_unequal_channels_are_not_mixed(tmp_path: Path) -> None:
    label = np.ones((3, 4, 5), np.uint8)
    volumes = {"one": (image_volume((1, 3, 4, 5)), label), "two": (image_volume((2, 3, 4, 5)), label)}
    manifest = write_dataset(tmp_path, volumes, {"axes": ["CZYX", "CZYX"]})
    index = build_index(manifest, tmp_path / "i.sqlite", DataConfig(crop_size=(3, 4, 5)), progress=False)
    with pytest.raises(ValueError, match="channels == 1"):
        CropDataset(index, num_samples=1)
    assert CropDataset(index, num_samples=1, where="channels == 2").num_channels == 2


@pytest.mark.parametrize(
    ("sizes", "common"),
    [
        ([(2, 0.8, 0.8)] * 3, (2, 0.8, 0.8)),
        ([(2, 0.8, 0.8), (2, 0.8, 0.8), (2.1, 0.75, 0.8)], (2, 0.8, 0.8)),  # alike, the median
        ([(2, 0.8, 0.8), None, (2, 0.84, 0.8)], (2, 0.82, 0.8)),  # of those that are known
        ([(2, 0.8, 0.8), (2, 0.8, 0.8), (2, 0.8, 0.4)], None),
        ([None, None, None], None),
    ],
)
def test_the_voxel_size_that_volumes_have_in_common(tmp_path: Path, sizes: list[object], common: object) -> None:
    label = label_volume((6, 9, 8), {1: (0, 0, 0, 3, 4, 4)})
    volumes = {f"v{i}": (image_volume(label.shape, i), label) for i in range(3)}
    columns = {
        f"spacing_{axis}_um": ["" if size is None else size[i] for size in sizes]  # type: ignore[index]
        for i, axis in enumerate("zyx")
    }
    manifest = write_dataset(tmp_path, volumes, columns)
    index = build_index(manifest, tmp_path / "i.sqlite", DataConfig(crop_size=CROP), progress=False)
    found = CropDataset(index, num_samples=1).spacing_um
    assert found == (common if common is None else pytest.approx(common))


def test_whole_volumes(tmp_path: Path) -> None:
    index = toy(tmp_path)
    dataset = VolumeDataset(index, split="train")
    assert [dataset[n]["name"] for n in range(len(dataset))] == ["first", "small"]
    item = dataset[0]
    image, label = files(index, "first")
    assert np.array_equal(item["volume"].read((0, 0, 0, 6, 20, 30)), image)
    assert np.array_equal(item["label"].read((0, 0, 0, 6, 20, 30))[0], label)
    assert item["classes"] == {2: 0, 5: 0, 9: 0}
    assert item["intensity"] == index.volume(1).intensity
    assert [record.name for record in VolumeDataset(index, split=("test", "val")).records] == ["crowd"]
    assert [record.name for record in VolumeDataset(index, split=("val", "train")).records] == ["crowd"]
    with pytest.raises(ValueError, match="split='valid' is unknown"):
        VolumeDataset(index, split=("val", "valid"))
    with pytest.raises(ValueError, match="no volume"):
        VolumeDataset(index, split=())
    with pytest.raises(ValueError, match=r"no volume of i\.sqlite matches"):
        VolumeDataset(index, split="test")
