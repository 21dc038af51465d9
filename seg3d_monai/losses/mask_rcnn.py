"""Losses of Mask R-CNN (He et al. 2017) in 3D: anchors, RoIs and masks, against label volume + ids.

Objectness is binary cross-entropy and class is cross-entropy, boxes are smooth L1 on encoded deltas, masks are binary
cross-entropy plus soft Dice, which keeps thin and small masks from being outvoted by their box's background.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seg3d_monai.losses.mask_targets import mask_targets
from seg3d_monai.matching import IoUMatcher, sample_balanced
from seg3d_monai.ops.boxes import ANCHOR_WEIGHTS, ROI_WEIGHTS, encode_boxes

LOSSES = ("objectness", "anchor_box", "class", "roi_box", "mask_bce", "mask_dice")


class MaskRCNNCriterion:
    """Weighted losses of `MaskRCNN3d`'s training outputs.

    Args:
        matcher: assigns anchors to true boxes.
        num_anchor_samples: anchors of an image that enter the loss.
        anchor_foreground_fraction: largest share of foreground among them.
        weights: weight of some of "objectness", "anchor_box", "class", "roi_box", "mask_bce", "mask_dice"; others 1.

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

    def __call__(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            outputs: training outputs of `MaskRCNN3d`.
            targets: for each image {"label" [D, H, W], "ids" [G], "boxes" [G, 6], "classes" [G]}.

        Returns:
            {name: weighted scalar}; their sum is the loss. Each is attached to the graph, also with no instance.
        """
        losses = self._anchor_losses(outputs, targets) | self._roi_losses(outputs, targets)
        losses |= self._mask_losses(outputs, targets)
        return {name: self.weights[name] * losses[name] for name in LOSSES}

    def _anchor_losses(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        anchors = outputs["anchors"]
        logits, labels, deltas, wanted = [], [], [], []
        for n, target in enumerate(targets):
            matched = self.matcher(anchors, target["boxes"], target["label"])
            foreground, background = sample_balanced(matched, self.num_anchor_samples, self.anchor_foreground_fraction)
            rows = torch.cat([foreground, background])
            logits.append(outputs["objectness"][n, rows])
            labels.append((matched[rows] >= 0).float())
            deltas.append(outputs["anchor_deltas"][n, foreground])
            wanted.append(encode_boxes(target["boxes"][matched[foreground]], anchors[foreground], ANCHOR_WEIGHTS))
        logit, count = torch.cat(logits), max(1, sum(len(v) for v in logits))
        box = F.smooth_l1_loss(torch.cat(deltas), torch.cat(wanted), beta=1 / 9, reduction="sum")
        return {
            "objectness": F.binary_cross_entropy_with_logits(logit, torch.cat(labels), reduction="sum") / count,
            "anchor_box": box / count,
        }

    def _roi_losses(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        logits, matched = outputs["class_logits"], outputs["roi_matched"]
        foreground = (matched >= 0).nonzero().squeeze(1)
        batch, index = outputs["roi_batch"][foreground], matched[foreground]
        classes = torch.full_like(matched, logits.shape[1] - 1)
        classes[foreground] = _lookup(targets, "classes", batch, index)
        boxes = _lookup(targets, "boxes", batch, index)
        wanted = encode_boxes(boxes, outputs["rois"][foreground], ROI_WEIGHTS)
        count = max(1, len(matched))
        box = F.smooth_l1_loss(outputs["roi_deltas"][foreground], wanted, reduction="sum")
        return {"class": F.cross_entropy(logits, classes, reduction="sum") / count, "roi_box": box / count}

    def _mask_losses(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        batch, index = outputs["mask_batch"], outputs["mask_matched"]
        classes = _lookup(targets, "classes", batch, index)
        logits = outputs["mask_logits"][torch.arange(len(classes), device=classes.device), classes]
        occupancy, valid = [logits.new_zeros((0, *logits.shape[1:]))], [logits.new_zeros((0, *logits.shape[1:])).bool()]
        for n, target in enumerate(targets):
            rows = batch == n
            grid = mask_targets(
                target["label"], target["ids"][index[rows]], outputs["mask_rois"][rows], logits.shape[1:]
            )
            occupancy.append(grid[0])
            valid.append(grid[1])
        wanted, weight = torch.cat(occupancy).flatten(1), torch.cat(valid).flatten(1).float()
        logits = logits.flatten(1)
        bce = F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="sum")
        prob = logits.sigmoid() * weight
        overlap = (prob * wanted).sum(1)
        dice = 1 - (2 * overlap + 1) / (prob.sum(1) + (wanted * weight).sum(1) + 1)
        return {"mask_bce": bce / weight.sum().clamp(min=1), "mask_dice": dice.sum() / max(1, len(dice))}


def _lookup(targets: Sequence[Mapping[str, Tensor]], key: str, batch: Tensor, index: Tensor) -> Tensor:
    """targets[batch[i]][key][index[i]] for each i, as one tensor; `batch` is ascending."""
    return torch.cat([target[key][index[batch == n]] for n, target in enumerate(targets)])
