"""Costs against NumPy loops in float64; assignments against all permutations."""

from itertools import permutations

import numpy as np
import pytest
import torch
from set_targets import EMPTY_AND_IGNORED, MANY, NONE, ONE, SIZE, STRIDE, crowd, draw_predictions

from seg3d_monai.matching import HungarianMatcher, point_features, sample_points
from seg3d_monai.matching.hungarian import UNMATCHED

WEIGHTS = {
    "class_weight": 2.0,
    "mask_bce_weight": 3.0,
    "mask_dice_weight": 5.0,
    "box_l1_weight": 7.0,
    "box_giou_weight": 1.5,
}
BATCH = [NONE, MANY, ONE]


def make_matcher(**changes):
    return HungarianMatcher(**(WEIGHTS | changes))


def look(predictions, targets, seed=0, num_uniform=23, num_own=11):
    torch.manual_seed(seed)
    points = [sample_points(target, num_uniform=num_uniform, num_own=num_own) for target in targets]
    maps = predictions["mask_features"].detach()
    features = [point_features(maps[n], STRIDE, p.coordinates) for n, p in enumerate(points)]
    return points, features


def class_cost(logits, wanted, kind):
    if kind == "softmax":
        exponent = np.exp(logits - logits.max())
        return -exponent[wanted] / exponent.sum()
    prob = 1 / (1 + np.exp(-logits[wanted]))
    positive = 0.25 * (1 - prob) ** 2 * -np.log(prob + 1e-8)
    return positive - 0.75 * prob**2 * -np.log(1 - prob + 1e-8)


def mask_cost(logits, truth):
    """Of the points that are not ignored."""
    prob = 1 / (1 + np.exp(-logits))
    bce = -(truth * np.log(prob) + (1 - truth) * np.log(1 - prob))
    dice = 1 - (2 * (prob * truth).sum() + 1) / (prob.sum() + truth.sum() + 1)
    return bce.sum() / max(1, len(truth)), dice


def box_cost(box, truth):
    size = np.array([*SIZE, *SIZE])
    numbers = [np.concatenate([(b[:3] + b[3:]) / 2, b[3:] - b[:3]]) / size for b in (box, truth)]
    shared = np.prod([max(0, min(box[a + 3], truth[a + 3]) - max(box[a], truth[a])) for a in range(3)])
    hull = np.prod([max(box[a + 3], truth[a + 3]) - min(box[a], truth[a]) for a in range(3)])
    union = np.prod(box[3:] - box[:3]) + np.prod(truth[3:] - truth[:3]) - shared
    return np.abs(numbers[0] - numbers[1]).sum(), -(shared / union - (hull - union) / hull)


def naive_costs(predictions, targets, points, features, kind="focal", with_boxes=True):
    """[L, Q, G] of each image, one pair at a time."""
    arrays = {key: value.detach().double().numpy() for key, value in predictions.items()}
    num_layers, _, num_queries = arrays["class_logits"].shape[:3]
    costs = []
    for n, target in enumerate(targets):
        cost = np.zeros((num_layers, num_queries, len(target["ids"])))
        at = features[n].double().numpy()
        values = points[n].values.numpy()
        for layer, q, g in np.ndindex(cost.shape):
            own = points[n].num_uniform + g * points[n].num_own
            rows = np.r_[0 : points[n].num_uniform, own : own + points[n].num_own]
            rows = rows[values[rows] != -1]
            truth = (values[rows] == target["ids"][g].item()).astype(float)
            logits = at[rows] @ arrays["mask_embeds"][layer, n, q]
            bce, dice = mask_cost(logits, truth)
            wanted = target["classes"][g].item()
            cost[layer, q, g] = 2 * class_cost(arrays["class_logits"][layer, n, q], wanted, kind) + 3 * bce + 5 * dice
            if with_boxes:
                l1, giou = box_cost(arrays["boxes"][layer, n, q], target["boxes"][g].double().numpy())
                cost[layer, q, g] += 7 * l1 + 1.5 * giou
        costs.append(cost)
    return costs


@pytest.mark.parametrize(("kind", "num_logits"), [("focal", 3), ("softmax", 4)])
@pytest.mark.parametrize("with_boxes", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 200, 2**20])
def test_costs_equal_a_naive_loop(kind, num_logits, with_boxes, chunk_size):
    targets = [*BATCH, EMPTY_AND_IGNORED]
    predictions = draw_predictions(2, targets, 6, num_logits=num_logits)
    changes = {} if with_boxes else {"box_l1_weight": 0.0, "box_giou_weight": 0.0}
    if not with_boxes:
        del predictions["boxes"]
    points, features = look(predictions, targets)
    assert not points[1].valid.all()
    matcher = make_matcher(class_cost=kind, chunk_size=chunk_size, **changes)
    found = matcher.costs(predictions, targets, points, features, SIZE)
    wanted = naive_costs(predictions, targets, points, features, kind, with_boxes)
    assert len(found) == len(wanted)
    for cost, truth in zip(found, wanted, strict=True):
        assert cost.shape == truth.shape
        np.testing.assert_allclose(cost.numpy(), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("num_uniform", "num_own"), [(30, 0), (0, 9)])
def test_costs_with_one_kind_of_points_only(num_uniform, num_own):
    predictions = draw_predictions(1, BATCH, 4)
    points, features = look(predictions, BATCH, num_uniform=num_uniform, num_own=num_own)
    found = make_matcher().costs(predictions, BATCH, points, features, SIZE)
    for cost, truth in zip(found, naive_costs(predictions, BATCH, points, features), strict=True):
        np.testing.assert_allclose(cost.numpy(), truth, rtol=1e-9, atol=1e-9)


def test_costs_are_float32_under_autocast():
    predictions = {k: v.detach().float() for k, v in draw_predictions(2, BATCH, 6).items()}
    points, features = look(predictions, BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_matcher().costs(predictions, BATCH, points, features, SIZE)
    for cost, truth in zip(found, naive_costs(predictions, BATCH, points, features), strict=True):
        assert cost.dtype == torch.float32
        np.testing.assert_allclose(cost.numpy(), truth, rtol=1e-4, atol=1e-4)


def test_large_logits_cost_what_they_are():
    """A sure and wrong mask costs its logit; below -80 the cost of a sure one stays at 80."""
    predictions = draw_predictions(1, [ONE], 4, channels=1, dtype=torch.float32)
    points, _ = look(predictions, [ONE])
    predictions["mask_embeds"] = torch.tensor([50.0, -50, 3000, -3000]).view(1, 1, 4, 1)
    only_bce = dict.fromkeys(WEIGHTS, 0.0) | {"mask_bce_weight": 1.0}
    features = torch.ones(len(points[0].values), 1)
    cost = make_matcher(**only_bce).costs(predictions, [ONE], points, [features], SIZE)[0].flatten()
    inside = points[0].occupancy.mean().item()
    wanted = [50 * (1 - inside), 50 * inside, 3000 * (1 - inside), 80 * inside]
    torch.testing.assert_close(cost, torch.tensor(wanted), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("num_queries", "seed"), [(5, 0), (5, 1), (4, 2), (3, 3), (2, 4), (1, 5)])
def test_the_assignment_is_the_best_of_all(num_queries, seed):
    """Four instances: more queries than that, as many, fewer."""
    targets = [MANY, NONE, ONE]
    predictions = draw_predictions(3, targets, num_queries, seed=seed)
    points, features = look(predictions, targets, seed)
    matched = make_matcher()(predictions, targets, points, features, SIZE)
    assert matched.shape == (3, 3, num_queries)
    assert matched.dtype == torch.int64
    costs = naive_costs(predictions, targets, points, features)
    for layer, n in np.ndindex(3, 3):
        cost, row = costs[n][layer], matched[layer, n].tolist()
        num_instances = cost.shape[1]
        pairs = [(q, g) for q, g in enumerate(row) if g != UNMATCHED]
        assert len(pairs) == len({g for _, g in pairs}) == min(num_queries, num_instances)
        if num_queries >= num_instances:
            choices = (
                zip(p, range(num_instances), strict=True) for p in permutations(range(num_queries), num_instances)
            )
        else:
            choices = (zip(range(num_queries), p, strict=True) for p in permutations(range(num_instances), num_queries))
        best = min(sum(cost[q, g] for q, g in choice) for choice in choices)
        assert sum(cost[q, g] for q, g in pairs) == pytest.approx(best)


def test_far_more_instances_than_queries():
    targets = [crowd(300), NONE, MANY]
    predictions = draw_predictions(2, targets, 10)
    points, features = look(predictions, targets, num_own=3)
    matched = make_matcher()(predictions, targets, points, features, SIZE)
    assert (matched[:, 0] >= 0).all()
    assert all(len(row.unique()) == 10 for row in matched[:, 0])
    assert (matched[:, 1] == UNMATCHED).all()
    assert ((matched[:, 2] >= 0).sum(1) == 4).all()


def test_a_query_that_predicts_an_instance_gets_it():
    predictions = draw_predictions(1, [MANY], 9)
    points, _ = look(predictions, [MANY])
    num_points = len(points[0].values)
    # Features that are one-hot in the label, embeds that read one label each: perfect masks, without class and box.
    ids = MANY["ids"].tolist()
    features = torch.stack([(points[0].values == i).double() * 20 - 10 for i in ids], 1)
    assert features.shape == (num_points, 4)
    embeds = torch.zeros(1, 1, 9, 4, dtype=torch.float64)
    for g, q in enumerate([8, 2, 5, 0]):
        embeds[0, 0, q, g] = 1
    predictions["mask_embeds"] = embeds
    only_masks = dict.fromkeys(WEIGHTS, 0.0) | {"mask_bce_weight": 1.0, "mask_dice_weight": 1.0}
    matched = make_matcher(**only_masks)(predictions, [MANY], points, [features], SIZE)
    assert matched[0, 0].tolist() == [3, -1, 1, -1, -1, 2, -1, -1, 0]


def test_order_and_numbers_of_instances_do_not_matter():
    order = torch.tensor([2, 0, 3, 1])
    renamed = torch.tensor([100, 2, 9, 31])
    label = MANY["label"].clone()
    for before, after in zip(MANY["ids"].tolist(), renamed.tolist(), strict=True):
        label[MANY["label"] == before] = after
    turned = {
        "label": label,
        "ids": renamed[order],
        "boxes": MANY["boxes"][order],
        "classes": MANY["classes"][order],
    }
    predictions = draw_predictions(2, [MANY], 7)
    points, features = look(predictions, [MANY], num_own=0)
    wanted = make_matcher()(predictions, [MANY], points, features, SIZE)
    torch.manual_seed(0)
    points = [sample_points(turned, num_uniform=23, num_own=0)]
    found = make_matcher()(predictions, [turned], points, features, SIZE)
    place = torch.cat([order.argsort(), torch.tensor([-1])])
    assert torch.equal(found, place[wanted])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["class_logits", "mask_embeds", "boxes"])
def test_a_diverged_query_is_matched_last_and_raises_nothing(key, value):
    predictions = {k: v.detach() for k, v in draw_predictions(1, [MANY], 7).items()}
    points, features = look(predictions, [MANY])
    predictions[key][0, 0, 3] = value
    matched = make_matcher()(predictions, [MANY], points, features, SIZE)
    assert (matched >= 0).sum() == 4
    if np.isnan(value):
        assert matched[0, 0, 3] == UNMATCHED


def test_the_assignment_has_no_gradient():
    predictions = draw_predictions(1, [ONE], 3)
    points, features = look(predictions, [ONE])
    features = [f.requires_grad_() for f in features]
    assert not make_matcher().costs(predictions, [ONE], points, features, SIZE)[0].requires_grad


def test_what_cannot_work_is_named():
    predictions = draw_predictions(1, [ONE], 3)
    del predictions["boxes"]
    points, features = look(predictions, [ONE])
    with pytest.raises(ValueError, match=r"box_l1_weight=7\.0.*set both to 0"):
        make_matcher()(predictions, [ONE], points, features, SIZE)
    with pytest.raises(ValueError, match="'focals' is unknown"):
        make_matcher(class_cost="focals")
    with pytest.raises(ValueError, match="at least one above 0"):
        make_matcher(**dict.fromkeys(WEIGHTS, 0.0))
    with pytest.raises(ValueError, match="numbers >= 0"):
        make_matcher(class_weight=-1.0)
