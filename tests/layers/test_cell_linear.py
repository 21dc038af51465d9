"""The same numbers and gradients as nn.Linear on the transposed map, and gradients in the map's order."""

import pytest
import torch
from torch import nn

from seg3d_monai.layers import CellLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(2, 5, 3, 4, 7), (1, 1, 1, 1, 1), (0, 3, 2, 2, 2), (3, 2, 1, 6, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_linear_on_cells(size, bias, channels_last):
    generator = torch.Generator().manual_seed(0)
    layer = CellLinear(size[1], 6, bias=bias).double()
    plain = nn.Linear(size[1], 6, bias=bias).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    found, wanted = layer(x), plain(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found, wanted)
    direction = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((values * direction).sum(), (x, *module.parameters()))
        for values, module in ((found, layer), (wanted, plain))
    ]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_gradient_has_the_order_of_the_map():
    x = torch.randn(2, 4, 3, 5, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(CellLinear(4, 8)(x).square().sum(), x)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    layer = CellLinear(4, 8)
    x = torch.randn(2, 4, 3, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.to(dtype))
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(found.float(), layer(x), atol=0.05, rtol=0.05)
