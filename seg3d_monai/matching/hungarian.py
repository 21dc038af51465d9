"""Optimal one-to-one assignment of queries to true instances (DETR, Carion et al. 2020, section 3.1).

Costs are those of Mask2Former (Cheng et al. 2022) and Mask DINO (Li et al. 2023): class, masks at points, boxes. All
layers of an image go through the same batched products, and one transfer brings every cost of a batch to the CPU.

Must not know losses. Indices only, no gradients.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from seg3d_monai.matching.points import PointSet
from seg3d_monai.ops.boxes import centre_extent, pairwise_giou

UNMATCHED = -1
CHUNK_SIZE = 2**20
"""Query-point pairs whose logits are held at once, 4 MB in float32: more is slower on a CPU, out of its cache."""
LEAST_LOGIT = -80.0
"""Where exp is still a normal float32; the loss there is 80 or 2e-35."""
LARGEST_COST = 1e6


class HungarianMatcher:
    """Assigns each true instance of an image the query of least total cost, for each layer on its own.

    Args:
        class_weight: weight of the class cost.
        mask_bce_weight: weight of the binary cross-entropy at the points, a mean over them.
        mask_dice_weight: weight of the Dice cost at the points, with 1 added above and below.
        box_l1_weight: weight of the L1 distance of (centre, extent) as shares of the crop; 0 does without.
        box_giou_weight: weight of minus the generalised IoU; 0 does without.
        class_cost: "focal" for K sigmoid logits, "softmax" for K + 1 logits of which the last is "no object".
        focal_alpha: weight of the positive term, in [0, 1].
        focal_gamma: exponent of the focal cost, >= 0.
        chunk_size: query-point pairs that are held at once.

    Raises:
        ValueError: an unknown class_cost, a negative weight, or none above 0.
    """

    def __init__(
        self,
        *,
        class_weight: float,
        mask_bce_weight: float,
        mask_dice_weight: float,
        box_l1_weight: float = 0.0,
        box_giou_weight: float = 0.0,
        class_cost: str = "focal",
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        if class_cost not in ("focal", "softmax"):
            raise ValueError(f"class_cost={class_cost!r} is unknown; choose 'focal' or 'softmax'")
        weights = {
            "class_weight": class_weight,
            "mask_bce_weight": mask_bce_weight,
            "mask_dice_weight": mask_dice_weight,
            "box_l1_weight": box_l1_weight,
            "box_giou_weight": box_giou_weight,
        }
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(f"weights {weights} cannot be used; give numbers >= 0, at least one above 0")
        self.class_weight = class_weight
        self.mask_bce_weight = mask_bce_weight
        self.mask_dice_weight = mask_dice_weight
        self.box_l1_weight = box_l1_weight
        self.box_giou_weight = box_giou_weight
        self.class_cost = class_cost
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.chunk_size = chunk_size

    @torch.no_grad()
    def __call__(
        self,
        predictions: Mapping[str, Any],
        targets: Sequence[Mapping[str, Tensor]],
        points: Sequence[PointSet],
        features: Sequence[Tensor],
        image_size: Sequence[int],
    ) -> Tensor:
        """Match the queries of L layers and N images.

        Args:
            predictions: {"class_logits" [L, N, Q, K] or [L, N, Q, K + 1], "mask_embeds" [L, N, Q, C], and, where the
                decoder has them, "boxes" [L, N, Q, 6] in voxels}.
            targets: for each image {"boxes" [G, 6], "classes" [G], ...}.
            points: for each image, its points.
            features: for each image, mask features [P, C] at the points.
            image_size: (D, H, W) of the crop.

        Returns:
            int64 [L, N, Q]: index of the true instance, or UNMATCHED (-1). With fewer queries than instances the
            instances of least cost are matched; what is not finite costs much and raises nothing.

        Raises:
            ValueError: a box weight above 0 and no boxes.
        """
        logits = predictions["class_logits"]
        costs = self.costs(predictions, targets, points, features, image_size)
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().double().numpy()
        flat = np.clip(np.nan_to_num(flat, nan=LARGEST_COST), -LARGEST_COST, LARGEST_COST)
        num_layers, num_images, num_queries = logits.shape[:3]
        matched = np.full((num_layers, num_images, num_queries), UNMATCHED, np.int64)
        start = 0
        for n, cost in enumerate(costs):
            for layer, table in enumerate(flat[start : start + cost.numel()].reshape(cost.shape)):
                queries, instances = linear_sum_assignment(table)
                matched[layer, n, queries] = instances
            start += cost.numel()
        return torch.from_numpy(matched).to(logits.device)

    @torch.no_grad()
    def costs(
        self,
        predictions: Mapping[str, Any],
        targets: Sequence[Mapping[str, Tensor]],
        points: Sequence[PointSet],
        features: Sequence[Tensor],
        image_size: Sequence[int],
    ) -> list[Tensor]:
        """Weighted costs [L, Q, G] of each image, at least float32; arguments as for the call."""
        has_boxes = predictions.get("boxes") is not None
        if (self.box_l1_weight or self.box_giou_weight) and not has_boxes:
            raise ValueError(
                f"box_l1_weight={self.box_l1_weight} and box_giou_weight={self.box_giou_weight} need predicted boxes; "
                "set both to 0 for a decoder without boxes"
            )
        costs = []
        with torch.autocast(predictions["class_logits"].device.type, enabled=False):
            class_costs = self.class_weight * self._class_cost(predictions["class_logits"])
            for n, target in enumerate(targets):
                cost = class_costs[:, n][..., target["classes"]]
                if self.mask_bce_weight or self.mask_dice_weight:
                    bce, dice = mask_costs(predictions["mask_embeds"][:, n], points[n], features[n], self.chunk_size)
                    cost.add_(bce, alpha=self.mask_bce_weight).add_(dice, alpha=self.mask_dice_weight)
                if has_boxes and (self.box_l1_weight or self.box_giou_weight):
                    l1, giou = box_costs(predictions["boxes"][:, n], target["boxes"], image_size)
                    cost.add_(l1, alpha=self.box_l1_weight).add_(giou, alpha=self.box_giou_weight)
                costs.append(cost)
        return costs

    def _class_cost(self, logits: Tensor) -> Tensor:
        """Cost [..., K or K + 1] of each class, were it the true one; logits likewise."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.class_cost == "softmax":
            return -logits.softmax(-1)
        prob = logits.sigmoid()
        positive = self.focal_alpha * (1 - prob) ** self.focal_gamma * -(prob + 1e-8).log()
        negative = (1 - self.focal_alpha) * prob**self.focal_gamma * -(1 - prob + 1e-8).log()
        return positive - negative


def mask_costs(
    embeds: Tensor, points: PointSet, features: Tensor, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """Costs of every query's mask for every instance, at the instance's points; ignored points have weight 0.

    Args:
        embeds: [L, Q, C].
        points: points of the image.
        features: [P, C], mask features at the points.
        chunk_size: query-point pairs that are held at once.

    Returns:
        Binary cross-entropy, a mean over the points, and Dice, both [L, Q, G].
    """
    rows = embeds.flatten(0, 1).to(features.dtype)
    weight = points.valid.to(rows.dtype)
    truth = points.occupancy.to(rows.dtype)
    num_uniform, (uniform, own) = points.num_uniform, points.split(features)
    per_query = num_uniform + len(truth) * points.num_own
    parts = []
    for some in rows.split(max(1, chunk_size // max(1, per_query))):
        # All instances look at the same uniform points: one batch of G rows. Own points: G batches of one row.
        of_crop = _sums(some, uniform[None], truth[None, :, :num_uniform], weight[None, :, :num_uniform])
        of_own = _sums(some, own, truth[:, None, num_uniform:], weight[:, None, num_uniform:])
        parts.append(of_crop + of_own)
    loss, overlap, area = (sums.unflatten(-1, embeds.shape[:2]).movedim(0, -1) for sums in torch.cat(parts, 2))
    bce = loss / weight.sum(1).clamp(min=1)
    return bce, 1 - (2 * overlap + 1) / (area + truth.sum(1) + 1)


def _sums(rows: Tensor, features: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Over points, the sums [3, B * S, R] of binary cross-entropy, of prob * truth and of prob.

    Args:
        rows: [R, C], embeds.
        features: [B, T, C], at T points of each of B batches.
        truth: [B, S, T], of S instances of each batch; 0 where the weight is 0.
        weight: [B, S, T].
    """
    # With t the truth, -t log p - (1 - t) log(1 - p) = (1 - t) x - log p: one logarithm of a probability that is at
    # hand, and products in place of sums over points.
    logit = torch.bmm(features, rows.t().expand(len(features), -1, -1)).clamp_(min=LEAST_LOGIT)
    away = torch.bmm(weight - truth, logit)
    prob = logit.sigmoid_()
    both = torch.bmm(torch.cat([truth, weight], 1), prob)
    overlap, area = both.unflatten(1, (2, truth.shape[1])).unbind(1)
    loss = away - torch.bmm(weight, prob.log_())
    return torch.stack([loss, overlap, area]).flatten(1, 2)


def box_costs(boxes: Tensor, truth: Tensor, image_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """L1 distance of (centre, extent) as shares of the crop, and minus generalised IoU, both [L, Q, G].

    Args:
        boxes: [L, Q, 6], voxels.
        truth: [G, 6], voxels.
        image_size: (D, H, W) of the crop.
    """
    rows = boxes.flatten(0, 1).to(torch.promote_types(boxes.dtype, torch.float32))
    truth = truth.to(rows.dtype)
    l1 = torch.cdist(centre_extent(rows, image_size), centre_extent(truth, image_size), p=1)
    giou = pairwise_giou(rows, truth)
    return l1.unflatten(0, boxes.shape[:2]), -giou.unflatten(0, boxes.shape[:2])
