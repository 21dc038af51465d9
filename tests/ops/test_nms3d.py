import naive_oracle
import pytest
import torch
from monai.data.box_utils import non_max_suppression
from nms3d_cases import crowd

from seg3d_monai.ops import batched_nms3d, nms3d

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_naive_loop(dtype, threshold):
    boxes, scores, group = crowd(150)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    assert nms3d(boxes, scores, threshold).tolist() == naive_oracle.nms(boxes, scores, [0] * 150, threshold)
    assert batched_nms3d(boxes, scores, group, threshold).tolist() == naive_oracle.nms(
        boxes, scores, group.tolist(), threshold
    )


def test_more_boxes_than_one_block_of_the_reference():
    boxes, scores, group = crowd(1100, seed=4, spread=(20.0, 40.0, 60.0))
    assert batched_nms3d(boxes, scores, group, 0.2).tolist() == naive_oracle.nms(boxes, scores, group.tolist(), 0.2)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hand_counted_chain(axis):
    # Five boxes 2 x 3 x 4 moved by a quarter of their extent along one axis: neighbours have IoU 3/5, next ones 1/3.
    extent = torch.tensor([2.0, 3.0, 4.0])
    low = torch.zeros(5, 3)
    low[:, axis] = torch.arange(5) * extent[axis] / 4
    boxes = torch.cat([low, low + extent], 1)
    scores = torch.tensor([0.1, 0.9, 0.8, 0.7, 0.2])
    assert nms3d(boxes, scores, 0.5).tolist() == [1, 3]
    # Box 1 drops 0 and 2; box 3 has IoU 1/3 with it, box 4 has 1/7.
    assert nms3d(boxes, scores, 0.3).tolist() == [1, 4]
    assert nms3d(boxes, scores, 0.6).tolist() == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_iou_at_the_threshold_is_kept(dtype):
    boxes = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 0, 1, 3, 2]], dtype=dtype)  # 2 of 6 voxels
    scores = torch.tensor([0.5, 0.6])
    assert nms3d(boxes, scores, 1 / 3).tolist() == [1, 0]
    assert nms3d(boxes, scores, 1 / 3 - 1e-9).tolist() == [1]


def test_ties_go_to_the_lower_index():
    boxes = torch.tensor([[0.0, 0.0, 0.0, 2.0, 3.0, 4.0]]).repeat(6, 1) + torch.tensor([[0], [9], [0], [9], [0], [30]])
    scores = torch.full((6,), 0.5)
    assert nms3d(boxes, scores, 0.5).tolist() == [0, 1, 5]
    assert nms3d(boxes, scores, 1.0).tolist() == [0, 1, 2, 3, 4, 5]
    scores[4] = 0.6
    assert nms3d(boxes, scores, 0.5).tolist() == [4, 1, 5]


def test_an_empty_box_neither_drops_nor_is_dropped():
    boxes = torch.tensor(
        [[0, 0, 0, 2, 3, 4], [0, 0, 0, 2, 3, 4], [1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2], [1, 2, 1, 2, 1, 2]],
        dtype=torch.float32,
    )
    scores = torch.tensor([0.5, 0.4, 0.9, 0.8, 0.1])
    assert nms3d(boxes, scores, 0.0).tolist() == [2, 3, 0, 4]


def test_touching_boxes_do_not_overlap():
    boxes = torch.tensor([[0, 0, 0, 2, 3, 4], [2, 0, 0, 4, 3, 4], [0, 3, 0, 2, 6, 4.0]])
    assert nms3d(boxes, torch.tensor([0.1, 0.2, 0.3]), 0.0).tolist() == [2, 1, 0]


def test_large_coordinates_keep_their_precision():
    boxes = torch.tensor([[0, 0, 0, 2, 3, 4], [1, 0, 0, 3, 3, 4]], dtype=torch.float32) + 2.0**22
    assert nms3d(boxes, torch.tensor([0.9, 0.8]), 0.34).tolist() == [0, 1]
    assert nms3d(boxes, torch.tensor([0.9, 0.8]), 0.33).tolist() == [0]


def test_one_long_box_among_short_ones():
    boxes, scores, _ = crowd(120, seed=8)
    boxes[60] = torch.tensor([0.0, 0.0, -500.0, 12.0, 36.0, 500.0])
    for score in (0.0, 100.0):
        scores[60] = score
        assert nms3d(boxes, scores, 0.01).tolist() == naive_oracle.nms(boxes, scores, [0] * 120, 0.01)


def random_scores(count, seed):
    """Scores with ties, infinities and both zeros."""
    scores = torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(4).round() / 4
    scores[::11], scores[1::17], scores[2::19] = 0.0, torch.inf, -torch.inf
    return torch.where((scores == 0) & (torch.arange(count) % 2 == 1), -0.0, scores)


def hard_layouts():
    """Names and boxes (float64, [120, 6]) of layouts that spoil a grid, a sweep or a recursion."""
    generator = torch.Generator().manual_seed(11)

    def uniform(low, high):
        return low + (high - low) * torch.rand(120, 3, generator=generator, dtype=torch.float64)

    centres, sides = uniform(0.0, 50.0) * torch.tensor([0.4, 1.0, 1.3]), uniform(5.0, 25.0)
    index = torch.arange(120, dtype=torch.float64)[:, None]
    one_long_axis = torch.where(index.long() % 3 == torch.arange(3), 300.0, 3.0)
    outliers = centres.clone()
    outliers[::40] = torch.tensor([[1e30, -1e30, 1e6]], dtype=torch.float64)
    one_huge = sides.clone()
    one_huge[70] = 1e4
    layouts = {
        "crowded": (centres, sides),
        "identical": (torch.ones(120, 3), torch.full((120, 3), 4.0)),
        "concentric": (torch.zeros(120, 3), sides),
        "one huge": (centres, one_huge),
        "three decades": (centres, 10 ** uniform(-0.5, 2.5)),
        "three decades, cubes": (centres, 10 ** uniform(-0.5, 2.5)[:, :1].expand(120, 3)),
        "thirty decades": (centres, 10 ** uniform(-15.0, 15.0)),
        "flat": (centres * torch.tensor([0.0, 1.0, 1.0]), sides * torch.tensor([0.01, 1.0, 1.0])),
        "long": (centres, one_long_axis + uniform(0.0, 1.0)),
        "outliers": (outliers, sides),
        "far away": (centres + torch.tensor([-1e6, 1e6, 1e6]), sides),
        "very large": (centres * 1e30, sides * 1e30),
        "very small": (centres * 1e-30, sides * 1e-30),
        "volumes near underflow": (centres * 1e-104, sides * 1e-104),
        "diagonal": (index.expand(120, 3) * 3, sides),
        "two clumps": (torch.where(index % 2 == 0, 0.0, 4.0).expand(120, 3), torch.full((120, 3), 16.0)),
        "clusters": (uniform(0.0, 2.0) + 100 * (index % 3), torch.full((120, 3), 16.0)),
    }
    return {name: torch.cat([c - s / 2, c + s / 2], 1).double() for name, (c, s) in layouts.items()}


@pytest.mark.parametrize("name", hard_layouts())
def test_hard_layouts_equal_the_naive_loop(name):
    boxes = hard_layouts()[name]
    group = torch.arange(120) * 7 % 2
    for seed, threshold in enumerate((0.0, 0.01, 0.1, 0.5, 0.9, 1.0)):
        scores = random_scores(120, seed)
        assert nms3d(boxes, scores, threshold).tolist() == naive_oracle.nms(boxes, scores, [0] * 120, threshold)
        assert batched_nms3d(boxes, scores, group, threshold).tolist() == naive_oracle.nms(
            boxes, scores, group.tolist(), threshold
        )


@pytest.mark.parametrize("seed", range(30))
def test_random_layouts_equal_the_naive_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 130, (), generator=generator))

    def draw(*choices):
        return choices[int(torch.randint(0, len(choices), (), generator=generator))]

    spread = torch.tensor([draw(0.0, 3.0, 30.0, 300.0) for _ in range(3)])
    decades = draw(0.0, 0.5, 2.0)
    extent = 10 ** (1 + decades * (torch.rand(count, draw(1, 3), generator=generator) - 0.5)).expand(count, 3)
    low = torch.rand(count, 3, generator=generator) * spread - extent / 2 + draw(0.0, 0.0, 4096.0)
    boxes = torch.cat([low, low + extent], 1).to(draw(torch.float64, torch.float32, torch.bfloat16))
    scores = random_scores(count, seed).to(draw(torch.float64, torch.float32, torch.float16))
    group = torch.randint(0, draw(1, 3, 40), (count,), generator=generator)
    threshold = draw(0.0, 0.02, 0.2, 0.5, 0.8)
    assert batched_nms3d(boxes, scores, group, threshold).tolist() == naive_oracle.nms(
        boxes, scores, group.tolist(), threshold
    )


def test_crossing_boxes_meet_although_they_differ_on_every_axis():
    # Two bars 1 x 9 x 9 and 9 x 1 x 9 have 9 of 153 voxels in common, and many others keep them from being a few.
    low = torch.tensor([[0.0, 0, 0], [-4, 4, 0]]).repeat(40, 1) + 100 * torch.arange(80)[:, None].div(2).floor()
    boxes = torch.cat([low, low + torch.tensor([[1.0, 9, 9], [9, 1, 9]]).repeat(40, 1)], 1)
    assert nms3d(boxes, -torch.arange(80.0), 0.058).tolist() == list(range(0, 80, 2))
    assert nms3d(boxes, -torch.arange(80.0), 9 / 153).tolist() == list(range(80))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("rising", [True, False])
def test_a_chain_through_all_boxes(kernels, axis, rising):
    # Neighbours have IoU 3/5, next ones 1/3, so every other box stays, counted from the best, which is at an end.
    count = 20001 if kernels == "compiled" else 301  # the reference is quadratic here
    low = torch.zeros(count, 3)
    low[:, axis] = torch.arange(count)
    boxes = torch.cat([low, low + 4], 1)
    scores = torch.arange(float(count)) * (1 if rising else -1)
    expected = list(range(count))[:: -2 if rising else 2]
    assert nms3d(boxes, scores, 0.5).tolist() == expected


def test_copies_of_a_scene_far_apart_do_not_see_each_other(kernels):
    boxes, _, _ = crowd(100, seed=3)
    boxes = boxes.mul(64).round().div(64).double()  # so that moving them by integers is exact
    generator = torch.Generator().manual_seed(5)
    num_deep = 3 if kernels == "compiled" else 1  # 6,000 boxes are enough for several threads
    offset = torch.cartesian_prod(torch.arange(num_deep) * 17, torch.arange(4) * 47, torch.arange(5) * 1000).double()
    copies = (boxes[None] + torch.cat([offset, offset], 1)[:, None]).reshape(-1, 6)
    scores = torch.rand(len(offset), 100, generator=generator)
    expected = [
        100 * copy + kept
        for copy, score in enumerate(scores)
        for kept in naive_oracle.nms(boxes, score, [0] * 100, 0.15)
    ]
    flat = scores.flatten()
    expected.sort(key=lambda i: (-flat[i].item(), i))
    assert nms3d(copies, flat, 0.15).tolist() == expected
    each_its_own = torch.arange(len(offset)).repeat_interleave(100)
    assert batched_nms3d(boxes.repeat(len(offset), 1), flat, each_its_own, 0.15).tolist() == expected


def test_each_box_its_own_group():
    boxes = torch.tensor([[0.0, 0.0, 0.0, 2.0, 3.0, 4.0]]).repeat(500, 1)
    scores = random_scores(500, 0)
    expected = sorted(range(500), key=lambda i: (-scores[i].item(), i))
    assert batched_nms3d(boxes, scores, torch.arange(500) * 3 - 700, 0.0).tolist() == expected


def test_zeros_of_both_signs_are_one_score_and_infinities_are_scores():
    boxes = torch.tensor([[0.0, 0.0, 0.0, 2.0, 3.0, 4.0]]).repeat(6, 1)
    scores = torch.tensor([-torch.inf, -0.0, 0.0, -0.0, torch.inf, torch.inf])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert nms3d(boxes, scores.to(dtype), 1.0).tolist() == [4, 5, 1, 2, 3, 0]
        assert nms3d(boxes, scores.to(dtype), 0.5).tolist() == [4]


def test_scores_keep_their_precision_beside_boxes_of_another_dtype():
    boxes = torch.tensor([[0.0, 0.0, 0.0, 2.0, 3.0, 4.0]]).repeat(3, 1)
    scores = torch.tensor([0.5, 0.5 + 1e-12, 0.5 - 1e-12], dtype=torch.float64)
    assert nms3d(boxes.half(), scores, 1.0).tolist() == [1, 0, 2]
    assert nms3d(boxes.double(), scores.float(), 1.0).tolist() == [0, 1, 2]


def test_zero_and_one_box():
    empty = nms3d(torch.zeros(0, 6), torch.zeros(0), 0.5)
    assert (empty.shape, empty.dtype) == ((0,), torch.int64)
    empty = batched_nms3d(torch.zeros(0, 6), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5)
    assert (empty.shape, empty.dtype) == ((0,), torch.int64)
    assert nms3d(torch.ones(1, 6), torch.ones(1), 0.5).tolist() == [0]


def test_groups_are_independent_and_come_out_together_by_score():
    boxes, scores, group = crowd(200, seed=2)
    group = (group - 2) * 2**40  # large and negative ids
    kept = batched_nms3d(boxes, scores, group, 0.2)
    separate = []
    for value in group.unique().tolist():
        members = (group == value).nonzero().squeeze(1)
        separate += members[nms3d(boxes[members], scores[members], 0.2)].tolist()
    assert kept.tolist() == sorted(separate, key=lambda i: (-scores[i].item(), i))
    assert torch.equal(batched_nms3d(boxes, scores, torch.full_like(group, 7), 0.2), nms3d(boxes, scores, 0.2))


def test_equals_monai():
    boxes, _, _ = crowd(60, seed=6)
    boxes = torch.cat([boxes[:, :3], torch.maximum(boxes[:, 3:], boxes[:, :3] + 0.5)], 1)
    scores = torch.rand(60, generator=torch.Generator().manual_seed(1))
    for threshold in (0.05, 0.3, 0.7):
        expected = non_max_suppression(boxes, scores, threshold)
        assert nms3d(boxes, scores, threshold).tolist() == expected.tolist()


def test_strided_inputs():
    boxes, scores, group = crowd(80)
    wide_boxes, wide_scores = torch.stack([boxes, boxes], 2)[..., 0], torch.stack([scores, scores], 1)[:, 0]
    wide_group = torch.stack([group, group], 1)[:, 0]
    expected = batched_nms3d(boxes, scores, group, 0.3)
    assert torch.equal(batched_nms3d(wide_boxes, wide_scores, wide_group, 0.3), expected)
    assert not any(tensor.is_contiguous() for tensor in (wide_boxes, wide_scores, wide_group))


def test_inputs_that_require_gradients_are_taken_as_values():
    boxes, scores, _ = crowd(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = nms3d(boxes.clone().requires_grad_(), scores.clone().requires_grad_(), 0.3)
    assert torch.equal(kept, nms3d(boxes, scores, 0.3))
    assert not kept.requires_grad


def test_the_operators_pass_torchs_own_checks():
    boxes, scores, group = crowd(12)
    torch.library.opcheck(torch.ops.seg3d.nms3d.default, (boxes, scores, 0.3))
    torch.library.opcheck(torch.ops.seg3d.batched_nms3d.default, (boxes, scores, group, 0.3))


def test_compiles_without_a_graph_break():
    boxes, scores, group = crowd(40)

    def kept_boxes(boxes, scores, group):
        return boxes[batched_nms3d(boxes, scores, group, 0.3)] + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(kept_boxes, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(boxes, scores, group), kept_boxes(boxes, scores, group))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"boxes": [[0, 0, 0, 1, 1, 1]]}, TypeError, "boxes must be a torch.Tensor"),
        ({"boxes": torch.zeros(3, 6, dtype=torch.int64)}, TypeError, "boxes must be .* got torch.int64"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must have the shape \[K, 6\]"),
        ({"boxes": torch.full((3, 6), torch.nan)}, ValueError, r"boxes\[0\] = .*not finite"),
        ({"scores": torch.zeros(3, 1)}, ValueError, r"scores must have the shape \[N\]"),
        ({"scores": torch.zeros(2)}, ValueError, "scores must have one entry per box, got 2 for 3 boxes"),
        ({"scores": torch.tensor([0.0, torch.nan, 1.0])}, ValueError, r"scores\[1\] is NaN"),
        ({"scores": torch.zeros(3, device="meta")}, ValueError, "move them to one device"),
        ({"group": torch.zeros(3)}, TypeError, "group must be int64"),
        ({"group": torch.zeros(2, dtype=torch.int64)}, ValueError, "group must have one entry per box"),
        ({"iou_threshold": 1.5}, ValueError, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"iou_threshold": float("nan")}, ValueError, r"iou_threshold must be in \[0, 1\]"),
        ({"iou_threshold": "0.5"}, TypeError, "iou_threshold must be a float"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {
        "boxes": torch.zeros(3, 6),
        "scores": torch.zeros(3),
        "group": torch.zeros(3, dtype=torch.int64),
        "iou_threshold": 0.5,
        **changes,
    }
    with pytest.raises(error, match=message):
        batched_nms3d(**arguments)
    if "group" not in changes:
        del arguments["group"]
        with pytest.raises(error, match=message):
            nms3d(**arguments)


def test_the_bare_operator_refuses_values_that_are_not_numbers():
    with pytest.raises((RuntimeError, ValueError), match="boxes must be finite"):
        torch.ops.seg3d.nms3d(torch.full((2, 6), torch.nan), torch.zeros(2), 0.5)
    with pytest.raises((RuntimeError, ValueError), match="scores must not be NaN"):
        torch.ops.seg3d.nms3d(torch.zeros(2, 6), torch.full((2,), torch.nan), 0.5)
