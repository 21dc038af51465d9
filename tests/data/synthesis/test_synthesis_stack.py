"""Whole synthetic volumes: any region the same, ids compact, images that show what labels say; online crops."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from seg3d_monai.data.loader import CropLoader
from seg3d_monai.data.synthesis import PRESETS, Recipe, Scene, SyntheticCropDataset, SyntheticStack, preset
from seg3d_monai.data.synthesis import stack as stack_module
from seg3d_monai.data.synthesis.scene import Background, Camera, Objects, Optics, Stain, Voxels
from seg3d_monai.data.synthetic_nuclei import MIN_VISIBLE_VOXELS
from seg3d_monai.data.transforms import train_transforms

MIXED = Objects(fill=0.4, elongated=0.3, lobed=0.3, dividing=0.2, diameter_um=9.0, outline=2.0)
BUSY = Background(specks=0.4, fibres=3.0)


@pytest.mark.parametrize("channels", [1, 2])
def test_any_region_is_the_same_as_of_the_whole(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "TILE", (7, 24, 19))
    scene = Scene(
        seed=(3,),
        objects=MIXED,
        background=BUSY,
        optics=Optics(tilt_degrees=8, wings=0.4),
        stain=Stain(membrane=0.5),
        camera=Camera(grain=0.6, grain_axial=0.3),
    )
    stack = SyntheticStack(scene, (18, 50, 61), channels=channels)
    image, labels = stack.whole()
    assert (image.dtype, image.shape, labels.dtype) == (np.uint16, (channels, 18, 50, 61), np.uint32)
    lazy_image, lazy_labels = stack.volumes()
    for roi in ((0, 0, 0, 18, 50, 61), (5, 20, 18, 9, 49, 40), (17, 49, 60, 18, 50, 61), (3, 3, 3, 3, 9, 9)):
        z1, y1, x1, z2, y2, x2 = roi
        assert np.array_equal(lazy_image.read(roi), image[:, z1:z2, y1:y2, x1:x2])
        assert np.array_equal(lazy_labels.read(roi)[0], labels[z1:z2, y1:y2, x1:x2])
    again = SyntheticStack(scene, (18, 50, 61), channels=channels)
    assert np.array_equal(again.whole()[0], image)
    assert again.digest == stack.digest != SyntheticStack(scene, (18, 50, 60), channels=channels).digest
    assert lazy_image.spacing_um == (2.0, 0.8, 0.8)
    assert lazy_image.identity() != lazy_labels.identity()


def test_ids_are_compact_and_objects_of_few_voxels_are_left_out() -> None:
    labels = SyntheticStack(Scene(seed=(1,), objects=MIXED), (20, 64, 50)).whole()[1]
    voxels = np.bincount(labels.ravel())
    assert len(voxels) > 20
    assert voxels[1:].min() >= MIN_VISIBLE_VOXELS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_show_what_their_labels_say(name: str) -> None:
    differences = []
    for seed in range(6):
        scene = preset(name).scene((9, seed))
        size = np.ceil(3 * scene.objects.diameter_um / np.array(scene.voxels.spacing_um)).astype(int)
        image, labels = SyntheticStack(scene, np.minimum(size, 90).tolist(), any_density=True).whole()
        assert labels.max() >= 1
        inside = labels > 0
        if name == "membrane":
            edge = np.zeros_like(inside)
            edge[:, :-1] |= labels[:, 1:] != labels[:, :-1]
            edge[:, :, :-1] |= labels[:, :, 1:] != labels[:, :, :-1]
            differences.append(float(image[0][edge].mean()) - float(image[0][inside & ~edge].mean()))
        elif not inside.all():
            differences.append(float(image[0][inside].mean()) - float(image[0][~inside].mean()))
    assert min(differences) > 0


def test_nuclei_and_membranes_apart() -> None:
    stain = Stain(nucleus=1.0, membrane=1.0, texture=0.0)
    still = {"optics": Optics(psf_um=0.2, haze=0, stripes=0), "camera": Camera(photons=3000, read_noise=0)}
    scene = Scene(
        seed=(2,), objects=Objects(fill=0.3), voxels=Voxels(plane_um=0.5, anisotropy=1.0), stain=stain, **still
    )
    (nuclei, membranes), labels = SyntheticStack(scene, (50, 60, 70), channels=2).whole()
    deep = labels > 0
    for axis in range(3):
        for shift in (-3, 3):
            deep &= np.roll(labels, shift, axis) == labels
    rim = (labels > 0) & (np.roll(labels, 1, 2) != labels)
    assert nuclei[deep].mean() > 3 * nuclei[labels == 0].mean()
    assert membranes[rim].mean() > 2 * membranes[deep].mean()


def test_no_objects_and_one() -> None:
    image, labels = SyntheticStack(Scene(objects=Objects(fill=0.0)), (8, 20, 22)).whole()
    assert labels.max() == 0
    assert image.std() > 0
    assert SyntheticStack(Scene(objects=Objects(fill=0.07)), (6, 16, 16)).cells.num_objects == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"volume of 8 x 16 x 16 micrometres is too small for objects.diameter_um of 12"
    ):
        SyntheticStack(Scene(), (4, 20, 20))
    with pytest.raises(ValueError, match=r"objects.fill is 1.2, \d+ objects; \d+ found a place, a fill of 0\.[3-7]"):
        SyntheticStack(Scene(objects=Objects(fill=1.2, closeness=1.0)), (30, 60, 60))
    with pytest.raises(ValueError, match="shape is"):
        SyntheticStack(Scene(), (4, 20))
    with pytest.raises(ValueError, match="channels is 3"):
        SyntheticStack(Scene(), (20, 40, 40), channels=3)


def dataset(**options: Any) -> SyntheticCropDataset:
    return SyntheticCropDataset(
        options.pop("recipe", preset("randomised")),
        **({"num_samples": 6, "crop_size": (20, 40, 36), "seed": 2} | options),
    )


def test_online_crops_follow_from_seed_epoch_and_position() -> None:
    crops = dataset()
    first, again, other, later = crops[0, 1], dataset()[0, 1], dataset(seed=3)[0, 1], crops[1, 1]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["targets"]["label"], again["targets"]["label"])
    assert not torch.equal(first["image"], other["image"])
    assert not torch.equal(first["image"], later["image"])
    assert (first["image"].shape, first["image"].dtype) == ((1, 20, 40, 36), torch.float32)
    for position in range(6):
        targets = crops[position]["targets"]
        label = targets["label"]
        for number, box in zip(targets["ids"], targets["boxes"], strict=True):
            places = torch.nonzero(label == number)
            assert box.tolist() == [*places.amin(0).tolist(), *(places.amax(0) + 1).tolist()]


def test_online_crops_are_the_same_in_workers_and_begin_in_the_middle() -> None:
    crops = pickle.loads(pickle.dumps(dataset()))
    for workers in (0, 1):
        loader = CropLoader(crops, batch_size=2, num_workers=workers)
        loader.set_epoch(4)
        batches = list(loader)
        assert len(batches) == 3
        assert torch.equal(batches[2]["image"][1], crops[4, 5]["image"])


def test_online_crops_with_a_transform_two_channels_and_no_objects() -> None:
    transform = train_transforms(crop_size=(20, 40, 36), affine_prob=1.0)
    moved, still = dataset(transform=transform)[2], dataset()[2]
    assert moved["image"].shape == still["image"].shape
    assert not torch.equal(moved["image"], still["image"])
    assert torch.equal(moved["image"], dataset(transform=transform)[2]["image"])
    assert dataset(channels=2)[0]["image"].shape == (2, 20, 40, 36)
    empty = dataset(recipe=Recipe({"objects": {"fill": 0.0}}))[0]
    assert len(empty["targets"]["ids"]) == 0
    assert torch.isfinite(empty["image"]).all()


def test_what_a_crop_hardly_shows_is_ignored() -> None:
    whole = Objects(fill=0.02, diameter_um=9.0, attach=0.0, closeness=2.0, deformation=0.0)
    stack = SyntheticStack(Scene(seed=(2,), objects=whole), (30, 60, 70))
    labels, sizes = stack.whole_with_sizes()[1:]
    voxels = np.bincount(labels.ravel())[1:]
    assert len(voxels) == len(sizes) > 3
    inside = np.ones(len(voxels), bool)
    for axis in range(3):
        for side in (0, -1):
            inside[np.setdiff1d(np.unique(labels.take(side, axis)), [0]).astype(int) - 1] = False
    assert inside.any()
    np.testing.assert_allclose(voxels[inside], sizes[inside], rtol=0.1)
    assert (voxels < 1.1 * sizes).all()
    recipe = Recipe({"objects": {"fill": 0.4, "diameter_um": 9.0}})
    strict, lax = (dataset(recipe=recipe, min_visible=share)[0]["targets"] for share in (0.5, 0.0))
    assert 0 < len(strict["ids"]) < len(lax["ids"])
    assert set(strict["ids"].tolist()) < set(lax["ids"].tolist())
    for number in set(lax["ids"].tolist()) - set(strict["ids"].tolist()):
        assert (strict["label"][lax["label"] == number] == -1).all()


def test_online_crops_that_cannot_be(tmp_path: Any) -> None:
    for options, message in (
        ({"num_samples": 0}, "num_samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"crop_size": (3, 4)}, "crop_size"),
        ({"min_visible": 2}, "min_visible=2"),
        ({"recipe": "none"}, "preset 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset(**options)
    with pytest.raises(IndexError, match="position 6"):
        dataset()[6]
    huge = Recipe({"objects": {"diameter_um": [60, 80]}})
    with pytest.raises(ValueError, match="no scene of 100 fits: objects of"):
        dataset(recipe=huge)[0]
