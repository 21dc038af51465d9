"""Points by hand and against loops; interpolation against torch's grid_sample in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from set_targets import EMPTY_AND_IGNORED, MANY, NONE, ONE, SIZE, crowd, make_target

from seg3d_monai.matching import batch_point_features, point_features, sample_points
from seg3d_monai.matching.points import point_set


@pytest.mark.parametrize("target", [NONE, ONE, MANY, EMPTY_AND_IGNORED, crowd(300)])
@pytest.mark.parametrize(("num_uniform", "num_own"), [(20, 7), (0, 5), (13, 0)])
def test_points_are_looked_up_in_the_label(target, num_uniform, num_own):
    torch.manual_seed(0)
    points = sample_points(target, num_uniform=num_uniform, num_own=num_own)
    num_instances = len(target["ids"])
    assert points.coordinates.shape == (num_uniform + num_instances * num_own, 3)
    assert points.coordinates.dtype == points.values.dtype == torch.int64
    assert points.occupancy.shape == points.valid.shape == (num_instances, num_uniform + num_own)
    values = [target["label"][tuple(c)].item() for c in points.coordinates.tolist()]
    assert points.values.tolist() == values
    for g in range(num_instances):
        start = num_uniform + g * num_own
        members = values[:num_uniform] + values[start : start + num_own]
        assert points.occupancy[g].tolist() == [float(v == target["ids"][g]) for v in members]
        assert points.valid[g].tolist() == [v != -1 for v in members]


def test_points_stay_in_their_boxes_and_reach_every_voxel_of_them():
    size = (9, 30, 40)
    # Extents 1, 4, 16: dilated by 2, 2 and 4 on each side; at the border clipped.
    target = make_target([(4, 10, 12, 5, 14, 28), (0, 26, 0, 9, 30, 3)], [0, 0], [1, 2], size=size)
    torch.manual_seed(1)
    points = sample_points(target, num_uniform=60_000, num_own=20_000)
    uniform, own = points.split(points.coordinates)
    wanted = [((2, 8, 8), (7, 16, 32)), ((0, 24, 0), (9, 30, 5))]
    for found, (lower, upper) in [(uniform, ((0, 0, 0), size)), *zip(own, wanted, strict=True)]:
        seen = torch.zeros(size, dtype=torch.bool)
        seen[tuple(found.T)] = True
        inside = torch.zeros_like(seen)
        inside[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = True
        assert not seen[~inside].any()
        assert seen[inside].float().mean() > 0.99
        centre = (torch.tensor(lower) + torch.tensor(upper) - 1) / 2
        assert ((found.double().mean(0) - centre).abs() < 0.02 * (torch.tensor(upper) - torch.tensor(lower))).all()


def test_a_seed_fixes_the_points():
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(sample_points(MANY, num_uniform=30, num_own=9).coordinates)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_largest_draw_stays_inside(monkeypatch):
    """float32 must not round extent * share up to the extent."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, 1 - 2**-24, device=device))
    for size in [(3, 4, 5), (6, 7, 9), (31, 32, 33), (100, 255, 513)]:
        target = make_target([(0, 0, 0, *size)], [0], [1], size=size)
        points = sample_points(target, num_uniform=1, num_own=1)
        assert points.coordinates.tolist() == [[n - 1 for n in size]] * 2


def test_a_volume_of_one_voxel_thickness():
    target = make_target([(0, 2, 3, 1, 6, 9)], [0], [4], size=(1, 10, 14))
    points = sample_points(target, num_uniform=50, num_own=50)
    assert (points.coordinates[:, 0] == 0).all()
    assert 0 < points.occupancy.mean() < 1


def test_given_points():
    coordinates = torch.tensor([[0, 0, 0], [0, 6, 8], [5, 9, 13], [1, 1, 1], [2, 3, 5]])
    target = {"label": MANY["label"], "ids": torch.tensor([7])}
    points = point_set(target, coordinates, num_uniform=2, num_own=3)
    assert points.values.tolist() == [7, -1, 0, 7, -1]
    assert points.occupancy.tolist() == [[1, 0, 0, 1, 0]]
    assert points.valid.tolist() == [[True, False, True, True, False]]
    uniform, own = points.split(coordinates)
    assert torch.equal(uniform, coordinates[:2])
    assert torch.equal(own, coordinates[None, 2:])


def by_grid_sample(features, stride, coordinates):
    """torch's own interpolation: [C, d, h, w] spans stride * (d, h, w) voxels, a voxel's centre is its index + 0.5."""
    span = torch.tensor(stride, dtype=torch.float64) * torch.tensor(features.shape[1:])
    grid = ((coordinates + 0.5) / span * 2 - 1).flip(-1)[None, :, None, None]
    sampled = F.grid_sample(features[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0, :, :, 0, 0].T


CASES = [((6, 10, 14), (1, 2, 2)), ((5, 9, 13), (1, 2, 2)), ((7, 11, 19), (2, 4, 4)), ((4, 10, 15), (1, 3, 8))]
CASES += [((1, 9, 13), (1, 2, 4)), ((5, 3, 13), (8, 8, 2)), ((6, 10, 14), (1, 1, 1))]


@pytest.mark.parametrize(("size", "stride"), CASES)
def test_equals_grid_sample_and_its_gradient(size, stride):
    generator = torch.Generator().manual_seed(0)
    grid = [math.ceil(n / s) for n, s in zip(size, stride, strict=True)]
    features = torch.randn(4, *grid, generator=generator, dtype=torch.float64, requires_grad=True)
    coordinates = torch.nonzero(torch.ones(size))  # every voxel, so corners and borders too
    coordinates = torch.cat([coordinates, coordinates[:50]])[torch.randperm(len(coordinates) + 50, generator=generator)]
    found, wanted = point_features(features, stride, coordinates), by_grid_sample(features, stride, coordinates)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((values * direction).sum(), features)[0] for values in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)
    single = point_features(features.float(), stride, coordinates)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=0, atol=1e-5)


def test_a_linear_map_by_hand():
    # Cells of 1, 2 and 4 voxels have their centres at 0.5, 1 and 2 voxels, 1.5, 3 and 6, ...
    z, y, x = torch.meshgrid(torch.arange(3) + 0.5, 2 * torch.arange(3) + 1.0, 4 * torch.arange(4) + 2.0, indexing="ij")
    features = torch.stack([z, y, x])
    found = point_features(features, (1, 2, 4), torch.tensor([[0, 0, 0], [1, 3, 5], [2, 5, 15], [2, 4, 1]]))
    wanted = [[0.5, 1, 2], [1.5, 3.5, 5.5], [2.5, 5, 14], [2.5, 4.5, 2]]  # held at the outermost centres
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_of_a_batch_do_not_mix(channels_last):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 3, 6, 5, 7, generator=generator, dtype=torch.float64)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last_3d)
    features.requires_grad_()
    draws = [(torch.rand(count, 3, generator=generator) * torch.tensor(SIZE)).long() for count in (50, 0, 1, 7)]
    found = batch_point_features(features, (1, 2, 2), draws)
    for n, coordinates in enumerate(draws):
        assert found[n].shape == (len(coordinates), 3)
        wanted = by_grid_sample(features[n], (1, 2, 2), coordinates) if len(coordinates) else found[n]
        torch.testing.assert_close(found[n], wanted, rtol=0, atol=1e-12)
    gradient = torch.autograd.grad(found[3].sum(), features)[0]
    assert not gradient[:3].any()
    assert gradient[3].sum().item() == pytest.approx(7 * 3)  # the weights of a point add up to one


def test_no_points_at_all():
    features = torch.randn(2, 3, 6, 5, 7, requires_grad=True)
    found = batch_point_features(features, (1, 2, 2), [torch.zeros(0, 3, dtype=torch.int64)] * 2)
    assert [f.shape for f in found] == [(0, 3), (0, 3)]


def test_half_precision_features_are_interpolated_and_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, 5, 7, generator=generator).bfloat16()
    # A thousand points in one voxel: summed in bfloat16 their gradient would stop growing at 256.
    coordinates = torch.tensor([[3, 4, 5]] * 1000 + [[0, 0, 0]])
    half, full = features.requires_grad_(), features.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = point_features(half, (1, 2, 2), coordinates)
    assert found.dtype == torch.float32
    wanted = point_features(full, (1, 2, 2), coordinates)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(half.grad, full.grad.bfloat16())
    assert np.isclose(full.grad.sum().item(), 3 * 1001)
