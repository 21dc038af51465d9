"""repeat_cells against F.interpolate, with channels first and last, and against a sum worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from seg3d_monai.layers import repeat_cells


@pytest.mark.parametrize("ratio", [(1, 1, 1), (2, 2, 2), (1, 2, 3), (4, 1, 2)])
def test_repeat_cells_equals_nearest_interpolation(ratio: tuple[int, int, int]) -> None:
    x = torch.randn(2, 5, 3, 4, 6)
    expected = F.interpolate(x, scale_factor=tuple(map(float, ratio)), mode="nearest")
    assert torch.equal(repeat_cells(x, ratio, 2), expected)
    assert torch.equal(repeat_cells(x.movedim(1, -1), ratio, 1).movedim(-1, 1), expected)


def test_repeat_cells_keeps_channels_last_in_memory() -> None:
    x = torch.randn(2, 3, 4, 6, 5)
    assert repeat_cells(x, (1, 2, 2), 1).is_contiguous()


def test_repeat_cells_gradient_sums_over_the_copies_of_a_cell() -> None:
    x = torch.zeros(1, 1, 1, 1, 2, requires_grad=True)
    weights = torch.arange(12.0).reshape(1, 1, 1, 2, 6)  # cell 0 was copied to x = 0, 1, 2 of both rows
    (repeat_cells(x, (1, 2, 3), 2) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0 + 1 + 2 + 6 + 7 + 8, 3 + 4 + 5 + 9 + 10 + 11]
