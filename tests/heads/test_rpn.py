"""RPN: its outputs stand in the order of the anchors, and proposals are the right anchors, clipped and thinned."""

import pytest
import torch
from torch import nn

from seg3d_monai.heads import AnchorGrid, RPNHead, select_proposals

SHAPES = [[(2, 4, 6), (4, 6, 8)], [(6, 10, 14), (8, 12, 16)]]
STRIDES = {"p1": (1, 2, 4), "p2": (2, 4, 8)}
SIZE = (7, 11, 25)
CELLS = {"p1": (7, 6, 7), "p2": (4, 3, 4)}


def see_through(num_anchors=2):
    """A head whose objectness of anchor a is channel a, and whose delta j of anchor a is channel a * 6 + j."""
    head = RPNHead(in_channels=num_anchors * 6, num_anchors=num_anchors, levels=list(STRIDES))
    head.shared = nn.Identity()
    for layer in (head.objectness, head.deltas):
        nn.init.zeros_(layer.weight)
        for i in range(layer.out_channels):
            layer.weight.data[i, i] = 1
    return head


@pytest.mark.parametrize("level", ["p1", "p2"])
@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize("cell", [(0, 0, 0), (3, 1, 2), (1, 2, 3)])
def test_the_anchor_at_the_position_of_the_response_is_the_one_selected(level, anchor, cell):
    maps = {name: torch.full((2, 12, *cells), -9.0) for name, cells in CELLS.items()}
    maps[level][1, anchor, cell[0], cell[1], cell[2]] = 5.0
    head = see_through()
    nn.init.zeros_(head.deltas.weight)
    objectness, deltas = head(maps)
    anchors = AnchorGrid(shapes=SHAPES, strides=STRIDES)(maps)
    assert [tuple(v.shape) for v in objectness] == [(2, len(a)) for a in anchors]
    assert [tuple(v.shape) for v in deltas] == [(2, len(a), 6) for a in anchors]
    found = select_proposals(
        objectness, deltas, anchors, (99, 99, 99), pre_nms_top_n=10, post_nms_top_n=1, nms_threshold=0.9, min_size=0
    )[1][0]
    stride, shape = STRIDES[level], SHAPES[list(STRIDES).index(level)][anchor]
    lower = [(c + 0.5) * s - e / 2 for c, s, e in zip(cell, stride, shape, strict=True)]
    upper = [(c + 0.5) * s + e / 2 for c, s, e in zip(cell, stride, shape, strict=True)]
    assert found.tolist() == [max(0.0, v) for v in lower + upper]


def test_deltas_stand_at_their_anchor_and_in_their_order():
    torch.manual_seed(0)
    maps = {name: torch.randn(2, 12, *cells) for name, cells in CELLS.items()}
    _, deltas = see_through()(maps)
    for (depth, height, width), found, feature in zip(CELLS.values(), deltas, maps.values(), strict=True):
        for z, y, x, a in [(0, 0, 0, 0), (1, 2, 3, 1), (depth - 1, height - 1, width - 1, 1)]:
            row = ((z * height + y) * width + x) * 2 + a
            assert torch.equal(found[1, row], feature[1, a * 6 : a * 6 + 6, z, y, x])


def test_outputs_are_float32_under_autocast():
    head = RPNHead(in_channels=4, num_anchors=2, levels=["p1"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objectness, deltas = head({"p1": torch.randn(1, 4, 3, 5, 7)})
    assert objectness[0].dtype == deltas[0].dtype == torch.float32


BOXES = torch.tensor(
    [
        [0.0, 0, 0, 4, 6, 8],
        [0, 0, 0, 4, 6, 7],  # IoU 7/8 with the first
        [2, 4, 10, 6, 10, 20],
        [-3, -5, -7, 2, 3, 4],  # clipped to [0, 0, 0, 2, 3, 4]
        [5, 9, 22, 12, 30, 40],  # clipped to [5, 9, 22, 7, 11, 25]
        [6.5, 0, 0, 12, 9, 9],  # clipped to half a voxel along z
    ]
)


def propose(scores, boxes=BOXES, **changes):
    levels = [torch.tensor([scores])] if not isinstance(scores, list | tuple) else [torch.tensor([s]) for s in scores]
    arguments = {"pre_nms_top_n": 100, "post_nms_top_n": 100, "nms_threshold": 0.6} | changes
    anchors = [boxes[: v.shape[1]] for v in levels]
    deltas = [torch.zeros(1, v.shape[1], 6) for v in levels]
    return select_proposals(levels, deltas, anchors, SIZE, **arguments)[0].tolist()


CLIPPED = [
    [0.0, 0, 0, 4, 6, 8],
    [0, 0, 0, 4, 6, 7],
    [2, 4, 10, 6, 10, 20],
    [0, 0, 0, 2, 3, 4],
    [5, 9, 22, 7, 11, 25],
]


def test_proposals_are_clipped_thinned_and_ordered_by_objectness():
    scores = [[0.1, 0.9, 0.3, 0.8, 0.2, 5.0]]
    assert propose(scores) == [CLIPPED[i] for i in (1, 3, 2, 4)]
    assert propose(scores, nms_threshold=0.9) == [CLIPPED[i] for i in (1, 3, 2, 4, 0)]
    assert propose(scores, min_size=3.0) == [CLIPPED[i] for i in (1, 2)]
    assert propose(scores, min_objectness=0.571) == [CLIPPED[i] for i in (1, 3, 2)]  # sigmoid(0.3) = 0.574
    assert propose(scores, min_objectness=0.99) == []
    assert propose(scores, post_nms_top_n=2) == [CLIPPED[i] for i in (1, 3)]


def test_top_n_before_nms_counts_for_each_level():
    # Level 0 holds the higher scores; level 1 still keeps its own best two.
    scores = [[9.0, 8.0, 7.0, 6.0], [0.4, 0.1, 0.3, 0.2]]
    assert propose(scores, pre_nms_top_n=2, nms_threshold=0.9) == [CLIPPED[i] for i in (0, 1, 0, 2)]


def test_duplicates_are_dropped_within_a_level_only():
    assert propose([[2.0, 1.0], [4.0, 3.0]]) == [CLIPPED[0], CLIPPED[0]]


def test_no_proposal_survives():
    found = propose([[1.0, 2.0]], boxes=BOXES[5:].expand(2, 6))
    assert torch.tensor(found).reshape(-1, 6).shape == (0, 6)


def test_images_of_a_batch_are_independent():
    objectness = [torch.tensor([[0.1, 0.2, 0.3], [3.0, -1.0, 2.0]])]
    deltas = [torch.zeros(2, 3, 6)]
    first, second = select_proposals(
        objectness, deltas, [BOXES[2:5]], SIZE, pre_nms_top_n=2, post_nms_top_n=9, nms_threshold=0.5
    )
    assert first.tolist() == [CLIPPED[4], CLIPPED[3]]
    assert second.tolist() == [CLIPPED[2], CLIPPED[4]]


def test_proposals_carry_no_gradient():
    objectness = [torch.rand(1, 3, requires_grad=True)]
    deltas = [torch.zeros(1, 3, 6, requires_grad=True)]
    (found,) = select_proposals(
        objectness, deltas, [BOXES[2:5]], SIZE, pre_nms_top_n=3, post_nms_top_n=3, nms_threshold=0.5
    )
    assert not found.requires_grad
