"""Mirrored views, and one set of detections from all of them, by hand on rows of voxels."""

import pytest
import torch

from seg3d_monai.inference.flips import flip_combinations, merge_views, mirrored


@pytest.mark.parametrize(
    ("flips", "views"),
    [
        ((), [()]),
        (("x",), [(), (2,)]),
        (("z", "y"), [(), (0,), (1,), (0, 1)]),
        (("z", "y", "x"), [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]),
    ],
)
def test_every_combination_of_axes_is_a_view(flips, views):
    assert flip_combinations(flips) == views


@pytest.mark.parametrize("count", [0, 1, 2])
def test_mirrored_detections_lie_where_the_mirrored_image_has_them(count):
    boxes = torch.tensor([[0, 1, 2, 3, 5, 11.5], [2, 2.25, 0, 6, 3, 4]], dtype=torch.float64)[:count]
    found = {"boxes": boxes, "mask_logits": [torch.arange(8.0).reshape(1, 2, 4) + i for i in range(count)]}
    there = mirrored(found, (0, 2), (6, 10, 14))
    assert there["boxes"].tolist() == [[3, 1, 2.5, 6, 5, 12], [0, 2.25, 10, 4, 3, 14]][:count]
    assert [grid.tolist() for grid in there["mask_logits"]] == [
        [[[3 + i, 2 + i, 1 + i, i], [7 + i, 6 + i, 5 + i, 4 + i]]] for i in range(count)
    ]
    back = mirrored(there, (0, 2), (6, 10, 14))
    assert torch.equal(back["boxes"], boxes)
    assert all(torch.equal(*pair) for pair in zip(back["mask_logits"], found["mask_logits"], strict=True))


def view(*objects):
    """Detections (x1, x2, score, class, logit) of a row of voxels."""
    return {
        "boxes": torch.tensor([[0.0, 0, x1, 2, 3, x2] for x1, x2, *_ in objects]).reshape(-1, 6),
        "scores": torch.tensor([float(o[2]) for o in objects]),
        "classes": torch.tensor([o[3] for o in objects], dtype=torch.int64),
        "mask_logits": [torch.full((1, 1, 2), float(o[4])) for o in objects],
    }


def merged(*views, score_threshold=0.1):
    found = merge_views(views, score_threshold=score_threshold, mask_threshold=0.5)
    rows = zip(found["boxes"], found["scores"], found["classes"], found["mask_logits"], strict=True)
    return [(b[2].item(), b[5].item(), s.item(), c.item(), m.mean().item()) for b, s, c, m in rows]


def test_views_are_merged_by_hand():
    first, second = view((0, 8, 0.9, 0, 5), (20, 24, 0.8, 0, 3)), view((0, 9.5, 0.6, 0, 2.5))
    wanted = [(0, 8.6, 0.75, 0, 4), (20, 24, 0.4, 0, 3)]
    for found in (merged(first, second), merged(second, first)):
        assert found == [pytest.approx(row, rel=1e-6) for row in wanted]


@pytest.mark.parametrize(("start", "number"), [(0, 1), (5, 1), (6, 2), (10, 2)])
def test_views_are_one_object_from_an_iou_of_three_tenths(start, number):
    assert len(merged(view((0, 10, 0.9, 0, 5)), view((start, start + 10, 0.8, 0, 5)))) == number  # IoU 5/15, 4/16


def test_boxes_overlap_but_masks_do_not():
    views = [view((0, 10, 0.9, 0, 5)), view((0, 10, 0.8, 0, 5))]
    views[0]["mask_logits"] = [torch.tensor([[[5.0, -5.0]]])]
    views[1]["mask_logits"] = [torch.tensor([[[-5.0, 5.0]]])]
    assert [row[2] for row in merged(*views)] == pytest.approx([0.45, 0.4])


def test_two_detections_of_one_view_are_never_one_object():
    twice = view((0, 8, 0.9, 0, 5), (0, 8, 0.3, 0, 5))
    assert [row[2] for row in merged(twice, twice)] == pytest.approx([0.9, 0.3])


def test_classes_are_merged_apart():
    found = merged(view((0, 8, 0.9, 0, 5), (0, 8, 0.6, 1, 5)), view((0, 8, 0.7, 0, 5), (0, 8, 0.8, 1, 5)))
    assert [(row[3], row[2]) for row in found] == [(0, pytest.approx(0.8)), (1, pytest.approx(0.7))]


def test_a_detection_below_the_threshold_joins_but_begins_nothing():
    assert merged(view((0, 8, 0.9, 0, 5)), view((0, 8, 0.2, 0, 5), (20, 28, 0.2, 0, 5)), score_threshold=0.5) == [
        pytest.approx((0, 8, 0.55, 0, 5), rel=1e-6)
    ]
