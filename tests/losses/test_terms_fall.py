"""Each loss of each model falls when it alone is trained on one batch: it has a gradient, and one that helps."""

import pytest
import torch
from torch import nn

from seg3d_monai.backbones import ResNet
from seg3d_monai.losses import MaskRCNNCriterion, SetCriterion
from seg3d_monai.matching import HungarianMatcher, IoUMatcher
from seg3d_monai.models import mask2former3d, maskdino3d, maskrcnn3d

SIZE = (6, 20, 28)
BRICKS = [(0, 2, 4, 4, 10, 14), (4, 3, 5, 6, 10, 13), (0, 10, 4, 5, 19, 12), (1, 3, 14, 6, 12, 25)]
"""Instances that touch; the second lies under the first, the others beside it."""
MOST_STEPS = 40
SHARES = {"aux_box_l1": 0.85, "aux_box_giou": 0.85}
"""Of the first loss that a loss must fall below, if not 0.75: half of these two is of the first boxes, which are not
trained."""
TRANSFORMER = {
    "memory_levels": ("c2",),
    "hidden": 16,
    "mask_channels": 8,
    "encoder_layers": 1,
    "encoder_feedforward": 16,
    "decoder_layers": 2,
    "decoder_feedforward": 16,
    "num_queries": 105,  # all cells, so that training does not change which are looked at
    "num_heads": 2,
}
MASKS, BOXES = ["class", "mask_bce", "mask_dice"], ["box_l1", "box_giou"]


def of_parts(prefixes, names):
    return [f"{prefix}{name}" for prefix in prefixes for name in names] + ["selection"]


TERMS = {
    "maskrcnn": [
        *["objectness", "anchor_box", "class", "roi_box", "mask_bce", "mask_dice", "semantic_bce", "semantic_dice"]
    ],
    "mask2former": of_parts(["", "aux_", "encoder_"], MASKS),
    "maskdino": of_parts(["", "aux_", "encoder_", "denoising_"], MASKS + BOXES),
}


def network_of(kind, seed=0):
    torch.manual_seed(seed)
    backbone = ResNet(
        in_channels=1, depths=(1, 1), widths=(8, 16), stem_channels=8, stage_strides=((1, 1, 1), (2, 2, 2))
    )
    if kind == "mask2former":
        return mask2former3d(backbone=backbone, num_classes=2, query_source="selected", **TRANSFORMER)
    if kind == "maskdino":
        return maskdino3d(backbone=backbone, num_classes=2, anchor_cells=2.0, denoising_queries=16, **TRANSFORMER)
    return maskrcnn3d(
        backbone=backbone,
        anchor_shapes=[[(4, 8, 10)], [(6, 10, 12)]],
        num_classes=2,
        fpn_channels=8,
        box_roi_size=(3, 3, 3),
        box_hidden=16,
        mask_roi_size=(3, 4, 4),
        mask_channels=8,
        mask_convs=1,
        semantic=True,
        num_roi_samples=32,
        num_mask_samples=8,
        pre_nms_top_n=(100, 100),
        post_nms_top_n=(50, 50),
    )


def criterion_of(kind, term):
    """A criterion whose matcher looks at nothing but the loss that is trained: what is not would shuffle the pairs."""
    if kind == "maskrcnn":
        return MaskRCNNCriterion(matcher=IoUMatcher(foreground_iou=0.4, background_iou=0.2, match_best=True))
    cost, loss = ("focal", "focal") if kind == "maskdino" else ("softmax", "cross_entropy")
    looks_at = next((name for name in MASKS + BOXES if term.endswith(name)), "class")
    weights = {f"{name}_weight": float(name == looks_at) for name in MASKS + BOXES}
    matcher = HungarianMatcher(class_cost=cost, **weights)
    return SetCriterion(matcher=matcher, num_uniform_points=64, num_instance_points=32, class_loss=loss)


def batch():
    """Two images, one of them turned about; instances are brighter than the noise, those of class 1 more so."""
    label, classes = torch.zeros(SIZE, dtype=torch.int64), torch.tensor([0, 1, 0, 1])
    for number, (z1, y1, x1, z2, y2, x2) in enumerate(BRICKS, start=1):
        label[z1:z2, y1:y2, x1:x2] = number
    labels = [label, label.flip(1, 2)]
    images = [(torch.tensor([0.0, 1, 2, 1.5, 3])[one] + 0.1 * torch.randn(SIZE))[None] for one in labels]
    boxes = torch.tensor(BRICKS, dtype=torch.float32)
    turned = boxes.clone()
    turned[:, [1, 4]], turned[:, [2, 5]] = SIZE[1] - boxes[:, [4, 1]], SIZE[2] - boxes[:, [5, 2]]
    common = {"ids": torch.arange(1, 5), "classes": classes}
    targets = [{"label": one, "boxes": box, **common} for one, box in zip(labels, [boxes, turned], strict=True)]
    return torch.stack(images), targets


def has_fallen(course, share):
    """Whether the last three values lie below a share of the first."""
    return len(course) > 3 and max(course[-3:]) < share * course[0]


@pytest.mark.parametrize(("kind", "term"), [(kind, term) for kind, terms in TERMS.items() for term in terms])
def test_a_term_falls_when_trained_alone(kind, term):
    network, criterion = network_of(kind), criterion_of(kind, term)
    images, targets = batch()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    share, course = SHARES.get(term, 0.75), []
    while len(course) < MOST_STEPS and not has_fallen(course, share):
        torch.manual_seed(1)  # the same points, samples and noise at each step
        losses = criterion(network(images, targets), targets)
        assert sorted(losses) == sorted(TERMS[kind])
        optimizer.zero_grad()
        losses[term].backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        course.append(losses[term].item())
    print(kind, term, len(course), f"{course[0]:.3f} {course[-1]:.3f}  {course[-1] / course[0]:.2f}")
    assert has_fallen(course, share), course
