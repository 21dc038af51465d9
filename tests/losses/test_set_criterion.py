"""Set losses against NumPy loops in float64, and what must not matter: order, autocast, what else a batch holds."""

import logging

import numpy as np
import pytest
import torch
from set_outputs import HALF_IGNORED, KINDS, draw, leaves, look, make_criterion, make_outputs
from set_targets import MANY, NONE, ONE, SIZE, STRIDE, crowd, make_target

import seg3d_monai.losses.set_criterion as module
from seg3d_monai.losses import SetCriterion
from seg3d_monai.losses.set_criterion import queries_of_instances
from seg3d_monai.matching import HungarianMatcher, point_features, sample_points
from seg3d_monai.matching.points import point_set

NAMES = ["class", "mask_bce", "mask_dice", "box_l1", "box_giou"]
PREFIXES = ["", "aux_", "encoder_", "denoising_"]


def class_loss_of(row, wanted, kind):
    """Loss and weight of one query; wanted is None for "no object"."""
    if kind == "cross_entropy":
        index = len(row) - 1 if wanted is None else wanted
        weight = 0.1 if wanted is None else 1.0
        return weight * (np.log(np.exp(row).sum()) - row[index]), weight
    prob = 1 / (1 + np.exp(-row))
    loss = -0.75 * prob**2 * np.log(1 - prob)
    if wanted is not None:
        loss[wanted] = -0.25 * (1 - prob[wanted]) ** 2 * np.log(prob[wanted])
    return loss.sum(), 1.0


def mask_losses_of(logits, truth):
    prob = 1 / (1 + np.exp(-logits))
    bce = -(truth * np.log(prob) + (1 - truth) * np.log(1 - prob)).sum() / max(1, len(truth))
    return bce, 1 - (2 * (prob * truth).sum() + 1) / (prob.sum() + truth.sum() + 1)


def box_losses_of(box, truth):
    size = np.array([*SIZE, *SIZE])
    numbers = [np.concatenate([(b[:3] + b[3:]) / 2, b[3:] - b[:3]]) / size for b in (box, truth)]
    shared = np.prod([max(0, min(box[a + 3], truth[a + 3]) - max(box[a], truth[a])) for a in range(3)])
    hull = np.prod([max(box[a + 3], truth[a + 3]) - min(box[a], truth[a]) for a in range(3)])
    union = np.prod(box[3:] - box[:3]) + np.prod(truth[3:] - truth[:3]) - shared
    return np.abs(numbers[0] - numbers[1]).sum(), 1 - shared / union + (hull - union) / hull


def naive(predictions, matched, targets, points, features, kind, count):
    """{name: [L]} of queries whose instance is known: -1 none, -2 nothing at all."""
    arrays = {k: v.detach().double().numpy() for k, v in predictions.items() if v.is_floating_point()}
    num_layers, _, num_queries = matched.shape
    losses = {name: np.zeros(num_layers) for name in NAMES if "boxes" in arrays or "box" not in name}
    weights = np.zeros(num_layers)
    for layer, n, q in np.ndindex(num_layers, len(targets), num_queries):
        target, g = targets[n], int(matched[layer, n, q])
        values, at = points[n].values.numpy(), features[n].double().numpy()
        embed = arrays["mask_embeds"][layer, n, q]
        num_uniform, num_own = points[n].num_uniform, points[n].num_own
        if g == -2:
            continue
        if g == -1:
            if "boxes" in arrays:
                box = arrays["boxes"][layer, n, q]
                voxel = np.clip(np.floor((box[:3] + box[3:]) / 2), 0, np.array(SIZE) - 1).astype(int)
                is_excused = target["label"][tuple(voxel)] == -1
            else:
                inside = values[:num_uniform][at[:num_uniform] @ embed > 0]
                is_excused = (inside == -1).sum() * 2 > len(inside)
            if is_excused:
                weights[layer] += 0.1
                continue
        wanted = None if g < 0 else int(target["classes"][g])
        loss, weight = class_loss_of(arrays["class_logits"][layer, n, q], wanted, kind)
        losses["class"][layer] += loss
        weights[layer] += weight
        if g < 0:
            continue
        start = num_uniform + g * num_own
        rows = np.r_[0:num_uniform, start : start + num_own]
        rows = rows[values[rows] != -1]
        bce, dice = mask_losses_of(at[rows] @ embed, (values[rows] == target["ids"][g].item()).astype(float))
        losses["mask_bce"][layer] += bce
        losses["mask_dice"][layer] += dice
        if "boxes" in arrays:
            l1, giou = box_losses_of(arrays["boxes"][layer, n, q], target["boxes"][g].double().numpy())
            losses["box_l1"][layer] += l1
            losses["box_giou"][layer] += giou
    divisors = dict.fromkeys(losses, max(1, count))
    if kind == "cross_entropy":
        divisors["class"] = weights
    return {name: loss / divisors[name] for name, loss in losses.items()}


BATCHES = [[MANY], [NONE], [NONE, MANY, ONE], [ONE, HALF_IGNORED], [HALF_IGNORED]]


@pytest.mark.parametrize("targets", BATCHES)
@pytest.mark.parametrize(("with_boxes", "kind"), KINDS)
def test_losses_equal_naive_loops(targets, with_boxes, kind):
    has_instances = any(len(target["ids"]) for target in targets)
    outputs = make_outputs(targets, with_boxes=with_boxes, class_loss=kind, denoising=has_instances)
    criterion = make_criterion(with_boxes, kind)
    torch.manual_seed(0)
    found = criterion(outputs, targets)
    points, features = look(outputs, targets)
    matched = criterion.matcher(outputs, targets, points, features, SIZE)
    predictions = {key: outputs[key] for key in ("class_logits", "mask_embeds", "boxes") if key in outputs}
    layers = naive(predictions, matched, targets, points, features, kind, sum(len(target["ids"]) for target in targets))
    wanted = {name: loss[3] for name, loss in layers.items()}
    wanted |= {f"aux_{name}": loss[1] + loss[2] for name, loss in layers.items()}
    wanted |= {f"encoder_{name}": loss[0] for name, loss in layers.items()}
    if has_instances:
        index = outputs["denoising"]["target_index"]
        layers = naive(
            outputs["denoising"],
            index.expand(2, -1, -1),
            targets,
            points,
            features,
            kind,
            (index >= 0).sum().item(),
        )
        wanted |= {f"denoising_{name}": loss.sum() for name, loss in layers.items()}
    elif with_boxes:
        wanted |= {f"denoising_{name}": 0.0 for name in layers}
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("targets", [[MANY, ONE], [NONE, MANY, ONE], [NONE, NONE]])
@pytest.mark.parametrize(("with_boxes", "kind"), KINDS)
def test_it_does_not_matter_which_images_are_in_one_batch(monkeypatch, targets, with_boxes, kind):
    """The losses of one batch are the sum of those of its images alone, with the same counts."""

    def seeded(target, **settings):
        torch.manual_seed(len(target["ids"]))
        return sample_points(target, **settings)

    monkeypatch.setattr(module, "sample_points", seeded)
    denoising = any(len(target["ids"]) for target in targets)
    outputs = make_outputs(targets, with_boxes=with_boxes, class_loss=kind, denoising=denoising)
    criterion = make_criterion(with_boxes, kind)
    whole = criterion(outputs, targets)
    counts = SetCriterion.count(targets)
    assert counts["instances"] == sum(len(target["ids"]) for target in targets)
    total = dict.fromkeys(whole, 0.0)
    for n, target in enumerate(targets):
        part = outputs | {"mask_features": outputs["mask_features"][n : n + 1]}
        part |= {key: outputs[key][:, n : n + 1] for key in ("class_logits", "mask_embeds", "boxes") if key in outputs}
        if denoising:
            known = outputs["denoising"]
            part["denoising"] = {
                key: value[n : n + 1] if key == "target_index" else value[:, n : n + 1] for key, value in known.items()
            }
        for name, loss in criterion(part, [target], counts).items():
            total[name] += loss.item()
    for name, loss in whole.items():
        assert loss.item() == pytest.approx(total[name], rel=1e-9, abs=1e-12), name


def test_float32_losses_are_not_lowered_by_autocast():
    targets = [NONE, MANY, ONE]
    outputs = make_outputs(targets, dtype=torch.float32, denoising=True)
    torch.manual_seed(0)
    wanted = make_criterion()(outputs, targets)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_criterion()(outputs, targets)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ["focal", "cross_entropy"])
@pytest.mark.parametrize("with_boxes", [True, False])
def test_names_do_not_depend_on_the_batch_and_every_loss_is_attached(with_boxes, kind):
    expected = [name for name in NAMES if with_boxes or "box" not in name]
    prefixes = PREFIXES if with_boxes else PREFIXES[:3]
    for targets in [*BATCHES, [crowd(), NONE, ONE]]:
        for denoising in (False, with_boxes) if any(len(target["ids"]) for target in targets) else (False,):
            outputs = make_outputs(targets, with_boxes=with_boxes, class_loss=kind, denoising=denoising)
            losses = make_criterion(with_boxes, kind)(outputs, targets)
            assert list(losses) == [prefix + name for prefix in prefixes for name in expected]
            assert all(loss.requires_grad and loss.ndim == 0 and loss.isfinite() for loss in losses.values())
            gradients = torch.autograd.grad(sum(losses.values()), leaves(outputs))  # raises where one is not reached
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_decoder_of_one_layer_has_neither_auxiliary_nor_encoder_losses():
    outputs = make_outputs([ONE], with_boxes=False)
    one = {key: outputs[key][3:].detach().requires_grad_() for key in ("class_logits", "mask_embeds")}
    losses = make_criterion(False)(outputs | one | {"names": ["1"]}, [ONE])
    assert list(losses) == NAMES[:3]


def test_gradients_reach_what_was_matched_and_nothing_else():
    targets = [NONE, MANY]
    outputs = make_outputs(targets)
    criterion = make_criterion()
    torch.manual_seed(0)
    losses = criterion(outputs, targets)
    points, features = look(outputs, targets)
    is_matched = criterion.matcher(outputs, targets, points, features, SIZE) >= 0
    sum(losses.values()).backward()
    for key in ("mask_embeds", "boxes"):
        assert torch.equal((outputs[key].grad != 0).any(-1), is_matched)
    assert outputs["class_logits"].grad[is_matched].all()
    assert not outputs["mask_features"].grad[0].any()
    assert outputs["mask_features"].grad[1].any()


def test_no_instance_one_and_more_than_queries(caplog):
    targets = [crowd(300), NONE, ONE]
    outputs = make_outputs(targets, num_queries=10)
    criterion = make_criterion()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            losses = criterion(outputs, targets)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "300 instances" in messages[0]
    assert "10 queries" in messages[0]
    # Eleven instances of 301 were matched, each with at most 2 of GIoU loss.
    assert 0 < losses["box_giou"].item() <= 11 * 2 / 301
    sum(losses.values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(outputs))


def test_order_and_numbers_of_instances_do_not_matter(monkeypatch):
    order, renamed = torch.tensor([2, 0, 3, 1]), torch.tensor([100, 2, 9, 31])
    label = MANY["label"].clone()
    for before, after in zip(MANY["ids"].tolist(), renamed.tolist(), strict=True):
        label[MANY["label"] == before] = after
    turned = {"label": label, "ids": renamed[order], "boxes": MANY["boxes"][order], "classes": MANY["classes"][order]}
    outputs = make_outputs([NONE, MANY], denoising=True)
    index = outputs["denoising"]["target_index"]
    place = torch.cat([order.argsort(), torch.tensor([-2, -1])])  # rows -2 and -1 stay what they are
    moved = outputs | {"denoising": outputs["denoising"] | {"target_index": place[index]}}
    points, _ = look(outputs, [NONE, MANY])
    uniform, own = points[1].split(points[1].coordinates)
    coordinates = {id(NONE["label"]): points[0].coordinates, id(MANY["label"]): points[1].coordinates}
    coordinates[id(label)] = torch.cat([uniform, own[order].flatten(0, 1)])

    def same_points(target, *, num_uniform, num_own):
        return point_set(target, coordinates[id(target["label"])], num_uniform=num_uniform, num_own=num_own)

    monkeypatch.setattr(module, "sample_points", same_points)
    wanted = make_criterion()(outputs, [NONE, MANY])
    found = make_criterion()(moved, [NONE, turned])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_denoising_queries_know_their_instance():
    """A positive has its own instance, whatever is matched; a negative is no object; padding is nothing."""
    outputs = make_outputs([MANY])
    generator = torch.Generator().manual_seed(7)
    noised = draw(2, 1, 7, generator, with_boxes=True, num_logits=3, dtype=torch.float64)
    # Two queries of instance 3, one of instance 0, negatives at a known and at an ignored centre, and padding.
    noised["target_index"] = torch.tensor([[3, -1, -2, 0, -1, 3, -2]])
    boxes = noised["boxes"].detach().clone()
    boxes[:, :, 1] = torch.tensor([3.0, 0, 10, 4, 2, 14])
    boxes[:, :, 4] = torch.tensor([0.0, 7, 9, 2, 9, 13])
    noised["boxes"] = boxes.requires_grad_()
    assert MANY["label"][3, 1, 12] == 0
    assert MANY["label"][1, 8, 11] == -1
    outputs["denoising"] = noised
    torch.manual_seed(0)
    losses = make_criterion()(outputs, [MANY])
    total = sum(loss for name, loss in losses.items() if name.startswith("denoising_"))
    gradients = torch.autograd.grad(total, [noised[key] for key in ("class_logits", "mask_embeds", "boxes")])
    has_gradient = [(gradient != 0).any(-1)[0, 0].tolist() for gradient in gradients]
    assert has_gradient[0] == [True, True, False, True, False, True, False]
    assert has_gradient[1] == has_gradient[2] == [True, False, False, True, False, True, False]
    # Class logits are pushed up only at the class of a positive's instance: 0 for instances 3 and 0.
    assert (gradients[0][..., [0, 3, 5], 0] < 0).all()
    assert (gradients[0][..., [0, 3, 5], 1:] > 0).all()
    assert (gradients[0][..., 1, :] > 0).all()
    l1 = sum(
        box_losses_of(boxes[layer, 0, q].detach().numpy(), MANY["boxes"][g].double().numpy())[0]
        for layer in range(2)
        for q, g in ((0, 3), (3, 0), (5, 3))
    )
    assert losses["denoising_box_l1"].item() == pytest.approx(l1 / 3)


def test_queries_of_instances_by_hand():
    matched = torch.tensor([[2, -1, 0, 2, -2, 0, -1], [-1, -1, -1, -1, 1, 2, -2]])
    wanted = [[[2, 5], [-1, -1], [0, 3]], [[-1, -1], [4, -1], [5, -1]]]
    assert queries_of_instances(matched, 3, 2).tolist() == wanted
    assert queries_of_instances(torch.tensor([[1, -1, 0]]), 2, 1).tolist() == [[[2], [0]]]
    assert queries_of_instances(torch.full((2, 5), -1), 3, 2).tolist() == [[[-1, -1]] * 3] * 2


def test_weights_multiply_their_loss_everywhere():
    targets = [NONE, MANY]
    outputs = make_outputs(targets, denoising=True)
    losses = []
    for weights in (None, {"class": 3.0, "mask_dice": 0.0, "box_l1": 5.0}):
        torch.manual_seed(0)
        losses.append(make_criterion(weights=weights)(outputs, targets))
    for prefix in PREFIXES:
        for name in NAMES:
            factor = {"class": 3.0, "mask_dice": 0.0, "box_l1": 5.0}.get(name, 1.0)
            plain, weighted = (found[prefix + name].item() for found in losses)
            assert weighted == pytest.approx(factor * plain)
            assert plain > 0


def test_points_are_drawn_once_an_image(monkeypatch):
    drawn, read = [], []

    def counting_sample(target, **settings):
        drawn.append(target)
        return sample_points(target, **settings)

    def counting_read(features, stride, coordinates):
        read.append(len(coordinates))
        return real(features, stride, coordinates)

    real = module.batch_point_features
    monkeypatch.setattr(module, "sample_points", counting_sample)
    monkeypatch.setattr(module, "batch_point_features", counting_read)
    targets = [NONE, MANY, ONE]
    make_criterion()(make_outputs(targets, denoising=True), targets)
    assert [id(target) for target in drawn] == [id(target) for target in targets]
    assert read == [3]


def test_minimising_the_losses_finds_the_instances():
    """Free outputs, fitted by gradient descent, end as the truth: classes, boxes and masks of all instances."""
    target = make_target([(0, 0, 0, 3, 4, 6), (0, 0, 6, 3, 6, 10), (3, 4, 0, 6, 10, 6)], [0, 2, 1], [7, 3, 40])
    outputs = make_outputs([target], num_queries=5, dtype=torch.float32)
    criterion = make_criterion(num_uniform_points=200, num_instance_points=60, weights={"box_l1": 5.0})
    optimizer = torch.optim.Adam(leaves(outputs), lr=0.1)
    for step in range(250):
        torch.manual_seed(step)
        loss = sum(criterion(outputs, [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        everywhere = torch.nonzero(torch.ones(SIZE))
        features = point_features(outputs["mask_features"][0], STRIDE, everywhere)
        prob = outputs["class_logits"][-1, 0].sigmoid()
        found = (prob.amax(1) > 0.5).nonzero().squeeze(1)
        assert len(found) == 3
        masks = (outputs["mask_embeds"][-1, 0, found] @ features.T > 0).view(3, *SIZE)
        for g, number in enumerate(target["ids"].tolist()):
            truth = target["label"] == number
            ious = [((mask & truth).sum() / (mask | truth).sum()).item() for mask in masks]
            best = int(np.argmax(ious))
            assert ious[best] > 0.75
            assert prob[found[best]].argmax() == target["classes"][g]
            assert (outputs["boxes"][-1, 0, found[best]] - target["boxes"][g]).abs().max() < 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"mask_bec": 1.0}}, r"mask_bec.*choose from"),
        ({"num_uniform_points": 0, "num_instance_points": 0}, "no points"),
        ({"num_uniform_points": -1}, "num_uniform_points=-1"),
        ({"class_loss": "softmax"}, "'softmax' is unknown"),
        ({"no_object_weight": 0.0}, "no_object_weight"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_criterion(**changes)


def test_a_loss_that_does_not_go_with_the_cost_is_named():
    matcher = HungarianMatcher(class_weight=1.0, mask_bce_weight=1.0, mask_dice_weight=1.0, class_cost="focal")
    with pytest.raises(ValueError, match=r"'cross_entropy'.*class_cost='softmax'"):
        SetCriterion(matcher=matcher, class_loss="cross_entropy")


@pytest.mark.parametrize("number", [3, -1])
def test_a_class_without_a_logit_is_named(number):
    target = make_target([(1, 2, 3, 4, 6, 11)], [number], [9])
    with pytest.raises(ValueError, match=rf"class {number} .*\[0, 3\).*num_classes"):
        make_criterion()(make_outputs([target]), [target])


@pytest.mark.parametrize("names", [["encoder", "1", "2"], ["initial", "1", "2", "encoder"]])
def test_names_that_do_not_fit_are_named(names):
    with pytest.raises(ValueError, match="the last layer last"):
        make_criterion()(make_outputs([ONE]) | {"names": names}, [ONE])
