"""Losses of set prediction, for Mask2Former (Cheng et al. 2022) and Mask DINO (Li et al. 2023) in 3D.

Queries are matched to true instances layer by layer, and each layer has the same losses. Denoising queries (DN-DETR, Li
et al. 2022; DINO, Zhang et al. 2023) know their instance and are not matched. Masks are compared at points that are
drawn once an image. What is annotated as ignored costs nothing.

Must not know models; a decoder is known by its outputs only.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seg3d_monai.losses.counts import Counts, count_targets, or_one
from seg3d_monai.losses.selection_loss import on_annotated, selection_loss
from seg3d_monai.losses.set_losses import box_giou, box_l1, class_cross_entropy, class_focal, mask_bce, mask_dice
from seg3d_monai.matching import HungarianMatcher, PointSet, batch_point_features, sample_points
from seg3d_monai.matching.points import IGNORED_VALUE

logger = logging.getLogger(__name__)

SET_LOSSES = ("class", "mask_bce", "mask_dice", "box_l1", "box_giou", "selection")
BOX_LOSSES = ("box_l1", "box_giou")
NO_OBJECT = -1
PADDING = -2
"""Kinds of denoising queries that have no instance."""


@dataclass(frozen=True)
class _Truth:
    """What queries are held against: the targets of a batch, its points, and mask features [P, C] at them."""

    targets: Sequence[Mapping[str, Tensor]]
    points: Sequence[PointSet]
    features: Sequence[Tensor]

    def joined(self, key: str) -> Tensor:
        """What the targets say of their instances, of those of all images in one list."""
        return torch.cat([target[key] for target in self.targets])

    def rows(self, matched: Tensor) -> Tensor:
        """Instances int64 [L, N, Q] of each image as rows of that list; what is negative stays."""
        starts = accumulate((len(target["ids"]) for target in self.targets), initial=0)
        rows = [index + start for index, start in zip(matched.unbind(1), starts, strict=False)]
        return torch.where(matched < 0, matched, torch.stack(rows, 1))


@dataclass(frozen=True)
class _Queries:
    """Queries whose instance is known.

    Attributes:
        predictions: class_logits, mask_embeds and, if any, boxes, each [L, N, Q, ...].
        matched: int64 [L, N, Q], the row of an instance among those of all images, NO_OBJECT or PADDING.
        table: int64 [G, L * r], the queries of each of them among L * N * Q, -1 where a layer has fewer than r.
        count: what sums over instances are divided by.
        weight: what the cross-entropy of all queries is divided by, their weights in it.
    """

    predictions: Mapping[str, Tensor]
    matched: Tensor
    table: Tensor
    count: float
    weight: float


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

    count = staticmethod(count_targets)

    def __call__(
        self,
        outputs: Mapping[str, Any],
        targets: Sequence[Mapping[str, Tensor]],
        counts: Counts | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            outputs: {"names" of the L predictions, the last layer last and "encoder" for the encoder's;
                "class_logits" [L, N, Q, K or K + 1]; "mask_embeds" [L, N, Q, C]; "boxes" [L, N, Q, 6] in voxels, if
                the decoder has them; "mask_features" [N, C, d, h, w]; "mask_stride" (z, y, x); "denoising", if any,
                the first three likewise [L', N, T, ...] and "target_index" int64 [N, T]: an instance, -1 for no
                object, -2 for padding; "tokens", of decoders that choose their queries among tokens, see
                `selection_loss`}.
            targets: for each image {"label" [D, H, W], "ids" [G], "boxes" [G, 6], "classes" [G]}.
            counts: numbers of images and instances that sums are divided by, as `count` gives them; the batch's own by
                default.

        Returns:
            {name: weighted scalar}; their sum is the loss. For each loss NAME, "NAME" of the last layer, "aux_NAME"
            summed over the other layers, "encoder_NAME", of decoders with boxes "denoising_NAME" summed over layers,
            and of decoders that choose their queries "selection". Names depend on the decoder only, not on the batch,
            and each loss is attached to the graph.

            Masks and boxes are sums over matched queries divided by the number of instances (denoising: of positive
            queries), or by 1; so is the focal class loss, summed over all queries. Cross-entropy is a weighted mean
            over the queries, of which those on ignored voxels cost nothing.

        Raises:
            ValueError: names that do not fit the predictions, or a class that has no logit.
        """
        with torch.autocast(outputs["class_logits"].device.type, enabled=False):
            return self._losses(outputs, targets, counts)

    def _losses(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]], counts: Counts | None
    ) -> dict[str, Tensor]:
        own = count_targets(targets)
        counts = own if counts is None else counts
        denoising = outputs.get("denoising")
        names = list(outputs["names"])
        num_layers, _, num_queries, num_logits = outputs["class_logits"].shape
        if len(names) != num_layers or names[-1:] in ([], ["encoder"]):
            raise ValueError(f"names {names} do not name {num_layers} predictions, the last layer last")
        self._warn_once(targets, num_queries)
        num_classes = num_logits - (self.class_loss == "cross_entropy")
        num_copies, num_positive, num_negative = _check_counts(targets, num_classes, denoising)

        points = [
            sample_points(target, num_uniform=self.num_uniform_points, num_own=self.num_instance_points)
            for target in targets
        ]
        coordinates = [p.coordinates for p in points]
        features = batch_point_features(outputs["mask_features"], outputs["mask_stride"], coordinates)
        matched = self.matcher(outputs, targets, points, features, targets[0]["label"].shape)
        truth = _Truth(targets, points, features)
        num_negative_queries = counts["images"] * num_queries - counts["instances"]
        weight = counts["instances"] + self.no_object_weight * num_negative_queries
        known = [_queries(outputs, matched, 1, truth, counts["instances"], weight)]
        if denoising is not None:
            index = denoising["target_index"].expand(len(denoising["class_logits"]), -1, -1)
            share = counts["instances"] / or_one(own["instances"])  # as many copies of each instance in other batches
            weight = share * (num_positive + self.no_object_weight * num_negative)
            known.append(_queries(denoising, index, num_copies, truth, share * num_positive, weight))
        has_boxes = outputs.get("boxes") is not None
        kinds = [name for name in SET_LOSSES[:-1] if has_boxes or name not in BOX_LOSSES]
        of_layers, *of_denoising = self._by_layer(known, truth, kinds)

        layers = of_layers.unbind(1)
        losses = dict(zip(kinds, layers[-1], strict=True))
        encoder = [row for row, name in enumerate(names) if name == "encoder"]
        others = [row for row, name in enumerate(names[:-1]) if name != "encoder"]
        for prefix, rows in (("aux", others), ("encoder", encoder)):
            if rows:
                total = torch.stack([layers[row] for row in rows]).sum(0)
                losses |= {f"{prefix}_{kind}": loss for kind, loss in zip(kinds, total, strict=True)}
        if of_denoising or has_boxes:
            # Without denoising queries the names stay, and the graph.
            total = of_denoising[0].sum(1) if of_denoising else 0 * of_layers.sum(1)
            losses |= {f"denoising_{kind}": loss for kind, loss in zip(kinds, total, strict=True)}
        if "tokens" in outputs:
            losses["selection"] = self.weights["selection"] * selection_loss(
                outputs["tokens"], targets, or_one(counts["instances"])
            )
        return losses

    def _by_layer(self, known: Sequence[_Queries], truth: _Truth, kinds: Sequence[str]) -> list[Tensor]:
        """Weighted losses [kinds, L] of each set of queries."""
        weighted = []
        for queries, sums in zip(known, _instance_losses(known, truth), strict=True):
            losses = [self._class_loss(queries, truth), *(sums / queries.count)]
            weighted.append(torch.stack([self.weights[kind] * loss for kind, loss in zip(kinds, losses, strict=True)]))
        return weighted

    def _class_loss(self, queries: _Queries, truth: _Truth) -> Tensor:
        """[L]."""
        logits, matched = _wide(queries.predictions["class_logits"]), queries.matched
        classes = F.pad(truth.joined("classes"), (0, 1), value=NO_OBJECT)[matched.clamp(min=NO_OBJECT)]
        counted = torch.where(matched == NO_OBJECT, _on_annotated(queries.predictions, truth), matched >= 0)
        if self.class_loss == "focal":
            loss = class_focal(logits, classes, counted, alpha=self.focal_alpha, gamma=self.focal_gamma)
            return loss.sum((1, 2)) / queries.count
        loss = class_cross_entropy(logits, classes, counted, no_object_weight=self.no_object_weight)
        return loss.sum((1, 2)) / queries.weight

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
def _queries(
    predictions: Mapping[str, Tensor], matched: Tensor, num_copies: int, truth: _Truth, count: float, weight: float
) -> _Queries:
    """Queries that are matched, int64 [L, N, Q], to an instance of their image, at most `num_copies` to each."""
    matched = truth.rows(matched)
    table = queries_of_instances(matched.flatten(1), sum(len(p.occupancy) for p in truth.points), num_copies)
    start = torch.arange(0, matched.numel(), matched[0].numel(), device=table.device)[:, None, None]
    table = torch.where(table < 0, table, table + start).transpose(0, 1).flatten(1)
    return _Queries(predictions, matched, table, or_one(count), or_one(weight))


@torch.no_grad()
def _on_annotated(predictions: Mapping[str, Tensor], truth: _Truth) -> Tensor:
    """Whether the object of each query, bool [L, N, Q], lies on voxels that are not ignored.

    It does not if its box is centred on an ignored one, or without boxes if most of its mask lies there, at the points
    that are spread over the crop; a mask that holds none of them lies on nothing.
    """
    boxes, embeds = predictions.get("boxes"), predictions["mask_embeds"]
    if boxes is not None:
        centres = (boxes[..., :3] + boxes[..., 3:]) / 2
        return on_annotated(truth.targets, centres.transpose(0, 1)).transpose(0, 1)
    ignored = torch.stack([p.values[: p.num_uniform] for p in truth.points]) == IGNORED_VALUE
    if not ignored.any():
        return torch.ones(embeds.shape[:3], dtype=torch.bool, device=embeds.device)
    features = torch.stack([p.split(rows)[0] for p, rows in zip(truth.points, truth.features, strict=True)])
    rows = embeds.transpose(0, 1).flatten(1, 2).to(features.dtype)
    inside = (torch.bmm(rows, features.transpose(1, 2)) > 0).to(features.dtype)
    on_ignored = torch.bmm(inside, ignored[..., None].to(features.dtype)).squeeze(2)
    return (2 * on_ignored <= inside.sum(2)).unflatten(1, embeds.shape[::2]).transpose(0, 1)


def _instance_losses(known: Sequence[_Queries], truth: _Truth) -> list[Tensor]:
    """Losses of the masks and, if any, the boxes of each set of queries, sums [2 or 4, L] over instances."""
    losses = _mask_losses(_of_instances(known, "mask_embeds"), truth)
    if known[0].predictions.get("boxes") is not None:
        boxes, size = _of_instances(known, "boxes"), truth.targets[0]["label"].shape
        wanted = truth.joined("boxes").to(boxes.dtype)[:, None]
        losses += [box_l1(boxes, wanted, size), box_giou(boxes, wanted)]
    is_query = torch.cat([queries.table >= 0 for queries in known], 1)
    sums = (torch.stack(losses) * is_query).sum(1).split([queries.table.shape[1] for queries in known], 1)
    return [part.unflatten(1, (len(queries.matched), -1)).sum(2) for part, queries in zip(sums, known, strict=True)]


def _mask_losses(embeds: Tensor, truth: _Truth) -> list[Tensor]:
    """Cross-entropy and Dice [G, R] of masks given by embeds [G, R, C], each at its instance's points."""
    uniform, own = zip(*(p.split(rows) for p, rows in zip(truth.points, truth.features, strict=True)), strict=True)
    of_images = embeds.split([len(rows) for rows in own])
    of_crop = torch.cat([rows @ features.t() for rows, features in zip(of_images, uniform, strict=True)])
    logits = torch.cat([of_crop, torch.bmm(embeds, torch.cat(own).transpose(1, 2))], 2)
    occupancy = torch.cat([p.occupancy for p in truth.points])[:, None].to(logits.dtype)
    valid = torch.cat([p.valid for p in truth.points])[:, None].to(logits.dtype)
    return [mask_bce(logits, occupancy, valid), mask_dice(logits, occupancy, valid)]


def _of_instances(known: Sequence[_Queries], key: str) -> Tensor:
    """Predictions [G, R, C] of all queries of each instance, at least float32; of any query where there is none."""
    found = []
    for queries in known:
        rows = _wide(queries.predictions[key]).flatten(0, 2)
        found.append(rows.index_select(0, queries.table.clamp(min=0).flatten()).unflatten(0, queries.table.shape))
    return torch.cat(found, 1)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_counts(
    targets: Sequence[Mapping[str, Tensor]], num_classes: int, denoising: Mapping[str, Tensor] | None
) -> tuple[int, int, int]:
    """Looks at the classes and counts denoising queries, in one transfer.

    Returns:
        The most queries of an instance, at least 1; all that have one; all that have none.
    """
    classes = torch.cat([target["classes"] for target in targets])
    numbers = [*F.pad(classes, (0, 1)).aminmax()]
    if denoising is not None:
        index = denoising["target_index"]
        most = max(len(target["ids"]) for target in targets)
        counts = index.new_zeros(len(index), most + 1)
        counts.scatter_add_(1, torch.where(index < 0, most, index), torch.ones_like(index))
        counts[:, most] = 1  # not those of no instance
        numbers += [counts.amax(), (index >= 0).sum(), (index == NO_OBJECT).sum()]
    least, largest, *copies = torch.stack(numbers).tolist()
    if least < 0 or largest >= num_classes:
        raise ValueError(
            f"class {least if least < 0 else largest} of a target is not in [0, {num_classes}); the decoder has "
            f"{num_classes} classes: raise its num_classes or correct the class table"
        )
    num_copies, num_positive, num_negative = copies or (1, 0, 0)
    return num_copies, num_positive, num_negative
