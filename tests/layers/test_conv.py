"""Convolution blocks: sizes, axes, normalisation groups, user errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seg3d_monai.layers import Conv3d, ConvNormAct, group_norm
from seg3d_monai.layers.conv import check_axes


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (8, 8), (12, 1), (3, 1), (1, 1)])
def test_group_norm_takes_one_group_where_channels_do_not_divide(channels, groups):
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize("kernel", [1, 3, (1, 3, 5), (3, 5, 7)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 3), (4, 1, 2)])
@pytest.mark.parametrize("size", [(7, 10, 13), (1, 2, 3)])
def test_output_size_is_ceil_of_size_over_stride(kernel, stride, size):
    step = (stride,) * 3 if isinstance(stride, int) else stride
    out = ConvNormAct(2, 4, kernel, stride)(torch.randn(2, 2, *size))
    assert out.shape == (2, 4, *(-(-n // s) for n, s in zip(size, step, strict=True)))


def test_block_is_convolution_then_norm_then_relu():
    torch.manual_seed(0)
    block, linear = ConvNormAct(3, 16, (1, 3, 5), (1, 2, 1)), ConvNormAct(3, 16, (1, 3, 5), (1, 2, 1), act=False)
    linear.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 4, 7, 9)
    conv = F.conv3d(x, block[0].weight, stride=(1, 2, 1), padding=(0, 1, 2)).reshape(2, 8, 2, -1)
    mean, var = conv.mean((2, 3), keepdim=True), conv.var((2, 3), correction=0, keepdim=True)
    wanted = ((conv - mean) / (var + 1e-5).sqrt()).reshape(2, 16, 4, 4, 9)
    torch.testing.assert_close(linear(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(x), wanted.clamp(min=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", [False, True])
def test_names_of_the_parameters(act):
    assert list(ConvNormAct(3, 16, act=act).state_dict()) == ["0.weight", "1.weight", "1.bias"]


def test_group_norm_has_a_relu_only_if_wanted():
    x = torch.randn(2, 16, 3, 4, 5)
    assert torch.equal(group_norm(16, relu=True)(x), group_norm(16)(x).clamp(min=0))


@pytest.mark.parametrize("kernel", [2, (3, 4, 3)])
def test_even_kernels_are_refused(kernel):
    with pytest.raises(ValueError, match="odd"):
        ConvNormAct(2, 4, kernel)


def test_check_axes_returns_a_tuple_of_int():
    assert check_axes("stride", [1, 2, 4]) == (1, 2, 4)
    assert check_axes("stride", torch.Size([3, 5, 7])) == (3, 5, 7)


@pytest.mark.parametrize("value", [(1, 2), (1, 2, 0), (1, 2, -1), (1, 2, 1.5), 3, (1, 2, 3, 4)])
def test_check_axes_names_argument_and_value(value):
    with pytest.raises(ValueError, match=r"^stride is .*\(z, y, x\)"):
        check_axes("stride", value)


def test_channel_norm_is_of_each_cell_alone_and_tells_bright_from_dim():
    torch.manual_seed(0)
    block = ConvNormAct(2, 8, (1, 3, 5), norm="channel")
    assert list(block.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = torch.randn(2, 2, 4, 7, 9)
    conv = F.conv3d(x, block[0].weight, block[0].bias, padding=(0, 1, 2))
    mean, var = conv.mean(1, keepdim=True), conv.var(1, keepdim=True, correction=0)
    torch.testing.assert_close(block(x), ((conv - mean) / (var + 1e-5).sqrt()).clamp(min=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(x)[:, :, :2, :4, :5], block(x[:, :, :3, :5, :7])[:, :, :2, :4, :5])
    assert not torch.allclose(block(x), block(3 * x), atol=1e-2)


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="norm is 'layer'; choose one of group, channel, batch"):
        ConvNormAct(2, 8, norm="layer")


def test_batch_norm_is_of_the_training_and_then_of_no_block():
    torch.manual_seed(0)
    block = ConvNormAct(2, 8, (1, 3, 5), norm="batch")
    x = torch.randn(2, 2, 4, 7, 9) * 3 + 1
    conv = F.conv3d(x, block[0].weight, padding=(0, 1, 2))
    mean, var = conv.mean((0, 2, 3, 4), keepdim=True), conv.var((0, 2, 3, 4), keepdim=True, correction=0)
    torch.testing.assert_close(block(x), ((conv - mean) / (var + 1e-5).sqrt()).clamp(min=0), atol=1e-5, rtol=1e-5)
    for _ in range(400):
        block(x)
    block.eval()
    unbiased = conv.var((0, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(block(x), ((conv - mean) / (unbiased + 1e-5).sqrt()).clamp(min=0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(block(x)[:, :, :2, :4, :5], block(x[:, :, :3, :5, :7])[:, :, :2, :4, :5])


@pytest.mark.parametrize("norm", ["channel", "batch"])
def test_maps_keep_their_channels_last(norm):
    block = nn.Sequential(ConvNormAct(2, 8, norm=norm), ConvNormAct(8, 6, stride=(1, 2, 2), norm=norm))
    x = torch.randn(2, 2, 4, 7, 9)
    assert block(x).is_contiguous(memory_format=torch.channels_last_3d)
    plain = copy.deepcopy(block)
    for layer in plain:
        layer[0].to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(block(x), plain(x))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (5, 3, 1)])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_bf16_gradients_are_those_of_float32_in_shallow_crops(depth, kernel, is_autocast):
    generator = torch.Generator().manual_seed(depth)
    conv = Conv3d(32, 16, kernel, padding=[k // 2 for k in kernel])
    x, grad = torch.randn(2, 32, depth, 5, 6, generator=generator), torch.randn(2, 16, depth, 5, 6, generator=generator)
    truth = F.conv3d(x, conv.weight, conv.bias, padding=conv.padding)
    (wanted,) = torch.autograd.grad(truth, conv.weight, grad)
    conv = conv if is_autocast else conv.bfloat16()
    for _ in range(3):
        freed = [torch.full((2**k,), torch.nan) for k in range(4, 20)]  # what memory that is not cleared would hold
        del freed
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            out = conv(x if is_autocast else x.bfloat16())
        (found,) = torch.autograd.grad(out, conv.weight, grad.to(out.dtype))
        assert (out.float() - truth).abs().max() < 0.03 * truth.abs().max()
        assert (found.float() - wanted).abs().max() < 0.03 * wanted.abs().max()
