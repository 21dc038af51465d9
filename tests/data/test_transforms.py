"""The default augmentation: geometry against hand-made numbers, exact ids, ignore that survives, repeatability."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, get_track_meta
from monai.transforms import RandAdjustContrastd, RandFlipd, RandScaleIntensityd, RandShiftIntensityd

from seg3d_monai.data.transforms import (
    RandBlurd,
    RandChannelDropd,
    RandCoarseZd,
    RandNoised,
    RandTurnPlaned,
    RandWarpd,
    train_transforms,
)

SHAPE = (6, 20, 20)


def crop(shape: tuple[int, int, int] = SHAPE, channels: int = 1) -> dict[str, torch.Tensor]:
    """An image that equals its label, so that both must move alike; ids in blocks of 2 x 4 x 4, an ignored plane."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    label = (1 + z // 2 + 10 * (y // 4) + 100 * (x // 4)).astype(np.int32)
    label[:, :2] = -1
    label[:, -2:] = 0
    image = np.repeat(label[None].astype(np.float32), channels, axis=0)
    return {"image": torch.from_numpy(image), "label": torch.from_numpy(label[None])}


def plane_affine(**options: Any) -> RandWarpd:
    """A rotation about z and zooms, nothing else."""
    still = {"tilt_degrees": 0, "shear": 0, "elastic_prob": 0, "affine_prob": 1}
    return RandWarpd(**(still | options))


def test_image_and_label_move_together_and_stay_exact() -> None:
    transform = train_transforms(intensity_prob=0.0, affine_prob=0.0)
    data = crop(channels=2)
    moved = set()
    for seed in range(20):
        result = transform.set_random_state(seed=seed)(data)
        assert result["image"].shape == (2, *SHAPE)
        for channel in range(2):
            assert np.array_equal(np.asarray(result["image"][channel]), np.asarray(result["label"][0]))
        moved.add(np.asarray(result["label"]).tobytes())
        assert np.array_equal(np.unique(result["label"]), np.unique(data["label"]))
    assert len(moved) > 8


def test_crops_that_are_not_square_are_not_turned() -> None:
    data = crop((4, 12, 20))
    turn = RandTurnPlaned(prob=1.0)
    assert torch.equal(torch.as_tensor(turn(data)["label"]), data["label"])
    square = {key: value[..., :12] for key, value in data.items()}
    turned = turn.set_random_state(seed=1)(square)
    assert any(
        torch.equal(torch.as_tensor(turned["label"]), torch.rot90(square["label"], k, (2, 3))) for k in (1, 2, 3)
    )
    shapes = {tuple(train_transforms().set_random_state(seed=seed)(data)["image"].shape) for seed in range(6)}
    assert shapes == {(1, 4, 12, 20)}


def test_without_affine_a_margin_is_cut_off_at_the_centre() -> None:
    data = crop()
    result = plane_affine(crop_size=(4, 10, 12), affine_prob=0.0)(data)
    assert torch.equal(result["label"], data["label"][:, 1:5, 5:15, 4:16])
    assert torch.equal(result["image"], data["image"][:, 1:5, 5:15, 4:16])


def test_a_zoom_of_two_doubles_lengths() -> None:
    label = torch.zeros((1, 8, 16, 24), dtype=torch.int32)
    label[:, 2:6, 5:11, 9:15] = 1
    data = {"image": label.float(), "label": label}
    zoomed = plane_affine(rotate_degrees=0.0, scale_range=((1, 1), (1, 1), (2, 2)))(data)
    places = torch.nonzero(zoomed["label"][0] == 1)
    assert places.min(0).values.tolist() == [2, 5, 6]
    assert (places.max(0).values + 1).tolist() == [6, 11, 18]
    shrunk = plane_affine(rotate_degrees=0.0, scale_range=((0.5, 0.5), (1, 1), (1, 1)))(data)
    places = torch.nonzero(shrunk["label"][0] == 1)
    assert places.min(0).values.tolist() == [3, 5, 9]
    assert (places.max(0).values + 1).tolist() == [5, 11, 15]
    # Beyond what was there: image 0, label ignore.
    assert (shrunk["label"][0, [0, 1, 6, 7]] == -1).all()
    assert not shrunk["image"][0, [0, 7]].any()


def test_a_rotation_stays_in_its_plane_and_follows_the_image() -> None:
    label = torch.zeros((1, 5, 33, 33), dtype=torch.int32)
    label[:, 2, 15:18, 4:29] = 7
    data = {"image": label.float(), "label": label}
    rotate = plane_affine(rotate_degrees=40.0, scale_range=((1, 1), (1, 1), (1, 1)))
    result = rotate.set_random_state(seed=5)(data)
    found = result["label"][0] == 7
    assert found[2].any()
    assert not found[[0, 1, 3, 4]].any()
    ys, xs = torch.nonzero(found[2], as_tuple=True)
    slope = np.polyfit(xs.numpy(), ys.numpy(), 1)[0]
    assert 5 < abs(np.degrees(np.arctan(slope))) < 40
    assert abs(int(found.sum()) - 75) <= 12
    # Trilinear image and nearest label agree wherever the image is clearly one or the other.
    assert (result["image"][0][found] > 3.0).all()


def test_large_ids_and_ignore_survive_an_affine() -> None:
    ids = torch.tensor([65_536, 70_001, 1_000_003, 16_777_213])
    label = ids[torch.arange(4).repeat_interleave(6)].reshape(1, 1, 1, 24).expand(1, 6, 16, 24).contiguous()
    label[:, :, :4] = -1
    data = {"image": torch.zeros(1, 6, 16, 24), "label": label.to(torch.int32)}
    transform = plane_affine()
    for seed in range(5):
        result = transform.set_random_state(seed=seed)(data)
        assert result["label"].dtype == torch.int32
        assert set(result["label"].unique().tolist()) == {-1, *ids.tolist()}
    data["label"][0, 0, 8, 0] = 1 << 24
    with pytest.raises(ValueError, match="renumber them from 1"):
        transform(data)


def test_labels_are_untouched_by_intensity_and_images_change() -> None:
    transform = train_transforms(flip_prob=(0, 0, 0), isotropic_plane=False, affine_prob=0.0, intensity_prob=1.0)
    data = {"image": torch.rand(2, *SHAPE), "label": crop()["label"]}
    result = transform.set_random_state(seed=0)(data)
    assert torch.equal(torch.as_tensor(result["label"]), data["label"])
    assert result["image"].shape == data["image"].shape
    assert result["image"].dtype == torch.float32
    assert torch.isfinite(torch.as_tensor(result["image"])).all()
    assert not torch.allclose(torch.as_tensor(result["image"]), data["image"])


def test_the_blur_along_z_is_half_of_that_in_the_plane() -> None:
    transform = train_transforms(
        flip_prob=(0, 0, 0),
        isotropic_plane=False,
        affine_prob=0.0,
        intensity_prob=1.0,
        gamma_range=(1.0, 1.0),
        intensity_scale=(1.0, 1.0),
        intensity_shift=0.0,
        noise_std=0.0,
        blur_sigma=(1.0, 1.0),
    )
    image = torch.zeros(1, 21, 23, 25)
    image[0, 10, 11, 12] = 1.0
    result = transform.set_random_state(seed=0)({"image": image, "label": image.to(torch.int32)})
    found = torch.as_tensor(result["image"])[0].double()
    spreads = []
    for axis, centre in ((0, 10), (1, 11), (2, 12)):
        profile = found.sum(dim=[a for a in range(3) if a != axis])
        offsets = torch.arange(len(profile)) - centre
        spreads.append(float((profile * offsets**2).sum() / profile.sum()) ** 0.5)
    # The blur integrates the Gaussian over voxels, which adds 1/12 to its variance.
    assert spreads == pytest.approx([(0.25 + 1 / 12) ** 0.5, (1 + 1 / 12) ** 0.5, (1 + 1 / 12) ** 0.5], rel=0.03)


def test_the_same_seed_gives_the_same_bits_whatever_the_threads() -> None:
    shape = (1, 20, 64, 60)
    data = {"image": torch.rand(shape), "label": torch.randint(-1, 300, shape, dtype=torch.int32)}
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            transform = train_transforms(crop_size=(16, 56, 52), affine_prob=1.0, intensity_prob=1.0)
            results.append(transform.set_random_state(seed=11)(data))
    finally:
        torch.set_num_threads(threads)
    for key in ("image", "label"):
        assert torch.equal(torch.as_tensor(results[0][key]), torch.as_tensor(results[1][key]))
    other = train_transforms(crop_size=(16, 56, 52), affine_prob=1.0).set_random_state(seed=12)(data)
    assert not torch.equal(torch.as_tensor(other["image"]), torch.as_tensor(results[0]["image"]))


def test_plain_tensors_come_back_and_monais_metadata_are_tracked_as_before() -> None:
    data = {**crop(), "image": MetaTensor(crop()["image"])}
    result = train_transforms(crop_size=(6, 24, 24), flip_prob=(1, 1, 1)).set_random_state(seed=0)(data)
    assert {type(result["image"]), type(result["label"])} == {torch.Tensor}
    assert get_track_meta()
    with pytest.raises(RuntimeError, match="RandWarpd"):
        train_transforms(affine_prob=1.0)({**crop(), "label": torch.full_like(crop()["label"], 1 << 24)})
    assert get_track_meta()


def test_switches_leave_steps_out() -> None:
    def kinds(**options: object) -> list[type]:
        return [type(step) for step in train_transforms(**options).transforms]  # type: ignore[arg-type]

    assert kinds().count(RandFlipd) == 3
    assert kinds(flip_prob=(0, 0.5, 1)).count(RandFlipd) == 2
    assert RandFlipd not in kinds(flip_prob=(0, 0, 0))
    assert kinds(turn_planes=("yx", "zx")).count(RandTurnPlaned) == 2
    for still in ({"isotropic_plane": False}, {"turn_prob": 0}, {"turn_planes": ()}):
        assert RandTurnPlaned not in kinds(**still)
    for unasked in (RandCoarseZd, RandChannelDropd):
        assert unasked not in kinds()
    assert RandCoarseZd in kinds(coarse_z_prob=0.1)
    assert kinds(channel_drop_prob=0.1)[-1] is RandChannelDropd


def test_an_unequal_plane_is_turned_only_in_micrometres() -> None:
    def largest_angle(**options: object) -> float:
        (warp,) = (step for step in train_transforms(**options).transforms if isinstance(step, RandWarpd))  # type: ignore[arg-type]
        return float(np.rad2deg(warp._angles[0]))

    assert largest_angle() == pytest.approx(15)
    assert largest_angle(isotropic_plane=False) == 0
    for asked in ({"tilt_degrees": 5}, {"shear": 0.1}, {"elastic_prob": 0.1}):
        assert largest_angle(isotropic_plane=False, **asked) == pytest.approx(15)


def test_each_step_has_its_own_probability() -> None:
    steps = {
        "blur_prob": RandBlurd,
        "gamma_prob": RandAdjustContrastd,
        "contrast_prob": RandScaleIntensityd,
        "shift_prob": RandShiftIntensityd,
        "noise_prob": RandNoised,
        "coarse_z_prob": RandCoarseZd,
        "channel_drop_prob": RandChannelDropd,
        "turn_prob": RandTurnPlaned,
    }
    for name, kind in steps.items():
        for step in train_transforms(intensity_prob=0.125, **{name: 0.625}).transforms:  # type: ignore[arg-type]
            if type(step) is kind:
                assert step.prob == 0.625
            elif type(step) in list(steps.values())[:5]:
                assert step.prob == 0.125


def test_every_probability_is_checked() -> None:
    names = [name for name in inspect.signature(train_transforms).parameters if name.endswith("_prob")]
    assert len(names) == 12
    for name in names:
        wrong = (0.5, 1.5, 0.5) if name == "flip_prob" else 1.5
        with pytest.raises(ValueError, match=rf"{name}.*1\.5 is not a probability"):
            train_transforms(**{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"flip_prob=.* three"):
        train_transforms(flip_prob=(0.5, 0.5))


def test_the_strong_overlay_is_one_and_the_same_for_every_bundle() -> None:
    overlays = sorted((Path(__file__).parents[2] / "bundles").glob("*/configs/overlays/augment_strong.json"))
    assert len(overlays) == 3
    assert len({overlay.read_text() for overlay in overlays}) == 1
    prefix = "train#preprocessing#"
    settings = {
        key.removeprefix(prefix): value
        for key, value in json.loads(overlays[0].read_text()).items()
        if key.startswith(prefix)
    }
    kinds = [type(step) for step in train_transforms(crop_size=(4, 12, 10), **settings).transforms]
    assert {RandWarpd, RandCoarseZd, RandChannelDropd} <= set(kinds)
    result = train_transforms(crop_size=(4, 12, 10), **settings).set_random_state(seed=0)(crop())
    assert result["image"].shape == result["label"].shape == (1, 4, 12, 10)


def test_scales_that_make_no_sense() -> None:
    for scale_range in (((1, 1), (1, 1)), ((0, 1), (1, 1), (1, 1)), ((1, 1), (2, 1), (1, 1))):
        with pytest.raises(ValueError, match="magnifications"):
            train_transforms(scale_range=scale_range)
