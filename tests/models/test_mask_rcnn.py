"""The detector as a whole: training step with none, one and many instances, and the contract of its detections."""

import logging
from math import prod

import pytest
import torch
from torch import nn

from seg3d_monai.backbones import ResNet
from seg3d_monai.losses import MaskRCNNCriterion
from seg3d_monai.losses.semantic import semantic_losses
from seg3d_monai.matching import IoUMatcher
from seg3d_monai.models import mask_rcnn, maskrcnn3d

SIZE = (17, 33, 49)
CROWD = [(z, y, x, z + 4, y + 6, x + 8) for z in (0, 4, 8, 13) for y in (0, 6, 13, 20, 27) for x in (1, 17, 33)]


def make_criterion(**changes):
    matcher = IoUMatcher(foreground_iou=0.4, background_iou=0.2, match_best=True)
    return MaskRCNNCriterion(**({"matcher": matcher, "num_anchor_samples": 64} | changes))


def step(network, images, targets, criterion=None):
    torch.manual_seed(1)
    outputs = network.train()(images, targets)
    return outputs, (criterion or make_criterion())(outputs, targets)


@pytest.mark.parametrize("counts", [(0,), (1,), (0, 0), (0, 1, 60)])
def test_training_step_with_none_one_and_many_instances(make_detector, make_target, counts):
    network = make_detector()
    targets = [make_target(SIZE, CROWD[:n]) for n in counts]
    torch.manual_seed(0)
    outputs, losses = step(network, torch.randn(len(counts), 1, *SIZE), targets)
    assert all(torch.isfinite(v) for v in losses.values())
    if not sum(counts):
        assert [losses[k].item() for k in ("anchor_box", "roi_box", "mask_bce", "mask_dice")] == [0.0] * 4
    assert outputs["anchors"].shape[0] == outputs["objectness"].shape[1] == outputs["anchor_deltas"].shape[1]
    assert (outputs["roi_batch"].diff() >= 0).all()
    assert (outputs["mask_batch"].diff() >= 0).all()
    per_image = torch.bincount(outputs["roi_batch"], minlength=len(counts))
    assert (per_image <= 128).all()
    masks = torch.bincount(outputs["mask_batch"], minlength=len(counts))
    assert all(m >= min(1, n) and m <= 32 and (n > 0 or m == 0) for m, n in zip(masks.tolist(), counts, strict=True))
    sum(losses.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_several_channels_and_classes(make_detector, make_target):
    network = make_detector(in_channels=2, num_classes=3)
    targets = [make_target(SIZE, CROWD[:20], classes=[i % 3 for i in range(20)]), make_target(SIZE, [])]
    outputs, losses = step(network, torch.randn(2, 2, *SIZE), targets)
    assert outputs["class_logits"].shape[1] == 4
    assert outputs["mask_logits"].shape[1:] == (3, 8, 8, 8)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.parameters())
    found = network.eval()(torch.randn(1, 2, *SIZE))[0]
    assert set(found["classes"].tolist()) <= {0, 1, 2}


def test_true_boxes_are_trained_on_even_without_a_single_proposal(make_detector, make_target):
    network = make_detector(pre_nms_top_n=(0, 0))
    target = make_target(SIZE, CROWD[:5])
    outputs, losses = step(network, torch.randn(2, 1, *SIZE), [make_target(SIZE, []), target])
    assert torch.equal(outputs["rois"], target["boxes"])
    assert outputs["roi_batch"].tolist() == [1] * 5
    assert outputs["roi_matched"].tolist() == list(range(5))
    assert sorted(outputs["mask_matched"].tolist()) == list(range(5))
    sum(losses.values()).backward()


def test_numbers_and_order_of_instances_do_not_change_the_losses(make_detector, make_target):
    """With room for every sample nothing is left to chance, so the losses are the same."""
    network = make_detector(num_roi_samples=10_000, num_mask_samples=10_000, num_classes=2)
    criterion = make_criterion(num_anchor_samples=100_000)
    boxes, classes = [CROWD[i] for i in (0, 7, 19, 33, 58)], [0, 1, 0, 1, 1]
    order = [3, 0, 4, 2, 1]
    image = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    empty = make_target(SIZE, [])
    plain = make_target(SIZE, boxes, classes)
    turned = make_target(SIZE, [boxes[i] for i in order], [classes[i] for i in order], ids=[50, 3, 77, 4, 1000])
    _, wanted = step(network, image, [plain, empty], criterion)
    _, found = step(network, image, [turned, empty], criterion)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_seed_decides_the_samples(make_detector, make_target):
    network = make_detector(num_roi_samples=10, num_mask_samples=2)
    targets = [make_target(SIZE, CROWD)]
    image = torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    first, second = step(network, image, targets), step(network, image, targets)
    for key, value in first[0].items():
        assert torch.equal(value, second[0][key]), key
    for key, value in first[1].items():
        assert torch.equal(value, second[1][key]), key


def test_autocast_keeps_boxes_logits_and_losses_in_float32(make_detector, make_target):
    network = make_detector()
    image = torch.randn(1, 1, *SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, losses = step(network, image, [make_target(SIZE, CROWD)])
        found = network.eval()(image)[0]
    values = [v for v in [*outputs.values(), *losses.values(), *found.values()] if v.is_floating_point()]
    assert {v.dtype for v in values} == {torch.float32}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_a_network_in_half_precision_keeps_boxes_logits_and_losses_in_float32(make_detector, make_target):
    network = make_detector().bfloat16()
    image = torch.randn(1, 1, *SIZE).bfloat16()
    outputs, losses = step(network, image, [make_target(SIZE, CROWD)])
    found = network.eval()(image)[0]
    values = [v for v in [*outputs.values(), *losses.values(), *found.values()] if v.is_floating_point()]
    assert {v.dtype for v in values} == {torch.float32}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_nms_top_n": (100, 150)},
        {"post_nms_top_n": (50, 60)},
        {"proposal_nms_threshold": (0.6, 0.5)},
        {"score_threshold": 0.1},
        {"detection_nms_threshold": 0.3},
        {"max_detections": 30},
        {"anchor_shapes": [[(4, 6, 6), (6, 8, 8)], [(8, 12, 12), (10, 16, 18)]]},
        {"box_roi_size": (3, 3, 3), "sampling_ratio": 1},
    ],
)
def test_repr_tells_every_setting_that_changes_detections(make_detector, changes):
    assert repr(make_detector(**changes)) != repr(make_detector())
    assert repr(make_detector(seed=1)) == repr(make_detector())


def test_training_without_targets_is_refused(make_detector):
    with pytest.raises(ValueError, match="targets is None"):
        make_detector().train()(torch.randn(1, 1, *SIZE))


@pytest.mark.parametrize("size", [SIZE, (16, 32, 48), (5, 40, 23), (2, 3, 7), (1, 1, 1)])
def test_contract_of_detections(make_detector, size):
    network = make_detector(num_classes=2).eval()
    with torch.inference_mode():
        detections = network(torch.randn(2, 1, *size))
    assert len(detections) == 2
    for found in detections:
        count = len(found["boxes"])
        assert {k: tuple(v.shape) for k, v in found.items()} == {
            "boxes": (count, 6),
            "scores": (count,),
            "classes": (count,),
            "mask_logits": (count, 8, 8, 8),
        }
        assert found["boxes"].dtype == found["scores"].dtype == found["mask_logits"].dtype == torch.float32
        assert found["classes"].dtype == torch.int64
        assert count <= 40
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([*size, *size])).all()
        assert (found["boxes"][:, 3:] - found["boxes"][:, :3] >= 1).all()
        assert (found["scores"].diff() <= 0).all()
        assert ((found["scores"] >= 0) & (found["scores"] <= 1)).all()


@pytest.mark.parametrize("changes", [{"pre_nms_top_n": (0, 0)}, {"score_threshold": 1.1}])
def test_no_detections(make_detector, changes):
    network = make_detector(num_classes=2, **changes).eval()
    for found in network(torch.randn(2, 1, *SIZE)):
        assert found["boxes"].shape == (0, 6)
        assert found["scores"].shape == found["classes"].shape == (0,)
        assert found["mask_logits"].shape == (0, 8, 8, 8)


def test_evaluation_repeats_and_draws_nothing(make_detector):
    network = make_detector().eval()
    image = torch.randn(1, 1, *SIZE)
    state = torch.get_rng_state()
    first, second = network(image)[0], network(image)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first["boxes"]) > 0
    for key, value in first.items():
        assert torch.equal(value, second[key])


def test_a_batch_does_not_change_an_image(make_detector):
    network = make_detector(num_classes=2).eval()
    images = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    for image, together in zip(images, network(images), strict=True):
        alone = network(image[None])[0]
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, atol=1e-4, rtol=1e-4)


def test_more_detections_than_fit_are_cut_and_said(make_detector, caplog):
    image = torch.randn(1, 1, *SIZE)
    whole = make_detector().eval()(image)[0]
    network = make_detector(max_detections=7).eval()
    with caplog.at_level(logging.WARNING):
        found = network(image)[0]
    assert torch.equal(found["boxes"], whole["boxes"][:7])
    least = f"{float(whole['scores'][6]):.2f}"
    assert f"7 objects are as many as one image may have, those of scores below {least} are lost" in caplog.text
    assert "raise max_detections = 7" in caplog.text


def test_limits_of_proposals_grow_with_images_beyond_their_size_in_evaluation(make_detector, make_target, monkeypatch):
    image = torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    limits = {"pre_nms_top_n": (100, 500), "post_nms_top_n": (50, 250), "max_detections": 100}
    few, many = make_detector(), make_detector(**limits)
    wanted = many.eval()(image)[0]
    assert not torch.equal(few.eval()(image)[0]["boxes"], wanted["boxes"])
    monkeypatch.setattr(mask_rcnn, "LIMITS_VOXELS", prod(SIZE) / 2.5)
    for key, value in few.eval()(image)[0].items():
        assert torch.equal(value, wanted[key])
    for detector in (few, many):
        outputs, _ = step(detector, image, [make_target(SIZE, [])])
        assert len(outputs["rois"]) == 50


@pytest.mark.parametrize(
    ("num_proposals", "most", "sure", "weak", "said"),
    [
        (20, 20, range(18), [], None),
        (20, 20, [*range(18), 19], [], "1 of 19 objects come from the last twentieth of 20 proposals"),
        (20, 20, range(18), [18, 19], None),  # more probably background than an object
        (20, 20, range(19), [], None),
        (20, 21, range(20), [], None),  # all proposals were looked at
        (20, 20, [], [], None),
        (300, 300, [*range(199), 299], [], None),  # one in a hundred is borne
        (300, 300, [*range(198), 285, 299], [], None),
        (300, 300, [*range(197), 284, 285, 299], [], None),
        (300, 300, [*range(197), 285, 286, 299], [], "3 of 200 objects come from the last twentieth of 300 proposals"),
    ],
)
def test_too_few_proposals_are_told_by_the_objects_that_the_last_ones_give(
    make_detector, caplog, num_proposals, most, sure, weak, said
):
    network = make_detector(
        pre_nms_top_n=(100, num_proposals // 2),
        post_nms_top_n=(50, most),
        proposal_nms_threshold=(1.0, 1.0),
        min_objectness=0.0,
        detection_nms_threshold=1.0,
        max_detections=1000,
    ).eval()
    network.rpn.deltas.weight.data.zero_()  # every proposal is an anchor: none vanishes

    def classify(features, boxes, image):
        assert len(boxes) == num_proposals
        prob = torch.full((num_proposals,), 0.01)
        prob[list(sure)], prob[weak] = 0.9, 0.4
        return torch.stack([prob, 1 - prob], 1).log(), torch.zeros(num_proposals, 6)

    network._classify = classify
    images = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        assert [len(found["boxes"]) for found in network(images)] == [num_proposals] * 2
    assert [record.message for record in caplog.records] == (
        [] if said is None else [f"{said}; others may be lost: raise post_nms_top_n = {most}"]  # once
    )


def test_masks_of_many_detections_belong_to_their_boxes(make_detector):
    """More detections than one chunk of the mask head: the same logits as each box pooled alone."""
    network = make_detector(
        num_classes=2,
        max_detections=150,
        detection_nms_threshold=1.0,
        post_nms_top_n=(50, 150),
        proposal_nms_threshold=(1.0, 1.0),
    ).eval()
    images = torch.randn(2, 1, *SIZE)
    with torch.inference_mode():
        found = network(images)[1]
        assert len(found["boxes"]) > 130
        features = network.backbone(images)
        for row in (0, 63, 64, 65, len(found["boxes"]) - 1):
            pooled = network.mask_pooler(features, found["boxes"][row : row + 1], torch.tensor([1]))
            wanted = network.mask_head(pooled)[0, found["classes"][row]]
            torch.testing.assert_close(found["mask_logits"][row], wanted, atol=1e-5, rtol=1e-4)


def test_moving_the_image_by_the_coarsest_stride_moves_the_detections(make_detector):
    """An object in the middle of a flat image, moved by (2, 4, 8): what is found around it moves along."""
    network = make_detector(
        num_classes=2,
        anchor_levels=("p2",),
        anchor_shapes=[[(8, 12, 12)]],
        pre_nms_top_n=(10_000, 10_000),
        post_nms_top_n=(10_000, 10_000),
        proposal_nms_threshold=(1.0, 1.0),
        detection_nms_threshold=1.0,
        max_detections=10_000,
    ).eval()
    for layer in (network.rpn.deltas, network.box_head.deltas):  # boxes stay near their anchors
        layer.weight.data *= 0.03
    size, shift = (38, 76, 76), (2, 4, 8)
    pattern = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)) * 3
    found = []
    for z, y, x in [(0, 0, 0), shift]:
        image = torch.zeros(1, 1, *size)
        image[0, 0, 16 + z : 20 + z, 31 + y : 37 + y, 30 + x : 38 + x] = pattern
        with torch.inference_mode():
            result = network(image)[0]
        result["boxes"] = result["boxes"] - torch.tensor([z, y, x, z, y, x])
        centre = (result["boxes"][:, :3] + result["boxes"][:, 3:]) / 2
        near = ((centre - torch.tensor([18.0, 34, 34])).abs() < torch.tensor([4.0, 10, 10])).all(1)
        found.append({key: value[near] for key, value in result.items()})
    before, after = found
    assert len(before["boxes"]) == len(after["boxes"]) == 4 * 5 * 5  # anchors with their centre in the window
    # The background repeats itself, so scores tie: pair by box.
    nearest = torch.cdist(before["boxes"], after["boxes"]).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(nearest)))
    for key, value in before.items():
        torch.testing.assert_close(after[key][nearest], value, atol=1e-3, rtol=1e-3)
    assert before["scores"].std() > 1e-4, "the object should be seen"


def test_masks_are_of_enlarged_boxes(make_detector, make_target):
    plain, enlarged = make_detector(), make_detector(mask_margin=0.25)
    images, target = torch.randn(1, 1, *SIZE), make_target(SIZE, CROWD[:20])
    found, larger = (network.eval()(images)[0] for network in (plain, enlarged))
    assert len(found["boxes"]) > 5
    extent = found["boxes"][:, 3:] - found["boxes"][:, :3]
    wanted = found["boxes"] + torch.cat([-0.25 * extent, 0.25 * extent], 1)
    limits = torch.tensor(SIZE * 2, dtype=torch.float32)
    torch.testing.assert_close(larger["boxes"], wanted.clamp(min=0).minimum(limits))
    torch.testing.assert_close(larger["scores"], found["scores"])
    outputs, _ = step(enlarged, images, [target])
    rois = outputs["rois"][outputs["roi_matched"] >= 0]
    margin = 0.25 * (rois[:, 3:] - rois[:, :3])
    allowed = torch.cat([rois[:, :3] - margin, rois[:, 3:] + margin], 1).clamp(min=0).minimum(limits)
    assert torch.cdist(outputs["mask_rois"], allowed).min(1).values.max() < 1e-3


def test_scores_are_those_of_class_and_mask(make_detector):
    """By hand, one detection at a time; a mask with no cell at all has score 0, and no detections are no error."""
    plain, scored = make_detector(), make_detector(mask_scoring=True)
    image = torch.randn(1, 1, *SIZE)
    found, ranked = (network.eval()(image)[0] for network in (plain, scored))
    assert len(found["scores"]) > 5
    for key in ("boxes", "scores", "classes", "mask_logits"):
        assert len(ranked[key]) == len(found["boxes"])
    assert ranked["scores"].tolist() == sorted(ranked["scores"].tolist(), reverse=True)
    for box, score, logits in zip(ranked["boxes"], ranked["scores"], ranked["mask_logits"], strict=True):
        row = int((found["boxes"] - box).abs().sum(1).argmin())
        torch.testing.assert_close(logits, found["mask_logits"][row])
        inside = [p for p in logits.detach().sigmoid().flatten().tolist() if p > 0.5]
        expected = float(found["scores"][row]) * sum(inside) / len(inside) if inside else 0.0
        assert float(score) == pytest.approx(expected, rel=1e-4)
    nn.init.constant_(scored.mask_head.logits.bias, -100.0)
    assert (scored(image)[0]["scores"] == 0).all()
    scored.score_threshold = 2.0
    assert len(scored(image)[0]["scores"]) == 0


def test_intensities_are_raised_to_a_power(make_detector, make_target):
    plain, raised = make_detector(mask_image_channels=1), make_detector(mask_image_channels=1, image_power=0.5)
    image = torch.randn(1, 1, *SIZE)
    root = torch.where(image < 0, -1.0, 1.0) * image.abs().sqrt()
    found, expected = raised.eval()(image)[0], plain.eval()(root)[0]
    assert len(found["boxes"]) > 5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    _, losses = step(raised, torch.zeros_like(image), [make_target(SIZE, CROWD[:5])])  # no slope at 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in raised.parameters())
    with pytest.raises(ValueError, match="image_power is 0"):
        make_detector(image_power=0)


@pytest.mark.parametrize("read", [1, 2])
@pytest.mark.parametrize("counts", [(0,), (0, 60)])
def test_masks_may_read_the_image(make_detector, make_target, counts, read):
    network = make_detector(in_channels=2, mask_image_channels=read)
    targets = [make_target(SIZE, CROWD[:n]) for n in counts]
    _, losses = step(network, torch.randn(len(counts), 2, *SIZE), targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.parameters())
    found = network.eval()(torch.randn(1, 2, *SIZE))[0]
    assert found["mask_logits"].shape == (len(found["boxes"]), 8, 8, 8)


@pytest.mark.parametrize("norm", ["channel", "batch", "group"])
def test_only_group_norms_see_what_is_far_away(norm):
    """The other end of the image changes, 130 voxels and more from the cells that are compared."""
    torch.manual_seed(0)
    backbone = ResNet(
        in_channels=1, depths=(1, 1), widths=(8, 16), stem_channels=8, stage_strides=((1, 1, 1), (2, 2, 2)), norm=norm
    )
    network = maskrcnn3d(
        backbone=backbone, anchor_shapes=[[(4, 6, 6)], [(8, 12, 12)]], fpn_channels=8, box_hidden=8, norm=norm
    )
    nn.init.normal_(network.rpn.objectness.weight)
    image = torch.randn(1, 1, 9, 12, 200)
    other = image.clone()
    other[..., 170:] = 5
    network.eval()  # in training BatchNorm sees all of the batch
    with torch.no_grad():
        first, changed = (network.rpn(network.backbone(one))[0][0] for one in (image, other))
    near = torch.arange(200 // 2) < 20
    of_near = first.reshape(9, 6, 100, 1)[:, :, near], changed.reshape(9, 6, 100, 1)[:, :, near]
    assert torch.allclose(*of_near, atol=1e-6) == (norm != "group")
    assert not torch.allclose(first, changed, atol=1e-3)


@pytest.mark.parametrize("counts", [(0,), (1,), (0, 60)])
def test_semantic_maps_are_learned_and_not_computed_to_detect(make_detector, make_target, counts):
    network = make_detector(semantic=True)
    targets = [make_target(SIZE, CROWD[:n]) for n in counts]
    images = torch.randn(len(counts), 1, *SIZE)
    outputs, losses = step(network, images, targets, make_criterion(weights={"semantic_dice": 0.5}))
    assert outputs["semantic_logits"].shape == (len(counts), 2, 17, 17, 25)
    plain = semantic_losses(outputs["semantic_logits"], [target["label"] for target in targets])
    assert losses["semantic_bce"] == plain["semantic_bce"] / len(counts)
    assert losses["semantic_dice"] == 0.5 * (plain["semantic_dice"] / len(counts))
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.semantic_head = None
    network.eval()(images)
