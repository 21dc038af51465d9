"""The detector learns two crops of touching objects by heart."""

import numpy as np
import pytest
import torch

from seg3d_monai.inference.mask_paste import paste_mask
from seg3d_monai.losses import MaskRCNNCriterion
from seg3d_monai.matching import IoUMatcher

SIZE = (16, 40, 56)


def boxes_crop():
    """Bricks, each touching its neighbours on every side."""
    label = torch.zeros(SIZE, dtype=torch.int64)
    number = 0
    for z in (2, 8):
        for y in (4, 14, 24):
            for x in (6, 20, 34):
                number += 1
                label[z : z + 6, y : y + 10, x : x + 14] = number
    return label


def ellipsoids_crop():
    """Ellipsoids that overlap a little; the later one owns the voxels that two share."""
    label = torch.zeros(SIZE, dtype=torch.int64)
    z, y, x = np.indices(SIZE)
    centres = [(7, 9, 11), (7, 9, 25), (8, 20, 18), (7, 20, 34), (8, 31, 12), (7, 30, 27), (8, 31, 44)]
    for number, centre in enumerate(centres, start=1):
        inside = sum(((g - c) / r) ** 2 for g, c, r in zip((z, y, x), centre, (4.3, 6.4, 7.6), strict=True)) <= 1
        label[torch.from_numpy(inside)] = number
    return label


def image_of(label):
    """Noisy and darker towards each object's surface, so that touching objects can be told apart."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.zeros(SIZE)
    for number in label.unique()[1:]:
        mask = (label == number).float()[None, None]
        pooled = torch.nn.functional.avg_pool3d(mask, (3, 5, 5), 1, (1, 2, 2))[0, 0]
        inner += pooled * mask[0, 0]
    return (inner + 0.1 * torch.randn(SIZE, generator=generator))[None]


def target_of(label):
    ids = label.unique()[1:]
    corners = [(label == i).nonzero() for i in ids]
    boxes = torch.stack([torch.cat([c.amin(0), c.amax(0) + 1]) for c in corners]).float()
    return {"label": label, "ids": ids, "boxes": boxes, "classes": torch.zeros(len(ids), dtype=torch.int64)}


def mask_iou(found, row, label, number):
    box = found["boxes"][row]
    mask = torch.zeros(SIZE, dtype=torch.bool)
    z1, y1, x1 = box[:3].floor().long().tolist()
    z2, y2, x2 = box[3:].ceil().long().tolist()
    mask[z1:z2, y1:y2, x1:x2] = paste_mask(found["mask_logits"][row], box)
    truth = label == number
    return ((mask & truth).sum() / (mask | truth).sum()).item()


@pytest.mark.long
def test_two_crops_are_learnt_by_heart(make_detector):
    labels = [boxes_crop(), ellipsoids_crop()]
    images = torch.stack([image_of(label) for label in labels])
    targets = [target_of(label) for label in labels]
    network = make_detector(
        anchor_shapes=[[(6, 10, 14), (8, 12, 16)]],
        mask_levels=["p1"],
        fpn_channels=16,
        box_hidden=64,
        mask_channels=16,
        mask_roi_size=(4, 6, 6),
        score_threshold=0.5,
    )
    criterion = MaskRCNNCriterion(matcher=IoUMatcher(foreground_iou=0.4, background_iou=0.2, match_best=True))
    steps = 300
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        losses = criterion(network(images, targets), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.inference_mode():
        detections = network(images)
    for found, target in zip(detections, targets, strict=True):
        assert len(found["boxes"]) == len(target["ids"])
        ids = target["ids"].tolist()
        iou = np.array([[mask_iou(found, row, target["label"], i) for i in ids] for row in range(len(found["boxes"]))])
        assert sorted(iou.argmax(1).tolist()) == list(range(len(ids)))
        assert iou.max(1).min() >= 0.5, iou.max(1).round(2).tolist()
