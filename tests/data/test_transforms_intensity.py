"""Blur against MONAI's, noise by its statistics, coarse planes and missing channels against hand-made numbers."""

import numpy as np
import pytest
import torch
from monai.transforms import GaussianSmooth

from seg3d_monai.data.transforms import RandBlurd, RandChannelDropd, RandCoarseZd, RandNoised
from seg3d_monai.data.transforms_intensity import coarsening


@pytest.mark.parametrize("sigma", [0.0, 0.6, 1.7])
def test_blur_is_that_of_monai_with_half_of_it_in_z(sigma: float) -> None:
    data = {"image": torch.rand(2, 7, 12, 9), "label": torch.ones(1, 7, 12, 9, dtype=torch.int32)}
    result = RandBlurd(prob=1.0, sigma_range=(sigma, sigma))(data)
    # MONAI calls the first spatial axis x; it is z here.
    wanted = GaussianSmooth(sigma=(sigma / 2, sigma, sigma))(data["image"])
    assert torch.allclose(result["image"], torch.as_tensor(wanted), atol=1e-6)
    assert result["image"].dtype == torch.float32
    assert result["label"] is data["label"]


def test_blur_is_drawn_for_each_axis_and_repeats_with_the_seed() -> None:
    data = {"image": torch.zeros(1, 15, 15, 15)}
    data["image"][0, 7, 7, 7] = 1.0
    first, again, other = (
        RandBlurd(prob=1.0, sigma_range=(0.5, 2.0)).set_random_state(seed=seed)(data)["image"][0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    assert first[7, 7, 8] != pytest.approx(first[7, 8, 7].item(), rel=1e-3)
    assert torch.equal(RandBlurd(prob=0.0)(data)["image"], data["image"])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 9), (1, 2, 1, 40)])
def test_a_blur_wider_than_the_crop_is_that_of_monai(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    wanted = GaussianSmooth(sigma=(1.5, 3.0, 3.0))(image)
    assert torch.allclose(RandBlurd(prob=1.0, sigma_range=(3, 3))({"image": image})["image"], wanted, atol=1e-6)


def test_noise_is_white_no_stronger_than_asked_and_repeats_with_the_seed() -> None:
    image = torch.rand(2, 20, 30, 25)
    data = {"image": image, "label": torch.ones(1, 20, 30, 25, dtype=torch.int32)}
    noise = RandNoised(prob=1.0, std=0.4)
    spreads = []
    for seed in range(30):
        result = noise.set_random_state(seed=seed)(data)
        added = result["image"] - image
        spread = float(added.std())
        assert abs(float(added.mean())) < 5 * spread / added.numel() ** 0.5
        one, other = added.flatten(1)
        for first, second in ((one, other), (one[1:], one[:-1])):
            assert abs(float((first * second).mean())) < 5 * spread**2 / len(first) ** 0.5
        assert float((added.abs() < spread).float().mean()) == pytest.approx(0.6827, abs=0.015)
        assert result["label"] is data["label"]
        spreads.append(spread)
    assert 0 < min(spreads) < 0.1
    assert 0.3 < max(spreads) < 0.404
    assert torch.equal(noise.set_random_state(seed=29)(data)["image"], result["image"])
    assert RandNoised(prob=0.0)(data)["image"] is image


def test_slabs_of_two_planes_are_averaged_and_interpolated() -> None:
    planes = torch.tensor([0.0, 2.0, 4.0, 6.0])
    # Slabs have 1 and 5, with middles at 0.5 and 2.5; beyond them nothing is known but the nearest.
    assert coarsening(4, 2) @ planes == pytest.approx([1.0, 2.0, 4.0, 5.0])
    assert coarsening(4, 1) @ planes == pytest.approx([3.0] * 4)
    assert torch.equal(coarsening(5, 5), torch.eye(5))
    for num_planes, num_slabs in ((7, 3), (64, 21), (1, 1)):
        assert torch.allclose(coarsening(num_planes, num_slabs).sum(1), torch.ones(num_planes))


def test_coarse_planes_blur_along_z_only_and_leave_labels() -> None:
    image = torch.zeros(2, 12, 5, 7)
    image[:, 6, 2, 3] = 1.0
    label = torch.ones(1, 12, 5, 7, dtype=torch.int32)
    data = {"image": image, "label": label}
    result = RandCoarseZd(prob=1.0, factor_range=(3, 3))(data)
    assert result["label"] is label
    places = torch.nonzero(result["image"])
    assert set(places[:, 2].tolist()) == {2}
    assert set(places[:, 3].tolist()) == {3}
    assert torch.allclose(result["image"][0], result["image"][1])
    # The plane 6 is a third of the slab 6..8, whose middle is 7; neighbouring middles are 4 and 10.
    assert result["image"][0, :, 2, 3].numpy() * 9 == pytest.approx([0, 0, 0, 0, 0, 1, 2, 3, 2, 1, 0, 0], abs=1e-5)
    assert image.sum() == 2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_few_planes(depth: int) -> None:
    image = torch.rand(1, depth, 4, 4)
    result = RandCoarseZd(prob=1.0, factor_range=(8, 8))({"image": image})["image"]
    assert torch.allclose(result, image.mean(1, keepdim=True).expand_as(image), atol=1e-6)


def test_the_chance_is_kept_to_and_repeats() -> None:
    image = torch.rand(3, 8, 4, 5)
    for transform in (RandCoarseZd(prob=0.5), RandChannelDropd(prob=0.5)):
        results = [transform.set_random_state(seed=seed)({"image": image})["image"] for seed in range(200)]
        changed = sum(not torch.equal(result, image) for result in results)
        assert 70 < changed < 130
        assert torch.equal(transform.set_random_state(seed=3)({"image": image})["image"], results[3])


def test_one_channel_of_several_is_blanked() -> None:
    image = torch.rand(3, 4, 5, 6) + 1
    blanked = set()
    for seed in range(30):
        result = RandChannelDropd(prob=1.0).set_random_state(seed=seed)({"image": image})["image"]
        empty = [channel for channel in range(3) if not result[channel].any()]
        assert len(empty) == 1
        blanked.add(empty[0])
        kept = [channel for channel in range(3) if channel not in empty]
        assert np.array_equal(result[kept], image[kept])
    assert blanked == {0, 1, 2}
    assert (image > 0).all()
    single = {"image": image[:1]}
    assert torch.equal(RandChannelDropd(prob=1.0)(single)["image"], single["image"])


@pytest.mark.parametrize("factor_range", [(0.5, 2), (3, 2), (2,)])
def test_slabs_thinner_than_a_plane(factor_range: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="factor_range"):
        RandCoarseZd(factor_range=factor_range)
