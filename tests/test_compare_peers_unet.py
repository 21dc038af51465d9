"""The U-Net and the classical contestant of scripts/compare_peers: post-processing, network, crops, loss."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SPACING = (2.0, 0.5, 0.8)
SHAPE = (14, 48, 60)


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    """The folder of the modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def balls():
    """Two balls that touch, as labels, and the distance of each voxel to its ball's surface over the radius."""
    grid = (np.indices(SHAPE).transpose(1, 2, 3, 0) + 0.5) * SPACING
    depths = np.stack([7 - np.linalg.norm(grid - c, axis=-1) for c in ((14.3, 12.1, 16.6), (13.6, 11.7, 29.3))])
    labels = np.where(depths.max(0) > 0, depths.argmax(0) + 1, 0)
    return labels, np.clip(depths.max(0) / 7, 0, 1)


def test_two_touching_balls_are_two_instances():
    from peers.watershed import Maps, WatershedSettings, instances

    labels, distance = balls()
    assert (labels[:, :, :-1] * labels[:, :, 1:] == 2).any()  # they touch
    maps = Maps(foreground=(labels > 0) * 0.9, distance=distance, spacing_um=SPACING)
    found = instances(maps, WatershedSettings())
    assert found.dtype == np.uint32
    assert set(np.unique(found)) == {0, 1, 2}
    for number in (1, 2):
        ids, sizes = np.unique(found[labels == number], return_counts=True)
        assert sizes.max() > 0.97 * sizes.sum()
        assert ids.min() > 0
    # Nobody asks for a seed as high as the second ball's: it is not parted, and goes to the first or to nothing.
    lower = replace(maps, distance=np.where(labels == 2, 0.5 * distance, distance))
    assert instances(lower, WatershedSettings(seed_height=0.6)).max() == 1


def test_small_objects_are_left_out_and_ids_are_compact():
    from peers.watershed import without_small

    labels = np.array([[[1, 1, 1, 0, 2, 0, 4, 4, 3, 3, 3, 3]]])
    assert without_small(labels, 1).max() == 4
    assert without_small(labels, 2)[0, 0].tolist() == [1, 1, 1, 0, 0, 0, 3, 3, 2, 2, 2, 2]
    assert without_small(labels, 4)[0, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert without_small(labels, 5).max() == 0
    assert without_small(np.zeros((2, 3, 4), np.int32), 1).max() == 0


def test_nothing_gives_nothing():
    from peers.watershed import Maps, WatershedSettings, instances

    nothing = np.zeros((3, 5, 7), np.float32)
    assert instances(Maps(nothing, nothing, SPACING), WatershedSettings()).max() == 0
    assert instances(Maps(nothing + 1, nothing, SPACING), WatershedSettings()).max() == 0  # foreground without a seed


def test_thresholds_are_tuned_to_what_is_right():
    from peers.watershed import GRID, Maps, tuned

    labels, distance = balls()
    halo = np.pad(labels > 0, 2)[4:, 4:, 4:] & (labels == 0)  # background that a lower threshold takes
    foreground = np.where(labels > 0, 0.8, np.where(halo, 0.55, 0.0))
    debris = np.zeros_like(labels)
    debris[0, :3, :5] = 1  # 15 voxels as bright and as high as a nucleus
    maps = Maps(np.where(debris, 0.8, foreground), np.where(debris, 0.9, distance), SPACING)
    settings, facts = tuned([maps], [labels])
    assert settings.foreground in (0.6, 0.7)
    assert settings.min_voxels == 50
    assert settings.seed_height == GRID["seed_height"][0]  # others are no better
    assert facts["f1_50"] == 1.0
    assert facts["seg"] > 0.95
    assert facts["num_truth"] == 2
    unsure = np.where(labels > 0, 0.45, 0.0)
    assert tuned([Maps(unsure, distance, SPACING)], [labels])[0].foreground == 0.4


def test_distance_is_a_share_of_the_objects_largest():
    from peers.unet_crops import distance_map

    labels = np.zeros((1, 9, 9), np.int16)
    labels[0, 2:7, 2:7] = 3
    found = distance_map(labels, (2.0, 1.0, 1.0))[0]
    assert found.dtype == np.float16
    expected = np.zeros((9, 9))
    expected[2:7, 2:7] = 1 / 3
    expected[3:6, 3:6] = 2 / 3
    expected[4, 4] = 1
    np.testing.assert_allclose(found, expected, atol=1e-3)
    # Along y a step is 0.5: the middle row is 1 away from above and below, the ends of it 1 from left and right.
    found = distance_map(labels[:, :, :5], (2.0, 0.5, 4.0))[0]
    np.testing.assert_allclose(found[2:7, 4], np.array([0.5, 1, 1.5, 1, 0.5]) / 1.5, atol=1e-3)
    touching = np.array([[[1, 1, 1, 2, 2, 2, 0, -1, -1]]])
    np.testing.assert_allclose(
        distance_map(touching, SPACING)[0, 0], [1, 2 / 3, 1 / 3, 0.5, 1, 0.5, 0, 0, 0], atol=1e-3
    )
    assert distance_map(np.ones((2, 3, 4), np.int16), SPACING).min() == 1  # no surface at all
    assert distance_map(np.zeros((2, 3, 4), np.int16), SPACING).max() == 0


def test_long_voxels_are_not_convolved_or_halved_before_the_others_have_caught_up():
    from peers.unet_network import DistanceUNet, levels_for

    kernels, strides = levels_for((1.75, 0.8, 0.8), 4)
    assert kernels == [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert strides == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert levels_for((1.0, 1.0, 1.0), 2) == ([[3, 3, 3]] * 2, [[1, 1, 1], [2, 2, 2]])
    assert levels_for((6.0, 1.0, 1.0), 4)[1] == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    network = DistanceUNet(spacing_um=(1.75, 0.8, 0.8), filters=(4, 8, 8)).eval()
    assert network.total_stride == (2, 4, 4)
    maps = network.maps(torch.rand(7, 13, 18), None)  # no multiple of the strides
    assert maps.shape == (2, 7, 13, 18)
    assert 0 <= maps.min() < maps.max() <= 1


def crops_of(labels, crop_size=(8, 24, 24), seed=3):
    from peers.exchange import RaceVolume
    from peers.unet_crops import TrainingCrops

    image = ((labels > 0) * 900 + 100).astype(np.uint16)
    return TrainingCrops(volumes=[RaceVolume("v", image, labels, SPACING)], crop_size=crop_size, seed=seed)


def test_image_distance_and_labels_of_a_crop_stay_together():
    crops = crops_of(balls()[0].astype(np.int16))
    seen = 0
    for number in range(12):
        crop = crops.crop(number)
        image, distance, kind = (crop[key][0] for key in ("image", "distance", "kind"))
        assert image.shape == distance.shape == kind.shape == (8, 24, 24)
        assert ((distance > 0.3) & (kind == 0)).float().mean() < 0.01
        if 0.1 < (kind > 0).float().mean() < 0.9:
            seen += 1
            assert image[kind > 0].mean() > image[kind == 0].mean() + 0.2
            assert distance[kind > 0].mean() > 0.2
            assert distance[kind == 0].mean() < 0.1
    assert seen > 3


def test_a_crop_is_a_function_of_seed_and_number():
    labels = balls()[0].astype(np.int16)
    one, again, other = crops_of(labels), crops_of(labels), crops_of(labels, seed=4)
    one.crop(0)
    for key, value in one.crop(5).items():
        torch.testing.assert_close(value, again.crop(5)[key], rtol=0, atol=0)
    assert not torch.equal(one.crop(5)["image"], other.crop(5)["image"])
    batch = one.batch(2, 2)
    assert batch["image"].shape == (2, 1, 8, 24, 24)
    torch.testing.assert_close(batch["image"][1], one.crop(5)["image"], rtol=0, atol=0)


def test_what_lies_outside_a_volume_is_ignored():
    labels = np.ones((4, 10, 12), np.int16)
    crop = crops_of(labels, crop_size=(16, 16, 16)).crop(0)
    assert (crop["kind"] == -1).float().mean() > 0.5
    assert set(crop["kind"].unique().tolist()) == {-1.0, 1.0}
    empty = crops_of(np.zeros((4, 10, 12), np.int16), crop_size=(4, 8, 8)).crop(0)
    assert set(empty["kind"].unique().tolist()) <= {-1.0, 0.0}


def test_ignored_voxels_do_not_enter_the_loss():
    from peers.unet import loss_of

    kind = torch.tensor([1.0, 0.0, -1.0, -1.0]).view(1, 1, 1, 1, 4)
    distance = torch.tensor([0.7, 0.0, 0.4, 0.0]).view(1, 1, 1, 1, 4)
    logits = torch.randn(1, 2, 1, 1, 4)
    changed = logits.clone()
    changed[..., 2:] = 50.0
    batch = {"kind": kind, "distance": distance}
    torch.testing.assert_close(loss_of(changed, batch), loss_of(logits, batch))
    p, q = logits.sigmoid()[0, :, 0, 0, :2].double().unbind(0)
    entropy = -(p[0].log() + (1 - p[1]).log()) / 2
    dice = 1 - (2 * p[0] + 1) / (p.sum() + 2)
    far = -(0.7 * q[0].log() + 0.3 * (1 - q[0]).log() + (1 - q[1]).log()) / 2
    assert loss_of(logits, batch).item() == pytest.approx((entropy + dice + far).item(), rel=1e-5)


def test_training_ends_by_time_and_learns():
    from peers.unet import loss_of, train

    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 2, 1)
    image = torch.randn(2, 1, 4, 6, 6)
    batch = {"image": image, "kind": (image > 0).float(), "distance": (image > 0).float()}
    before = loss_of(network(image), batch).item()
    ticks = count()  # each look at the clock is a second
    done = train(network, lambda step: batch, minutes=1.0, autocast=None, clock=lambda: float(next(ticks)))
    assert done.seconds > 60
    assert 25 <= done.steps <= 60
    assert done.loss < before - 0.01
    assert not done.network.training
    late = count(step=100)
    assert train(network, lambda step: batch, minutes=1.0, autocast=None, clock=lambda: float(next(late))).steps == 1
