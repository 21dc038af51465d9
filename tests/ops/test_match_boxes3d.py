"""Matching of boxes against a naive loop over exact fractions."""

import math
from fractions import Fraction

import pytest
import torch

from seg3d_monai.ops import match_boxes3d
from seg3d_monai.ops import reference as reference_kernels
from seg3d_monai.ops.match_boxes3d import BACKGROUND, IGNORED

pytestmark = pytest.mark.usefixtures("kernels")

SIZE = (6, 9, 13)


def random_boxes(count, seed, size=SIZE):
    """Integer boxes of at least one voxel, so that IoUs are ratios of small whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    lower = torch.stack([torch.randint(0, n, (count,), generator=generator) for n in size], 1)
    room = torch.tensor(size) - lower
    extent = 1 + (torch.rand(count, 3, generator=generator) * room).long()
    return torch.cat([lower, lower + extent], 1).float()


def exact_iou(a, b):
    shared = volume_a = volume_b = 1
    for axis in range(3):
        shared *= max(0, min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis]))
        volume_a *= a[axis + 3] - a[axis]
        volume_b *= b[axis + 3] - b[axis]
    return Fraction(int(shared), max(1, int(volume_a + volume_b - shared)))


def naive(boxes, truth, foreground, background, match_best):
    iou = [[exact_iou(b, t) for t in truth.tolist()] for b in boxes.tolist()]
    matched = []
    for row in iou:
        result = BACKGROUND
        if row:
            best = max(row)
            result = row.index(best) if best >= foreground else BACKGROUND if best < background else IGNORED
            if match_best:
                for g, value in reversed(list(enumerate(row))):
                    if value > 0 and value == max(other[g] for other in iou):
                        result = g
        matched.append(result)
    return matched


@pytest.mark.parametrize("match_best", [False, True])
@pytest.mark.parametrize(("foreground", "background"), [(0.5, 0.25), (0.5, 0.5), (0.25, 0.0), (1.0, 0.125)])
@pytest.mark.parametrize("num_truth", [0, 1, 7, 40])
@pytest.mark.parametrize("pairs", [20, 2**22])
def test_equals_a_naive_loop(monkeypatch, match_best, foreground, background, num_truth, pairs):
    monkeypatch.setattr(reference_kernels, "PAIRS", pairs)
    boxes, truth = random_boxes(40, seed=num_truth), random_boxes(num_truth, seed=100)
    boxes = torch.cat([boxes, truth, boxes[:5]])  # exact matches and ties
    truth = torch.cat([truth, truth[:2]])
    matched = match_boxes3d(boxes, truth, foreground, background, match_best)
    assert matched.dtype == torch.int64
    assert matched.tolist() == naive(boxes, truth, foreground, background, match_best)


def test_many_boxes_are_matched_as_each_alone():
    boxes, truth = random_boxes(5000, seed=5, size=(40, 90, 130)), random_boxes(60, seed=6, size=(40, 90, 130))
    whole = match_boxes3d(boxes, truth, 0.3, 0.1, False)
    assert {BACKGROUND, IGNORED} < set(whole.tolist())
    alone = [match_boxes3d(part, truth, 0.3, 0.1, False) for part in boxes.split([1, 15, 16, 17, 951, 4000])]
    assert torch.equal(torch.cat(alone), whole)


def test_threads_change_nothing():
    boxes, truth = random_boxes(70000, seed=1, size=(40, 90, 130)), random_boxes(30, seed=2, size=(40, 90, 130))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(match_boxes3d(boxes, truth, 0.4, 0.2, True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert len(set(results[0].tolist()) - {BACKGROUND, IGNORED}) == 30  # every true box has its best ones


def test_fractions_of_a_voxel_agree_between_the_passes():
    """Each true box's best boxes are found again to the bit, whatever their corners."""
    generator = torch.Generator().manual_seed(0)
    lower = torch.rand(3000, 3, generator=generator) * torch.tensor([20.0, 50, 70])
    boxes = torch.cat([lower, lower + 1 + 9 * torch.rand(3000, 3, generator=generator)], 1)
    truth = boxes[:50] + torch.rand(50, 6, generator=generator) * 0.3
    matched = match_boxes3d(boxes, truth, 1.0, 1.0, True)
    assert set(matched.tolist()) == {BACKGROUND, *range(50)}


def test_boxes_without_volume_or_numbers_overlap_nothing():
    truth = torch.tensor([[0.0, 0, 0, 2, 4, 8], [1, 1, 1, 1, 3, 3], [0, 0, 0, math.nan, 4, 8], [3, 3, 3, 2, 2, 2]])
    odd = [
        [1, 1, 1, 1, 3, 3],
        [2, 4, 8, 0, 0, 0],
        [math.nan, 0, 0, 2, 4, 8],
        [0, 0, 0, 2, 4, math.nan],
        [-math.inf, 0, 0, math.inf, 4, 8],
        [math.inf] * 6,
        [-math.inf] * 3 + [math.inf] * 3,
    ]
    boxes = torch.tensor([*odd, [0.0, 0, 0, 2, 4, 4]])
    for order in (slice(None), torch.arange(len(boxes) - 1, -1, -1)):
        matched = match_boxes3d(boxes[order], truth, 0.5, 0.25, True)
        assert matched.tolist() == torch.tensor([*[BACKGROUND] * len(odd), 0])[order].tolist()


@pytest.mark.parametrize("num_truth", [0, 3])
def test_no_boxes(num_truth):
    found = match_boxes3d(torch.zeros(0, 6), random_boxes(num_truth, seed=0), 0.5, 0.5, True)
    assert found.shape == (0,)
    assert found.dtype == torch.int64


def test_boxes_that_are_no_rows_of_memory():
    boxes, truth = random_boxes(50, seed=3), random_boxes(5, seed=4)
    columns = boxes.t().contiguous().t()
    expected = match_boxes3d(boxes, truth, 0.5, 0.2, True)
    assert torch.equal(match_boxes3d(columns, truth.flip(1).flip(1), 0.5, 0.2, True), expected)


def test_compiles_whole():
    boxes, truth = random_boxes(50, seed=3), random_boxes(5, seed=4)
    compiled = torch.compile(lambda b, t: match_boxes3d(b, t, 0.5, 0.2, True) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(boxes, truth), match_boxes3d(boxes, truth, 0.5, 0.2, True) + 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"boxes": torch.zeros(4, 6, dtype=torch.float64)},
            TypeError,
            "boxes must be float32",
        ),
        ({"truth": torch.zeros(4, 5)}, ValueError, r"truth must have the shape \[K, 6\]"),
        ({"truth": [[0.0] * 6]}, TypeError, "truth must be a torch.Tensor"),
        ({"truth": torch.zeros(1, 6, device="meta")}, ValueError, "move them to one device"),
        ({"foreground_iou": 1.5}, ValueError, "foreground_iou"),
        ({"background_iou": math.nan}, ValueError, "background_iou"),
        ({"background_iou": 0.75}, ValueError, "above foreground_iou"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {"boxes": torch.zeros(4, 6), "truth": torch.zeros(1, 6), "foreground_iou": 0.5, "background_iou": 0.2}
    with pytest.raises(error, match=message):
        match_boxes3d(**(arguments | changes), match_best=True)
