"""MLP against the formula, and its edges."""

import numpy as np
import pytest
import torch

from seg3d_monai.layers import MLP


def test_layers_are_linear_with_relu_between_them():
    torch.manual_seed(0)
    mlp = MLP(in_channels=3, hidden=5, out_channels=2, num_layers=3).double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    wanted = x.numpy()
    for i, layer in enumerate(mlp.layers):
        wanted = wanted @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        wanted = np.maximum(wanted, 0) if i < 2 else wanted
    torch.testing.assert_close(mlp(x), torch.from_numpy(wanted))
    assert wanted.min() < 0  # nothing cuts the output


def test_one_layer_has_no_hidden_channels():
    mlp = MLP(in_channels=3, hidden=99, out_channels=2, num_layers=1)
    assert [tuple(p.shape) for p in mlp.parameters()] == [(2, 3), (2,)]


def test_no_rows():
    assert MLP(in_channels=3, hidden=5, out_channels=2, num_layers=2)(torch.zeros(1, 0, 3)).shape == (1, 0, 2)


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    mlp = MLP(in_channels=3, hidden=5, out_channels=2, num_layers=3)
    mlp(torch.randn(20, 3)).square().sum().backward()
    assert [name for name, p in mlp.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="num_layers is 0"):
        MLP(in_channels=3, hidden=5, out_channels=2, num_layers=0)
