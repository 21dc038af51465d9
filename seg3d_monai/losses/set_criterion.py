"""Losses of set prediction, for Mask2Former (Cheng et al. 2022) and Mask DINO (Li et al. 2023) in 3D.

Queries are matched to true instances layer by layer, and each layer has the same losses. Denoising queries (DN-DETR, Li
et al. 2022; DINO, Zhang et al. 2023) know their instance and are not matched. Masks are compared at points that are
drawn once an image. What is annotated as ignored costs nothing.

Must not know models; a decoder is known by its outputs only.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seg3d_monai.losses.selection_loss import selection_loss
from seg3d_monai.losses.set_losses import box_giou, box_l1, class_cross_entropy, class_focal, mask_bce, mask_dice
from seg3d_monai.matching import HungarianMatcher, PointSet, batch_point_features, sample_points
from seg3d_monai.matching.points import IGNORED_VALUE

logger = logging.getLogger(__name__)

SET_LOSSES = ("class", "mask_bce", "mask_dice", "box_l1", "box_giou", "selection")
NO_OBJECT = -1
PADDING = -2
"""Kinds of denoising queries that have no instance."""


@dataclass(frozen=True)
class _Image:
    """What the queries of one image are held against: the target, its points, and mask features [P, C] at them."""

    target: Mapping[str, Tensor]
    points: PointSet
    features: Tensor


class SetCriterion:
    """Weighted losses of a decoder's predictions: last layer, other layers, encoder, denoising.

    Args:
        matcher: assigns queries to true instances.
        num_uniform_points: points of an image that are spread over the crop, >= 0.
        num_instance_points: points of each instance around it, >= 0.
        class_loss: "focal" for K logits, or "cross_entropy" for K + 1 logits of which the last is "no object".
        no_object_weight: weight of "no object" in the cross-entropy, > 0.
        focal_alpha: weight of positives in the focal loss, in [0, 1].
        focal_gamma: exponent of the focal loss, >= 0.
        weights: weight of some of "class", "mask_bce", "mask_dice", "box_l1", "box_giou", "selection"; others 1.

    Raises:
        ValueError: a weight for a loss that does not exist, no points, an unknown class_loss, or one that does not
            go with the matcher's class cost.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        num_uniform_points: int = 512,
        num_instance_points: int = 128,
        class_loss: str = "focal",
        no_object_weight: float = 0.1,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        unknown = set(weights or {}) - set(SET_LOSSES)
        if unknown:
            raise ValueError(f"weights {sorted(unknown)} are not losses; choose from {list(SET_LOSSES)}")
        if min(num_uniform_points, num_instance_points) < 0 or num_uniform_points + num_instance_points == 0:
            raise ValueError(
                f"num_uniform_points={num_uniform_points} and num_instance_points={num_instance_points} give no points "
                "to compare masks at; give numbers >= 0, at least one above 0"
            )
        if class_loss not in ("focal", "cross_entropy"):
            raise ValueError(f"class_loss={class_loss!r} is unknown; choose 'focal' or 'cross_entropy'")
        if no_object_weight <= 0:
            raise ValueError(f"no_object_weight={no_object_weight} cannot be used; give a number above 0")
        wanted_cost = "focal" if class_loss == "focal" else "softmax"
        if matcher.class_cost != wanted_cost:
            raise ValueError(
                f"class_loss={class_loss!r} does not go with the matcher's class_cost={matcher.class_cost!r}; "
                f"give the matcher class_cost={wanted_cost!r}"
            )
        self.matcher = matcher
        self.num_uniform_points = num_uniform_points
        self.num_instance_points = num_instance_points
        self.class_loss = class_loss
        self.no_object_weight = no_object_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.weights = dict.fromkeys(SET_LOSSES, 1.0) | dict(weights or {})
        self._warned = False

    def __call__(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            outputs: {"names" of the L predictions, the last layer last and "encoder" for the encoder's;
                "class_logits" [L, N, Q, K or K + 1]; "mask_embeds" [L, N, Q, C]; "boxes" [L, N, Q, 6] in voxels, if
                the decoder has them; "mask_features" [N, C, d, h, w]; "mask_stride" (z, y, x); "denoising", if any,
                the first three likewise [L', N, T, ...] and "target_index" int64 [N, T]: an instance, -1 for no
                object, -2 for padding; "tokens", of decoders that choose their queries among tokens, see
                `selection_loss`}.
            targets: for each image {"label" [D, H, W], "ids" [G], "boxes" [G, 6], "classes" [G]}.

        Returns:
            {name: weighted scalar}; their sum is the loss. For each loss NAME, "NAME" of the last layer, "aux_NAME"
            summed over the other layers, "encoder_NAME", of decoders with boxes "denoising_NAME" summed over layers,
            and of decoders that choose their queries "selection". Names depend on the decoder only, not on the batch,
            and each loss is attached to the graph.

            Masks and boxes are sums over matched queries divided by the batch's number of instances (denoising: of
            positive queries), or by 1; so is the focal class loss, summed over all queries. Cross-entropy is a
            weighted mean over the queries.

        Raises:
            ValueError: names that do not fit the predictions, or a class that has no logit.
        """
        with torch.autocast(outputs["class_logits"].device.type, enabled=False):
            return self._losses(outputs, targets)

    def _losses(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        denoising = outputs.get("denoising")
        names = list(outputs["names"])
        num_layers, _, num_queries, num_logits = outputs["class_logits"].shape
        if len(names) != num_layers or names[-1:] in ([], ["encoder"]):
            raise ValueError(f"names {names} do not name {num_layers} predictions, the last layer last")
        self._warn_once(targets, num_queries)
        num_classes = num_logits - (self.class_loss == "cross_entropy")
        num_copies = _check_counts(targets, num_classes, denoising)

        points = [
            sample_points(target, num_uniform=self.num_uniform_points, num_own=self.num_instance_points)
            for target in targets
        ]
        coordinates = [p.coordinates for p in points]
        features = batch_point_features(outputs["mask_features"], outputs["mask_stride"], coordinates)
        matched = self.matcher(outputs, targets, points, features, targets[0]["label"].shape)
        num_instances = sum(len(target["ids"]) for target in targets)
        images = [_Image(*parts) for parts in zip(targets, points, features, strict=True)]
        by_layer = self._by_layer(outputs, matched, 1, images, max(1, num_instances))
        if not num_instances:  # no mask was looked at; its features get a gradient all the same, of zeros
            by_layer["mask_bce"] = by_layer["mask_bce"] + 0 * outputs["mask_features"].sum()

        losses = {name: loss[-1] for name, loss in by_layer.items()}
        encoder = [row for row, name in enumerate(names) if name == "encoder"]
        others = [row for row, name in enumerate(names[:-1]) if name != "encoder"]
        for prefix, rows in (("aux", others), ("encoder", encoder)):
            if rows:
                losses |= {
                    f"{prefix}_{n}": torch.stack([loss[row] for row in rows]).sum() for n, loss in by_layer.items()
                }
        if denoising is not None:
            index = denoising["target_index"]
            known = index.expand(len(denoising["class_logits"]), *index.shape)
            num_positive = (index >= 0).sum().clamp(min=1)
            by_layer = self._by_layer(denoising, known, num_copies, images, num_positive)
        if denoising is not None or "box_l1" in by_layer:
            factor = 0 if denoising is None else 1  # without denoising queries the names stay, and the graph
            losses |= {f"denoising_{name}": factor * loss.sum() for name, loss in by_layer.items()}
        if "tokens" in outputs:
            losses["selection"] = self.weights["selection"] * selection_loss(outputs["tokens"], targets)
        return losses

    def _by_layer(
        self,
        predictions: Mapping[str, Tensor],
        matched: Tensor,
        num_copies: int,
        images: Sequence[_Image],
        count: int | Tensor,
    ) -> dict[str, Tensor]:
        """Weighted losses [L] of queries whose instance is known.

        Args:
            predictions: class_logits, mask_embeds and, if any, boxes, each [L, N, Q, ...].
            matched: int64 [L, N, Q], an instance, NO_OBJECT or PADDING.
            num_copies: most queries of one layer and image that have the same instance.
            images: the truth.
            count: what sums are divided by.
        """
        embeds, boxes = _wide(predictions["mask_embeds"]), predictions.get("boxes")
        # Sums begin as zeros of the graph: with no instance at all every parameter still gets a gradient.
        sums = dict.fromkeys(("mask_bce", "mask_dice"), 0 * embeds.flatten(1).sum(1))
        if boxes is not None:
            boxes = _wide(boxes)
            sums |= dict.fromkeys(("box_l1", "box_giou"), 0 * boxes.flatten(1).sum(1))
        for n, image in enumerate(images):
            target, num_instances = image.target, len(image.target["ids"])
            if not num_instances:
                continue
            table = queries_of_instances(matched[:, n], num_instances, num_copies)
            bce, dice = _mask_losses(_take(embeds[:, n], table), image)
            found = {"mask_bce": bce, "mask_dice": dice}
            if boxes is not None:
                box, truth = _take(boxes[:, n], table), target["boxes"].to(boxes.dtype)[:, None]
                found |= {"box_l1": box_l1(box, truth, target["label"].shape), "box_giou": box_giou(box, truth)}
            sums = {name: total + (found[name] * (table >= 0)).sum((1, 2)) for name, total in sums.items()}
        losses = {"class": self._class_loss(predictions, matched, images, count)}
        losses |= {name: total / count for name, total in sums.items()}
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    def _class_loss(
        self, predictions: Mapping[str, Tensor], matched: Tensor, images: Sequence[_Image], count: int | Tensor
    ) -> Tensor:
        logits = _wide(predictions["class_logits"])
        classes, counted = [], []
        for n, (image, index) in enumerate(zip(images, matched.unbind(1), strict=True)):
            truth = torch.cat([image.target["classes"], index.new_tensor([NO_OBJECT])])
            classes.append(truth[torch.where(index < 0, len(truth) - 1, index)])
            counted.append((index >= 0) | ((index == NO_OBJECT) & ~_on_ignored(predictions, n, image)))
        arguments = (logits, torch.stack(classes, 1), torch.stack(counted, 1))
        if self.class_loss == "focal":
            loss = class_focal(*arguments, alpha=self.focal_alpha, gamma=self.focal_gamma) / count
        else:
            loss = class_cross_entropy(*arguments, no_object_weight=self.no_object_weight)
        return loss.sum((1, 2))

    def _warn_once(self, targets: Sequence[Mapping[str, Tensor]], num_queries: int) -> None:
        most = max(len(target["ids"]) for target in targets)
        if most > num_queries and not self._warned:
            self._warned = True
            logger.warning(
                "an image has %d instances and the decoder %d queries: some instances are not learned there; "
                "raise num_queries or use smaller crops",
                most,
                num_queries,
            )


@torch.no_grad()
def queries_of_instances(matched: Tensor, num_instances: int, num_copies: int) -> Tensor:
    """The queries of each instance.

    Args:
        matched: int64 [L, Q], the instance of each query, negative for none.
        num_instances: G.
        num_copies: most queries of one layer that have the same instance, r >= 1.

    Returns:
        int64 [L, G, r]: queries in ascending order, then -1.
    """
    owner, query = torch.where(matched < 0, num_instances, matched).sort(dim=1, stable=True)
    owner = owner.contiguous()
    copy = torch.arange(owner.shape[1], device=owner.device) - torch.searchsorted(owner, owner)
    table = torch.full((len(matched), (num_instances + 1) * num_copies), -1, device=matched.device)
    # The queries of no instance end in a row of their own, which is dropped.
    table.scatter_(1, owner * num_copies + copy.clamp(max=num_copies - 1), query)
    return table.view(len(matched), num_instances + 1, num_copies)[:, :-1]


@torch.no_grad()
def _on_ignored(predictions: Mapping[str, Tensor], n: int, image: _Image) -> Tensor:
    """Whether the object of each query of image n, bool [L, Q], lies on ignored voxels.

    It does if its box is centred there, or without boxes if most of its mask lies there, at the points that are spread
    over the crop; a mask that holds none of them lies on nothing.
    """
    label, points = image.target["label"], image.points
    if predictions.get("boxes") is not None:
        boxes = predictions["boxes"][:, n]
        size = torch.tensor(label.shape, device=label.device)
        z, y, x = ((boxes[..., :3] + boxes[..., 3:]) / 2).floor().long().clamp(min=0).minimum(size - 1).unbind(-1)
        return label[z, y, x] == IGNORED_VALUE
    embeds, features = predictions["mask_embeds"][:, n], image.features
    ignored = points.values[: points.num_uniform] == IGNORED_VALUE
    if not ignored.any():
        return torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    inside = (embeds.to(features.dtype) @ points.split(features)[0].t() > 0).to(features.dtype)
    on, area = inside @ ignored.to(features.dtype), inside.sum(-1)
    return 2 * on > area


def _mask_losses(embeds: Tensor, image: _Image) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice [L, G, r] of masks given by embeds [L, G, r, C], each at its instance's points."""
    num_layers, _, num_copies, _ = embeds.shape
    rows = embeds.transpose(0, 1).flatten(1, 2)  # [G, L * r, C]: an instance's own features serve all layers
    points, (uniform, own) = image.points, image.points.split(image.features)
    logits = torch.cat([rows @ uniform.t(), torch.bmm(rows, own.transpose(1, 2))], 2)
    occupancy, valid = (mask[:, None].to(logits.dtype) for mask in (points.occupancy, points.valid))
    losses = mask_bce(logits, occupancy, valid), mask_dice(logits, occupancy, valid)
    bce, dice = (loss.unflatten(1, (num_layers, num_copies)).transpose(0, 1) for loss in losses)
    return bce, dice


def _take(values: Tensor, table: Tensor) -> Tensor:
    """Rows [L, G, r, C] of values [L, Q, C] by a table int64 [L, G, r]; row 0 where the table is negative."""
    index = table.clamp(min=0).flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index).unflatten(1, table.shape[1:])


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_counts(
    targets: Sequence[Mapping[str, Tensor]], num_classes: int, denoising: Mapping[str, Tensor] | None
) -> int:
    """Most denoising queries of one instance, at least 1, after a look at the classes; one transfer for both."""
    classes = torch.cat([target["classes"] for target in targets])
    found = [classes.new_zeros(1), classes]
    copies = classes.new_ones(1)
    if denoising is not None:
        index = denoising["target_index"]
        most = max(len(target["ids"]) for target in targets)
        counts = index.new_zeros(len(index), most + 1)
        counts.scatter_add_(1, torch.where(index < 0, most, index), torch.ones_like(index))
        copies = torch.cat([copies, counts[:, :-1].flatten()])
    least, largest, num_copies = torch.stack([torch.cat(found).min(), torch.cat(found).max(), copies.max()]).tolist()
    if least < 0 or largest >= num_classes:
        raise ValueError(
            f"class {least if least < 0 else largest} of a target is not in [0, {num_classes}); the decoder has "
            f"{num_classes} classes: raise its num_classes or correct the class table"
        )
    return int(num_copies)
