"""IoU matcher against a naive loop over exact fractions."""

from fractions import Fraction

import pytest
import torch

from seg3d_monai.matching import IoUMatcher
from seg3d_monai.matching.iou_matcher import BACKGROUND, IGNORED

SIZE = (6, 9, 13)


def random_boxes(count, seed, least=1):
    generator = torch.Generator().manual_seed(seed)
    lower = torch.stack([torch.randint(0, n - least + 1, (count,), generator=generator) for n in SIZE], 1)
    room = torch.tensor(SIZE) - lower
    extent = least + (torch.rand(count, 3, generator=generator) * (room - least + 1)).long()
    return torch.cat([lower, lower + extent], 1).float()


def exact_iou(a, b):
    shared = volume_a = volume_b = 1
    for axis in range(3):
        shared *= max(0, min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis]))
        volume_a *= a[axis + 3] - a[axis]
        volume_b *= b[axis + 3] - b[axis]
    return Fraction(int(shared), max(1, int(volume_a + volume_b - shared)))


def naive(boxes, truth, foreground, background, match_best, label=None):
    iou = [[exact_iou(b, t) for t in truth.tolist()] for b in boxes.tolist()]
    matched = []
    for box, row in zip(boxes.tolist(), iou, strict=True):
        result = BACKGROUND
        if row:
            best = max(row)
            result = row.index(best) if best >= foreground else BACKGROUND if best < background else IGNORED
            if match_best:
                for g, value in reversed(list(enumerate(row))):
                    if value > 0 and value == max(other[g] for other in iou):
                        result = g
        if result == BACKGROUND and label is not None:
            voxel = tuple(min(n - 1, int((box[a] + box[a + 3]) / 2)) for a, n in enumerate(SIZE))
            result = IGNORED if label[voxel] == -1 else result
        matched.append(result)
    return matched


@pytest.mark.parametrize("match_best", [False, True])
@pytest.mark.parametrize(("foreground", "background"), [(0.5, 0.25), (0.5, 0.5), (0.25, 0.0), (1.0, 0.125)])
@pytest.mark.parametrize("num_truth", [0, 1, 7])
@pytest.mark.parametrize("chunk_size", [20, 2**22])
def test_equals_a_naive_loop(match_best, foreground, background, num_truth, chunk_size):
    boxes, truth = random_boxes(40, seed=num_truth), random_boxes(num_truth, seed=100)
    boxes = torch.cat([boxes, truth, boxes[:5]])  # exact matches and ties
    label = torch.zeros(SIZE, dtype=torch.int64)
    label[:, 3:7, 5:] = -1
    matcher = IoUMatcher(
        foreground_iou=foreground, background_iou=background, match_best=match_best, chunk_size=chunk_size
    )
    assert matcher(boxes, truth).tolist() == naive(boxes, truth, foreground, background, match_best)
    assert matcher(boxes, truth, label).tolist() == naive(boxes, truth, foreground, background, match_best, label)


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


@pytest.mark.parametrize("num_truth", [0, 3])
def test_no_boxes(num_truth):
    label = torch.full(SIZE, -1)
    found = matcher()(torch.zeros(0, 6), random_boxes(num_truth, seed=0), label)
    assert found.shape == (0,)
    assert found.dtype == torch.int64


def test_ignored_voxels_excuse_background_only():
    label = torch.full(SIZE, -1)
    truth = torch.tensor([[0.0, 0, 0, 2, 4, 8]])
    boxes = torch.tensor(
        [[0.0, 0, 0, 2, 4, 8], [4, 6, 8, 6, 9, 13], [-9, -9, -9, -1, -1, -1], [90, 90, 90, 99, 99, 99]]
    )
    assert matcher()(boxes, truth, label).tolist() == [0, IGNORED, IGNORED, IGNORED]


def test_far_more_boxes_than_a_chunk_holds():
    boxes, truth = random_boxes(20_000, seed=5), random_boxes(60, seed=6)
    whole = matcher()(boxes, truth)
    assert torch.equal(matcher(chunk_size=1000)(boxes, truth), whole)
    assert (whole >= 0).any()


@pytest.mark.parametrize(("foreground", "background"), [(0.3, 0.5), (1.1, 0.5), (0.5, -0.1)])
def test_thresholds_out_of_order_are_refused(foreground, background):
    with pytest.raises(ValueError, match="out of order"):
        IoUMatcher(foreground_iou=foreground, background_iou=background, match_best=False)
