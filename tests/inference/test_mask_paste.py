"""Grids of logits resampled over other boxes: against torch's own sampling."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seg3d_monai.inference.mask_paste import resample_logits


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 9), (6, 4, 7)])
def test_resampling_equals_grid_sample(shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 5, 7))
    box, target = (1.5, 2.25, 3, 8, 9.5, 20), (0.5, 3, 1.75, 6.25, 11, 22)
    axes = []
    for a in range(3):
        centre = target[a] + (torch.arange(shape[a]) + 0.5).double() * (target[a + 3] - target[a]) / shape[a]
        axes.append((centre - box[a]) / (box[a + 3] - box[a]) * 2 - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None]
    wanted = F.grid_sample(torch.from_numpy(logits)[None, None], grid, padding_mode="border", align_corners=False)
    np.testing.assert_allclose(resample_logits(logits, box, target, shape), wanted[0, 0].numpy(), atol=1e-12)


def test_a_grid_over_its_own_box_is_left_alone():
    logits = np.full((2, 3, 4), np.inf)
    assert resample_logits(logits, (0, 0, 0, 2, 3, 4), (0, 0, 0, 2, 3, 4), (2, 3, 4)) is logits
