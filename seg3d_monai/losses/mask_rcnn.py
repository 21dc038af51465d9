"""Losses of Mask R-CNN (He et al. 2017) in 3D: anchors, RoIs, masks, semantic maps, against label volume + ids.

Objectness is binary cross-entropy and class is cross-entropy, boxes are smooth L1 on encoded deltas, masks are binary
cross-entropy plus soft Dice, which keeps thin and small masks from being outvoted by their box's background.

Each loss is a mean over the samples of an image, then over images (masks: over images that have instances), so that it
does not matter which images are in one batch.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seg3d_monai.losses.counts import Counts, count_targets, or_one
from seg3d_monai.losses.semantic import semantic_losses
from seg3d_monai.matching import IoUMatcher, sample_balanced
from seg3d_monai.ops import mask_targets3d
from seg3d_monai.ops.boxes import ANCHOR_WEIGHTS, ROI_WEIGHTS, encode_boxes

LOSSES = ("objectness", "anchor_box", "class", "roi_box", "mask_bce", "mask_dice", "semantic_bce", "semantic_dice")


class MaskRCNNCriterion:
    """Weighted losses of `MaskRCNN3d`'s training outputs.

    Args:
        matcher: assigns anchors to true boxes.
        num_anchor_samples: anchors of an image that enter the loss.
        anchor_foreground_fraction: largest share of foreground among them.
        weights: weights of some of `LOSSES`; others 1. Those of semantic maps exist with a network that has them.

    Raises:
        ValueError: a weight for a loss that does not exist.
    """

    def __init__(
        self,
        *,
        matcher: IoUMatcher,
        num_anchor_samples: int = 256,
        anchor_foreground_fraction: float = 0.5,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        unknown = set(weights or {}) - set(LOSSES)
        if unknown:
            raise ValueError(f"weights {sorted(unknown)} are not losses; choose from {list(LOSSES)}")
        self.matcher = matcher
        self.num_anchor_samples = num_anchor_samples
        self.anchor_foreground_fraction = anchor_foreground_fraction
        self.weights = dict.fromkeys(LOSSES, 1.0) | dict(weights or {})

    count = staticmethod(count_targets)

    def __call__(
        self,
        outputs: Mapping[str, Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        counts: Counts | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            outputs: training outputs of `MaskRCNN3d`.
            targets: for each image {"label" [D, H, W], "ids" [G], "boxes" [G, 6], "classes" [G]}.
            counts: what sums over images are divided by, as `count` gives it; the batch's own by default.

        Returns:
            {name: weighted scalar}; their sum is the loss. Each is attached to the graph, also with no instance.
        """
        counts = count_targets(targets) if counts is None else counts
        losses = self._anchor_losses(outputs, targets) | self._roi_losses(outputs, targets)
        if "semantic_logits" in outputs:
            losses |= semantic_losses(outputs["semantic_logits"], [target["label"] for target in targets])
        losses = {name: loss / counts["images"] for name, loss in losses.items()}
        masks = self._mask_losses(outputs, targets)
        losses |= {name: loss / or_one(counts["occupied"]) for name, loss in masks.items()}
        return {name: self.weights[name] * losses[name] for name in LOSSES if name in losses}

    def _anchor_losses(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Sums over images, as those that follow."""
        anchors = outputs["anchors"]
        found, missed, boxes = [], [], []  # foreground and background rows among the anchors of all images in a row
        for n, target in enumerate(targets):
            matched = self.matcher(anchors, target["boxes"], target["label"])
            foreground, background = sample_balanced(matched, self.num_anchor_samples, self.anchor_foreground_fraction)
            found.append(foreground + n * len(anchors))
            missed.append(background + n * len(anchors))
            boxes.append(target["boxes"][matched[foreground]])
        foreground, rows = torch.cat(found), torch.cat(found + missed)
        logits = outputs["objectness"].flatten().index_select(0, rows)
        deltas = outputs["anchor_deltas"].flatten(0, 1).index_select(0, foreground)
        is_object = (torch.arange(len(rows), device=rows.device) < len(foreground)).to(logits)
        wanted = encode_boxes(torch.cat(boxes), anchors[foreground % len(anchors)], ANCHOR_WEIGHTS)
        share = _shares(rows // len(anchors), len(targets))
        box = F.smooth_l1_loss(deltas, wanted, beta=1 / 9, reduction="none").sum(1)
        return {
            "objectness": F.binary_cross_entropy_with_logits(logits, is_object, weight=share, reduction="sum"),
            "anchor_box": (box * share[: len(foreground)]).sum(),
        }

    def _roi_losses(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        logits, matched = outputs["class_logits"], outputs["roi_matched"]
        foreground = (matched >= 0).nonzero().squeeze(1)
        counts, index = _counts(outputs["roi_batch"][foreground], len(targets)), matched[foreground]
        classes = torch.full_like(matched, logits.shape[1] - 1)
        classes[foreground] = _lookup(targets, "classes", index, counts)
        boxes = _lookup(targets, "boxes", index, counts)
        wanted = encode_boxes(boxes, outputs["rois"][foreground], ROI_WEIGHTS)
        share = _shares(outputs["roi_batch"], len(targets))
        box = F.smooth_l1_loss(outputs["roi_deltas"][foreground], wanted, reduction="none").sum(1)
        return {
            "class": (F.cross_entropy(logits, classes, reduction="none") * share).sum(),
            "roi_box": (box * share[foreground]).sum(),
        }

    def _mask_losses(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        logits, matched = outputs["mask_logits"], outputs["mask_matched"]
        counts = _counts(outputs["mask_batch"], len(targets))
        rois = outputs["mask_rois"].split(counts)
        grids = [
            mask_targets3d(target["label"], target["ids"][index], boxes, logits.shape[2:])
            for target, index, boxes in zip(targets, matched.split(counts), rois, strict=True)
        ]
        classes = _lookup(targets, "classes", matched, counts)
        rows = torch.arange(len(logits), device=logits.device) * logits.shape[1] + classes
        logits = logits.flatten(2).flatten(0, 1).index_select(0, rows)  # as logits[arange, classes], gradient faster
        wanted, weight = (torch.cat(parts).flatten(1).to(logits) for parts in zip(*grids, strict=True))
        bce = F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="none").sum(1)
        prob = logits.sigmoid() * weight
        overlap = (prob * wanted).sum(1)
        dice = 1 - (2 * overlap + 1) / (prob.sum(1) + (wanted * weight).sum(1) + 1)
        batch = outputs["mask_batch"]
        bins = weight.new_zeros(len(targets)).index_add_(0, batch, weight.sum(1)).clamp(min=1)
        return {"mask_bce": (bce / bins[batch]).sum(), "mask_dice": (dice * _shares(batch, len(targets))).sum()}


def _shares(batch: Tensor, num_images: int) -> Tensor:
    """One over the number of rows of the same image [R]; `batch` [R] is the image of each row."""
    return 1 / (batch == torch.arange(num_images, device=batch.device)[:, None]).sum(1)[batch]


def _counts(batch: Tensor, num_images: int) -> list[int]:
    """How many rows each image has, for `split`; `batch` [R] is ascending."""
    return (batch == torch.arange(num_images, device=batch.device)[:, None]).sum(1).tolist()


def _lookup(targets: Sequence[Mapping[str, Tensor]], key: str, index: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows `index` [R] of the images' targets[key], as one tensor; the first counts[0] are of the first image, ..."""
    return torch.cat([target[key][rows] for target, rows in zip(targets, index.split(counts), strict=True)])
