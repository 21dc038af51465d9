"""Query selection: the planted tokens, their boxes; tight boxes of masks against blocks set by hand."""

import math

import numpy as np
import pytest
import torch

from seg3d_monai.decoders.query_selection import QuerySelection, mask_boxes, refine_boxes
from seg3d_monai.layers import PixelDecoderOutput

# Two levels of an image of 6 x 10 x 14 voxels; sizes are ceil(size / stride).
SIZES = [(6, 5, 7), (3, 3, 4)]
STRIDES = [(1, 2, 2), (2, 4, 4)]
TOKENS = 6 * 5 * 7 + 3 * 3 * 4
CHANNELS = 8


def centres():
    rows = [
        [(z + 0.5) * sz, (y + 0.5) * sy, (x + 0.5) * sx]
        for (d, h, w), (sz, sy, sx) in zip(SIZES, STRIDES, strict=True)
        for z in range(d)
        for y in range(h)
        for x in range(w)
    ]
    return torch.tensor(rows)


def make(num_queries, num_classes=2, anchor_cells=4.0):
    torch.manual_seed(0)
    return QuerySelection(
        channels=CHANNELS, num_classes=num_classes, num_queries=num_queries, anchor_cells=anchor_cells
    )


def see_through(num_queries, **settings):
    """A selection whose logit of class k is channel k of the token's direction: a planted token wins."""
    chosen = make(num_queries, **settings)
    chosen.selection.project[0].weight.data = torch.eye(CHANNELS)
    chosen.selection.project[0].bias.data.zero_()
    chosen.selection.class_logits.weight.data = torch.eye(2, CHANNELS)
    return chosen


def row(level, z, y, x):
    _, h, w = SIZES[level]
    return (0 if level == 0 else 6 * 5 * 7) + (z * h + y) * w + x


def plant(cells, images=1):
    """Memory of unit noise-free tokens along channel 5; planted ones (row -> class) along their class's channel."""
    memory = torch.zeros(images, TOKENS, CHANNELS)
    memory[..., 5] = 1.0
    for image, token, label, share in cells:
        memory[image, token, 5] = 1 - share
        memory[image, token, label] = share
    return memory


def decoded(memory, padding=None):
    """The memory as a pixel decoder hands it on."""
    counts = [d * h * w for d, h, w in SIZES]
    levels = [m.transpose(1, 2).unflatten(2, n) for m, n in zip(memory.split(counts, 1), SIZES, strict=True)]
    if padding is not None:
        padding = [p.unflatten(1, n) for p, n in zip(padding.split(counts, 1), SIZES, strict=True)]
    return PixelDecoderOutput(levels, SIZES, STRIDES, padding, torch.zeros(len(memory), 1, 6, 10, 14), (1, 1, 1))


def select(selection, memory, padding=None):
    return selection(decoded(memory, padding))


def ranked(scores):
    """Rows of one image's scores [S], best first: those that none of the 26 around them beats before all others."""

    def is_peak(level, z, y, x):
        d, h, w = SIZES[level]
        around = [
            scores[row(level, a, b, c)]
            for a in range(max(z - 1, 0), min(z + 2, d))
            for b in range(max(y - 1, 0), min(y + 2, h))
            for c in range(max(x - 1, 0), min(x + 2, w))
        ]
        return scores[row(level, z, y, x)] >= max(around)

    peaks = {row(i, *cell) for i, size in enumerate(SIZES) for cell in np.ndindex(*size) if is_peak(i, *cell)}
    return sorted(range(TOKENS), key=lambda i: (i not in peaks, -scores[i]))


def test_planted_tokens_are_chosen_best_first_with_boxes_around_their_cells():
    cells = [(0, row(0, 5, 1, 6), 1, 0.9), (0, row(1, 2, 0, 3), 0, 0.99), (1, row(1, 0, 2, 1), 1, 0.9)]
    found, boxes = select(see_through(2), plant(cells, images=2))
    # Cell (2, 0, 3) of level 1 is centred on (5, 2, 14); its base box is four cells of (2, 4, 4) voxels.
    assert boxes[0, 0].tolist() == [1, -6, 6, 9, 10, 22]
    # Cell (5, 1, 6) of level 0 on (5.5, 3, 13), four cells of (1, 2, 2).
    assert boxes[0, 1].tolist() == [3.5, -1, 9, 7.5, 7, 17]
    assert boxes[1, 0].tolist() == [-3, 2, -2, 5, 18, 14]
    assert found.centres[0].tolist() == [[5, 2, 14], [5.5, 3, 13]]
    assert found.extents[0].tolist() == [[8, 16, 16], [4, 8, 8]]
    assert found.class_logits[0].argmax(-1).tolist() == [0, 1]
    assert found.class_logits[1, 0].argmax(-1).item() == 1
    assert found.class_logits.dtype == boxes.dtype == torch.float32
    assert found.tokens.shape == (2, 2, CHANNELS)


def test_of_the_tokens_of_one_object_the_best_comes_before_the_worst_object():
    """One bright object over 27 cells and a dim one: two queries see both, in spite of 26 brighter tokens."""
    bright = [(0, row(0, z, y, x), 0, 0.9 + 0.01 * (z + y + x)) for z in range(3) for y in range(3) for x in range(3)]
    dim = row(0, 5, 4, 6)
    found, _ = select(see_through(2), plant([*bright, (0, dim, 1, 0.5)]))
    assert found.centres[0].tolist() == [[2.5, 5, 5], [5.5, 9, 13]]


@pytest.mark.parametrize("anchor_cells", [1.0, 2.5])
def test_base_boxes_have_the_stated_extent(anchor_cells):
    _, boxes = select(make(TOKENS, anchor_cells=anchor_cells), torch.randn(1, TOKENS, CHANNELS))
    extents = boxes[0, :, 3:] - boxes[0, :, :3]
    wanted = {tuple(s * anchor_cells for s in stride) for stride in STRIDES}
    assert {tuple(e) for e in extents.tolist()} == wanted


def test_logits_and_tokens_belong_to_the_chosen_tokens():
    module = make(40)
    memory = torch.randn(2, TOKENS, CHANNELS)
    found, _ = select(module, memory)
    everything = module.selection.class_logits(module.selection.project(memory))
    torch.testing.assert_close(found.scored["class_logits"], everything)
    assert torch.equal(found.scored["centres"], centres())
    for n in range(2):
        best = ranked(everything[n].amax(1).tolist())[:40]
        torch.testing.assert_close(found.class_logits[n], everything[n, best])
        torch.testing.assert_close(found.tokens[n], module.selection.project(memory[n, best]))
        torch.testing.assert_close(found.centres[n], centres()[best])


def test_box_deltas_move_the_base_box_by_its_extent():
    selection = see_through(1)
    with torch.no_grad():
        selection.box_deltas.layers[-1].bias.copy_(torch.tensor([0.5, 0, -0.25, 0, math.log(2), math.log(0.5)]))
    _, boxes = select(selection, plant([(0, row(0, 5, 1, 6), 1, 0.9)]))
    # Centre (5.5, 3, 13) and extent (4, 8, 8) -> centre (7.5, 3, 11), extent (4, 16, 4).
    torch.testing.assert_close(boxes[0, 0], torch.tensor([5.5, -5, 9, 9.5, 11, 13]))


def test_padding_is_never_chosen():
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    best = row(0, 5, 1, 6)
    padding[0, best] = True
    padding[1, 3:] = True
    memory = plant([(0, best, 1, 0.99), (0, row(0, 0, 0, 0), 0, 0.9), (1, 1, 0, 0.99), (1, 2, 0, 0.9)], images=2)
    _, boxes = select(see_through(6), memory, padding)
    assert boxes[0, 0].tolist() == [-1.5, -3, -3, 2.5, 5, 5]
    # Only three tokens of the second image are inside it: the last one is repeated.
    z, y, x = 0.5, 1.0, 1.0
    order = [(z, y, x + 2), (z, y, x + 4)] + [(z, y, x)] * 4
    wanted = [[a - 2, b - 4, c - 4, a + 2, b + 4, c + 4] for a, b, c in order]
    assert boxes[1].tolist() == wanted


def test_a_token_in_the_padding_hides_no_other():
    padding = torch.zeros(1, TOKENS, dtype=torch.bool)
    padding[0, row(0, 5, 1, 6)] = True
    memory = plant([(0, row(0, 5, 1, 6), 1, 0.99), (0, row(0, 5, 1, 5), 1, 0.9)])
    found, _ = select(see_through(1), memory, padding)
    assert found.centres[0].tolist() == [[5.5, 3, 11]]


def test_nothing_but_padding_still_gives_boxes():
    _, boxes = select(make(4), torch.randn(1, TOKENS, CHANNELS), torch.ones(1, TOKENS, dtype=torch.bool))
    assert boxes.shape == (1, 4, 6)
    assert boxes.isfinite().all()


def test_more_queries_than_tokens_takes_every_token_once():
    found, _ = select(make(TOKENS + 100), torch.randn(1, TOKENS, CHANNELS))
    assert sorted(found.centres[0].tolist()) == sorted(centres().tolist())


def test_every_parameter_and_the_memory_have_a_gradient():
    selection = make(4)
    for parameter in selection.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    memory = torch.randn(2, TOKENS, CHANNELS, requires_grad=True)
    found, boxes = select(selection, memory)
    (found.tokens.square().sum() + found.class_logits.sum() + boxes.sum()).backward()
    for name, parameter in selection.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert (memory.grad.abs().sum(-1) > 0).sum(1).tolist() == [4, 4]
    # The scores of all tokens can be trained.
    memory.grad = None
    select(selection, memory)[0].scored["class_logits"].square().sum().backward()
    assert (memory.grad.abs().sum(-1) > 0).all()


def test_every_parameter_has_a_gradient_under_autocast():
    selection = make(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, boxes = select(selection, torch.randn(1, TOKENS, CHANNELS))
    assert found.class_logits.dtype == boxes.dtype == found.scored["class_logits"].dtype == torch.float32
    (found.class_logits.sum() + boxes.sum()).backward()
    assert selection.selection.project[0].weight.grad.abs().sum() > 0


def test_first_probability_is_one_percent():
    head = make(4, num_classes=3).selection.class_logits
    torch.testing.assert_close(head.bias, torch.full((3,), -math.log(99)))


def test_refined_boxes_against_the_formula():
    torch.manual_seed(0)
    deltas, lower, extent = torch.randn(7, 5, 6), torch.randn(7, 5, 3) * 9, torch.rand(7, 5, 3) * 20 + 1
    found = refine_boxes(deltas, torch.cat([lower, lower + extent], -1))
    d, e = deltas.double(), extent.double()
    middle = lower.double() + e / 2 + d[..., :3] * e
    half = d[..., 3:].exp() * e / 2
    torch.testing.assert_close(found.double(), torch.cat([middle - half, middle + half], -1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shrink", [-5.0, -1000.0])
def test_extents_stay_positive_and_can_grow_again(shrink):
    boxes = torch.tensor([[500.0, 900, 2000, 500, 902, 2004]])
    deltas = torch.tensor([[0.0, 0, 0, shrink, shrink, shrink]])
    for _ in range(12):
        boxes = refine_boxes(deltas, boxes)
        assert (boxes[:, 3:] > boxes[:, :3]).all()
    grown = refine_boxes(torch.full((1, 6), math.log(30)), boxes)
    torch.testing.assert_close(grown[:, 3:] - grown[:, :3], torch.full((1, 3), 30.0), atol=0.01, rtol=0)


# -- boxes of masks

STRIDE = (1, 2, 3)
CELLS = (6, 5, 7)
EVERYWHERE = torch.tensor([[0.0, 0, 0, 6, 10, 21]])


def block_features(blocks, images=1):
    """Features whose channel i is +1 in block i and -1 elsewhere."""
    features = -torch.ones(images, len(blocks), *CELLS)
    for i, (z1, y1, x1, z2, y2, x2) in enumerate(blocks):
        features[:, i, z1:z2, y1:y2, x1:x2] = 1
    return features


BLOCKS = [(1, 2, 3, 4, 3, 7), (0, 0, 0, 6, 5, 7), (5, 4, 0, 6, 5, 1), (2, 1, 2, 3, 4, 4)]


@pytest.mark.parametrize("chunk", [1, 2 * 6 * 5 * 7, 1 << 24])
def test_boxes_of_blocks_in_voxels(chunk, monkeypatch):
    monkeypatch.setattr("seg3d_monai.decoders.query_selection.CHUNK", chunk)
    features = block_features(BLOCKS)
    found = mask_boxes(torch.eye(4)[None] * 3, features, STRIDE, EVERYWHERE.expand(1, 4, 6))
    wanted = [[b * s for b, s in zip(block, STRIDE * 2, strict=True)] for block in BLOCKS]
    assert found[0].tolist() == wanted
    assert found.dtype == torch.float32


def test_a_mask_of_two_pieces_has_one_box_and_an_empty_mask_keeps_its_own():
    features = block_features([(0, 0, 0, 1, 2, 1), (4, 3, 5, 5, 4, 6)], images=2)
    # 2a + b + 1 is positive where either piece is, -(a + b) - 3 nowhere; a constant channel makes the sums.
    features = torch.cat([features, torch.ones(2, 1, *CELLS)], 1)
    embeds = torch.tensor([[[1.0, 1, 1], [-1, -1, -3]], [[0, 0, 0], [0, 1, 0]]])
    boxes = torch.cat([EVERYWHERE, EVERYWHERE * 0.9]).expand(2, 2, 6)
    found = mask_boxes(embeds, features, STRIDE, boxes)
    assert found[0, 0].tolist() == [0, 0, 0, 5, 8, 18]
    assert torch.equal(found[0, 1], boxes[0, 1])
    assert torch.equal(found[1, 0], boxes[1, 0])  # logits of exactly 0 are outside
    assert found[1, 1].tolist() == [4, 6, 15, 5, 8, 18]


def test_only_the_mask_around_the_predicted_box_counts():
    """Cells whose centre is less than one extent from the box's centre, by hand, on masks that are everywhere."""
    features = torch.ones(1, 1, *CELLS)
    boxes = torch.tensor(
        [
            [
                2.0,
                4,
                6,
                3,
                6,
                12,
            ],  # z within 1 of 2.5, y within 2 of 5, x within 6 of 9, where cells are centred at 7.5
            [-3.0, 8, 15, 1, 14, 18],  # z within 4 of -1, y within 6 of 11, x within 3 of 16.5
            [30.0, 4, 6, 33, 6, 12],  # outside
        ]
    )
    found = mask_boxes(torch.ones(1, 3, 1), features, STRIDE, boxes[None])
    assert found[0].tolist() == [[2, 4, 3, 3, 6, 15], [0, 6, 15, 3, 10, 18], [30, 4, 6, 33, 6, 12]]


def test_an_object_elsewhere_does_not_count():
    features = block_features([(1, 1, 1, 3, 2, 2)])
    features[:, :, 5, 4, 6] = 1
    near = torch.tensor([[0.0, 1, 2, 3, 5, 7]])
    found = mask_boxes(torch.ones(1, 2, 1), features, STRIDE, torch.stack([near, near + 30], 1))
    assert found[0].tolist() == [[1, 2, 3, 3, 4, 6], (near[0] + 30).tolist()]


def test_masks_that_are_not_finite_keep_their_box():
    embeds = torch.full((1, 1, 4), torch.nan)
    assert torch.equal(mask_boxes(embeds, block_features(BLOCKS), STRIDE, EVERYWHERE[None]), EVERYWHERE[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boxes_of_masks_against_a_loop(dtype):
    torch.manual_seed(0)
    features = torch.randn(2, 4, *CELLS).to(dtype)
    embeds, boxes = torch.randn(2, 9, 4), torch.rand(2, 9, 6) * 9
    boxes[..., 3:] += boxes[..., :3]
    logits = torch.stack([(embeds[n].to(dtype) @ features[n].flatten(1)).view(9, *CELLS) for n in range(2)])
    found = mask_boxes(embeds, features.to(memory_format=torch.channels_last_3d), STRIDE, boxes)
    kept = 0
    for n in range(2):
        for q in range(9):
            cells = (logits[n, q] > 0).nonzero()
            away = ((cells + 0.5) * torch.tensor(STRIDE) - (boxes[n, q, :3] + boxes[n, q, 3:]) / 2).abs()
            cells = cells[(away < boxes[n, q, 3:] - boxes[n, q, :3]).all(1)]
            if len(cells):
                box = torch.cat([cells.amin(0), cells.amax(0) + 1]) * torch.tensor(STRIDE * 2)
                assert found[n, q].tolist() == box.tolist()
            else:
                kept += 1
                assert torch.equal(found[n, q], boxes[n, q])
    assert 0 < kept < 9


def test_boxes_of_masks_carry_no_gradient():
    embeds = torch.randn(1, 4, 4, requires_grad=True)
    boxes = torch.zeros(1, 4, 6, requires_grad=True)
    assert not mask_boxes(embeds, block_features(BLOCKS).requires_grad_(), STRIDE, boxes).requires_grad


def test_no_query():
    found = mask_boxes(torch.zeros(2, 0, 4), block_features(BLOCKS, images=2), STRIDE, torch.zeros(2, 0, 6))
    assert found.shape == (2, 0, 6)
