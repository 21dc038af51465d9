"""IoU matcher by hand: thresholds, best boxes, ignored voxels; the operator has tests/ops/test_match_boxes3d.py."""

import pytest
import torch

from seg3d_monai.matching import IoUMatcher
from seg3d_monai.matching.iou_matcher import BACKGROUND, IGNORED

SIZE = (6, 9, 13)


def matcher(**changes):
    return IoUMatcher(**({"foreground_iou": 0.5, "background_iou": 0.25, "match_best": True} | changes))


def test_by_hand():
    truth = torch.tensor([[0.0, 0, 0, 2, 4, 8], [4, 6, 8, 6, 9, 13]])
    boxes = torch.tensor(
        [
            [0.0, 0, 0, 2, 4, 8],  # IoU 1
            [0, 0, 0, 2, 4, 4],  # 1/2, the threshold itself
            [0, 0, 0, 1, 4, 5],  # 20/64: in between
            [0, 0, 0, 1, 4, 2],  # 8/64
            [5, 8, 12, 6, 9, 13],  # 1/30 with the second, and its best
            [2, 4, 8, 3, 5, 9],  # touches both, shares nothing
        ]
    )
    assert matcher()(boxes, truth).tolist() == [0, 0, IGNORED, BACKGROUND, 1, BACKGROUND]
    assert matcher(match_best=False)(boxes, truth).tolist() == [0, 0, IGNORED, BACKGROUND, BACKGROUND, BACKGROUND]


def test_all_equally_best_boxes_match():
    truth = torch.tensor([[0.0, 0, 0, 4, 4, 4]])
    boxes = torch.tensor([[0.0, 0, 0, 1, 4, 4], [3, 0, 0, 4, 4, 4], [0, 0, 0, 1, 4, 3]])
    assert matcher()(boxes, truth).tolist() == [0, 0, BACKGROUND]


def test_a_box_that_shares_nothing_is_never_a_best_match():
    truth = torch.tensor([[4.0, 6, 8, 6, 9, 13]])
    boxes = torch.tensor([[0.0, 0, 0, 2, 4, 8], [1, 1, 1, 2, 2, 2]])
    assert matcher()(boxes, truth).tolist() == [BACKGROUND, BACKGROUND]


@pytest.mark.parametrize("truth", [torch.zeros(0, 6), torch.tensor([[0.0, 0, 0, 2, 4, 8]])])
def test_no_boxes(truth):
    found = matcher()(torch.zeros(0, 6), truth, torch.full(SIZE, -1))
    assert found.shape == (0,)
    assert found.dtype == torch.int64


def test_ignored_voxels_excuse_background_only():
    label = torch.full(SIZE, -1)
    truth = torch.tensor([[0.0, 0, 0, 2, 4, 8]])
    boxes = torch.tensor(
        [[0.0, 0, 0, 2, 4, 8], [4, 6, 8, 6, 9, 13], [-9, -9, -9, -1, -1, -1], [90, 90, 90, 99, 99, 99]]
    )
    assert matcher()(boxes, truth, label).tolist() == [0, IGNORED, IGNORED, IGNORED]


@pytest.mark.parametrize(("foreground", "background"), [(0.3, 0.5), (1.1, 0.5), (0.5, -0.1)])
def test_thresholds_out_of_order_are_refused(foreground, background):
    with pytest.raises(ValueError, match="out of order"):
        IoUMatcher(foreground_iou=foreground, background_iou=background, match_best=False)
