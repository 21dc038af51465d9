"""Mask head: shapes, zero rows, independence of rows, axes."""

import pytest
import torch

from seg3d_monai.heads import MaskHead


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(("upsample", "size"), [((2, 2, 2), (4, 6, 10)), ((1, 2, 4), (2, 6, 20))])
def test_shapes_dtype_and_gradients(rows, upsample, size):
    head = MaskHead(in_channels=3, channels=8, num_convs=2, num_classes=2, upsample=upsample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(torch.randn(rows, 3, 2, 3, 5))
    assert logits.shape == (rows, 2, *size)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_rows_are_independent():
    torch.manual_seed(0)
    head = MaskHead(in_channels=2, channels=4, num_convs=1, num_classes=1)
    x = torch.randn(5, 2, 2, 3, 4)
    torch.testing.assert_close(head(x)[2:3], head(x[2:3]))


def test_a_cell_fills_its_own_part_of_the_finer_grid():
    torch.manual_seed(0)
    head = MaskHead(in_channels=1, channels=8, num_convs=0, num_classes=1, upsample=(1, 2, 3))
    torch.nn.init.constant_(head.up[0].bias, 10.0)
    x = torch.zeros(1, 1, 3, 4, 5)
    moved = x.clone()
    moved[0, 0, 1, 2, 4] = 1
    changed = (head(moved) != head(x)).nonzero()[:, 2:]
    assert changed.amin(0).tolist() == [1, 4, 12]
    assert changed.amax(0).tolist() == [1, 5, 14]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_image_is_read_at_the_resolution_of_the_masks(rows):
    torch.manual_seed(0)
    head = MaskHead(in_channels=3, channels=8, num_convs=1, num_classes=2, image_channels=2)
    features, images = torch.randn(rows, 3, 2, 3, 5), torch.randn(rows, 2, 4, 6, 10)
    logits = head(features, images)
    assert logits.shape == (rows, 2, 4, 6, 10)
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    if rows:
        assert not torch.allclose(head(features, images.flip(4)), logits)
