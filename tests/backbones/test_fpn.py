"""Feature pyramid: sizes, nearest-cell fusion counted by hand, axis permutation, gradients."""

import pytest
import torch
from torch import nn

from seg3d_monai.backbones import FeaturePyramid, ResNet


class Given(nn.Module):
    """A backbone that returns the maps it was given."""

    def __init__(self, maps, strides):
        super().__init__()
        self.maps, self.strides = maps, strides
        self.channels = {level: feature.shape[1] for level, feature in maps.items()}

    def forward(self, images):
        return self.maps


def bare(backbone, levels=None):
    """A pyramid whose convolutions are the identity."""
    pyramid = FeaturePyramid(backbone=backbone, out_channels=1, levels=levels)
    for level in pyramid.levels:
        pyramid.lateral[level] = pyramid.output[level] = nn.Identity()
    return pyramid


@pytest.mark.parametrize("size", [(9, 17, 35), (8, 16, 48), (5, 37, 25), (1, 2, 3)])
@pytest.mark.parametrize("ratio", [(2, 2, 2), (1, 2, 2), (1, 3, 4)])
def test_a_cell_receives_the_coarse_cell_that_contains_it(size, ratio):
    torch.manual_seed(0)
    coarse_size = tuple(-(-n // r) for n, r in zip(size, ratio, strict=True))
    fine, coarse = torch.rand(2, 1, *size), torch.rand(2, 1, *coarse_size)
    strides = {"c1": (1, 2, 2), "c2": (ratio[0], ratio[1] * 2, ratio[2] * 2)}
    pyramid = bare(Given({"c1": fine, "c2": coarse}, strides))
    out = pyramid(torch.zeros(2, 1, *size))
    z, y, x = (torch.arange(n) // r for n, r in zip(size, ratio, strict=True))
    wanted = fine + coarse[:, :, z[:, None, None], y[:, None], x]
    torch.testing.assert_close(out["p2"], coarse)
    torch.testing.assert_close(out["p1"], wanted)


def test_fusion_goes_through_all_levels_from_the_coarsest():
    maps = {f"c{i}": torch.full((1, 1, *size), 10.0**i) for i, size in enumerate([(5, 9, 7), (3, 5, 4), (3, 3, 2)], 1)}
    out = bare(Given(maps, {"c1": (1, 2, 2), "c2": (2, 4, 4), "c3": (2, 8, 8)}))(torch.zeros(1))
    assert [out[f"p{i}"].unique().tolist() for i in (1, 2, 3)] == [[1110.0], [1100.0], [1000.0]]


def resnet(axes=(0, 1, 2)):
    def permuted(values):
        return tuple(values[a] for a in axes)

    return ResNet(
        in_channels=1,
        depths=(1, 1, 1),
        widths=(4, 4, 8),
        stem_channels=4,
        stem_kernel=permuted((1, 3, 5)),
        stem_stride=permuted((1, 2, 1)),
        stage_strides=[permuted(s) for s in ((1, 1, 1), (1, 2, 2), (2, 1, 2))],
    )


def test_levels_channels_strides_and_sizes():
    pyramid = FeaturePyramid(backbone=resnet(), out_channels=6)
    assert pyramid.strides == {"p1": (1, 2, 1), "p2": (1, 4, 2), "p3": (2, 4, 4)}
    assert pyramid.channels == {"p1": 6, "p2": 6, "p3": 6}
    out = pyramid(torch.randn(2, 1, 5, 11, 7))
    assert list(out) == ["p1", "p2", "p3"]
    assert [tuple(v.shape) for v in out.values()] == [(2, 6, 5, 6, 7), (2, 6, 5, 3, 4), (2, 6, 3, 3, 2)]


def test_chosen_levels_only():
    pyramid = FeaturePyramid(backbone=resnet(), out_channels=6, levels=("c2", "c3"))
    assert pyramid.strides == {"p2": (1, 4, 2), "p3": (2, 4, 4)}
    assert list(pyramid(torch.randn(1, 1, 5, 11, 7))) == ["p2", "p3"]


def test_permuting_axes_of_input_kernels_and_strides_permutes_the_pyramid():
    torch.manual_seed(0)
    axes = (2, 0, 1)
    order = (0, 1, *(a + 2 for a in axes))
    pyramid = FeaturePyramid(backbone=resnet(), out_channels=4).double()
    for layer in pyramid.modules():
        if isinstance(layer, nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    turned = FeaturePyramid(backbone=resnet(axes), out_channels=4).double()
    turned.load_state_dict({k: v.permute(order) if v.ndim == 5 else v for k, v in pyramid.state_dict().items()})
    image = torch.randn(1, 1, 5, 11, 14, dtype=torch.float64)
    wanted, found = pyramid(image), turned(image.permute(order))
    for level in wanted:
        torch.testing.assert_close(found[level], wanted[level].permute(order))


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    pyramid = FeaturePyramid(backbone=resnet(), out_channels=4)
    for layer in pyramid.modules():
        if isinstance(layer, nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    sum(v.square().sum() for v in pyramid(torch.randn(1, 1, 6, 9, 14)).values()).backward()
    assert [name for name, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_unknown_level_is_named():
    with pytest.raises(ValueError, match=r"c9.*choose from \['c1', 'c2', 'c3'\]"):
        FeaturePyramid(backbone=resnet(), out_channels=4, levels=("c1", "c9"))
