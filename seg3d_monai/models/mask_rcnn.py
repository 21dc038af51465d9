"""Mask R-CNN (He et al. 2017) for volumes: backbone -> proposals -> boxes and classes -> masks.

Must not know losses, data or files. Boxes are (z1, y1, x1, z2, y2, x2) in voxels of the image, half-open.
"""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from seg3d_monai.heads import (
    AnchorGrid,
    BoxHead,
    MaskHead,
    RoIPooler,
    RPNHead,
    SemanticHead,
    select_detections,
    select_proposals,
)
from seg3d_monai.layers import ImagePower
from seg3d_monai.matching import IoUMatcher, sample_balanced
from seg3d_monai.ops import roi_align3d
from seg3d_monai.ops.boxes import clip_boxes

logger = logging.getLogger(__name__)

LIMITS_VOXELS = 5_000_000
"""Voxels of an image for which limits of proposals and detections are meant; in evaluation larger images have more."""
LATE_SHARE, MOST_LATE = 0.05, 0.01
"""Proposals are too few where so large a share of them, the last, gives more than such a share of the objects."""

Target = Mapping[str, Tensor]


class MaskRCNN3d(nn.Module):
    """3D Mask R-CNN.

    Args:
        backbone: images [N, C, D, H, W] -> {level: features}, a feature pyramid.
        anchors: features -> anchors of each level.
        rpn: features -> objectness and deltas of each level.
        box_pooler: features of boxes, for the box head.
        box_head: RoI features -> class logits and deltas.
        mask_pooler: features of boxes, for the mask head.
        mask_head: RoI features -> mask logits.
        semantic_head: features -> foreground and borders, in training only; or None.
        roi_matcher: assigns proposals to true boxes in training.
        image_power: see `ImagePower`.
        mask_margin: share of a box's extent that is added on each side of it for its mask, where boxes cut off too
            much; detections have these boxes.
        mask_scoring: whether the score of a detection is multiplied by the mean probability of its mask's own cells, as
            in Mask2Former: what has no clear outline is seldom an object.
        num_roi_samples: proposals of an image that the box head is trained on.
        roi_foreground_fraction: largest share of foreground among them.
        num_mask_samples: foreground proposals of an image that the mask head is trained on.
        pre_nms_top_n: anchors kept of each level and image before NMS, (training, evaluation). Too few lose objects:
            a bright cell has dozens of good anchors, and they take the places of a dim one's. The number for
            evaluation is for images of up to `LIMITS_VOXELS`, and grows in proportion with larger ones.
        post_nms_top_n: proposals kept of each image, (training, evaluation); grows alike. A warning says when the last
            of them still give objects.
        proposal_nms_threshold: IoU of duplicates among proposals, (training, evaluation).
        min_objectness: least objectness of a proposal in evaluation, a probability.
        score_threshold: least score of a detection.
        detection_nms_threshold: IoU of duplicates among detections.
        max_detections: detections kept of each image; grows alike. A warning says which score the last one had.

    Raises:
        ValueError: an `image_power` that is not above 0.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        anchors: AnchorGrid,
        rpn: RPNHead,
        box_pooler: RoIPooler,
        box_head: BoxHead,
        mask_pooler: RoIPooler,
        mask_head: MaskHead,
        semantic_head: SemanticHead | None = None,
        roi_matcher: IoUMatcher,
        image_power: float = 1.0,
        mask_margin: float = 0.0,
        mask_scoring: bool = False,
        num_roi_samples: int = 128,
        roi_foreground_fraction: float = 0.5,
        num_mask_samples: int = 32,
        pre_nms_top_n: tuple[int, int] = (1000, 20000),
        post_nms_top_n: tuple[int, int] = (500, 5000),
        proposal_nms_threshold: tuple[float, float] = (0.6, 0.4),
        min_objectness: float = 0.1,
        score_threshold: float = 0.05,
        detection_nms_threshold: float = 0.4,
        max_detections: int = 2000,
    ) -> None:
        super().__init__()
        self.image_power = ImagePower(image_power)
        self.backbone = backbone
        self.anchors = anchors
        self.rpn = rpn
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.semantic_head = semantic_head
        self.roi_matcher = roi_matcher
        self.mask_margin = mask_margin
        self.mask_scoring = mask_scoring
        self.num_roi_samples = num_roi_samples
        self.roi_foreground_fraction = roi_foreground_fraction
        self.num_mask_samples = num_mask_samples
        self.pre_nms_top_n = (pre_nms_top_n[0], pre_nms_top_n[1])
        self.post_nms_top_n = (post_nms_top_n[0], post_nms_top_n[1])
        self.proposal_nms_threshold = (proposal_nms_threshold[0], proposal_nms_threshold[1])
        self.min_objectness = min_objectness
        self.score_threshold = score_threshold
        self.detection_nms_threshold = detection_nms_threshold
        self.max_detections = max_detections
        self._warned: set[str] = set()

    def extra_repr(self) -> str:
        """The settings of detection, for `repr`: no weight tells them."""
        names = "pre_nms_top_n post_nms_top_n proposal_nms_threshold min_objectness score_threshold"
        names += " detection_nms_threshold max_detections mask_margin mask_scoring"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names.split())

    def forward(
        self, images: Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Training outputs, or detections in evaluation mode.

        Args:
            images: [N, C, D, H, W], normalised.
            targets: in training, for each image {"label" int64 [D, H, W], "ids" [G], "boxes" [G, 6], "classes" [G]}.

        Returns:
            In training the outputs that `MaskRCNNCriterion` takes: anchors [A, 6], objectness [N, A],
            anchor_deltas [N, A, 6]; rois [R, 6] with roi_batch, roi_matched, class_logits [R, K + 1], roi_deltas;
            mask_rois [P, 6] with mask_batch, mask_matched, mask_logits [P, K, d, h, w]; with a semantic head
            semantic_logits [N, 2, d, h, w].
            In evaluation, for each image {"boxes" [M, 6], "scores" [M], "classes" [M], "mask_logits" [M, d, h, w]}.

        Raises:
            ValueError: training mode without targets.
        """
        images = self.image_power(images)
        features = self.backbone(images)
        anchors = self.anchors(features)
        objectness, deltas = self.rpn(features)
        size = images.shape[2:]
        growth = 1.0 if self.training else max(1.0, math.prod(size) / LIMITS_VOXELS)
        proposals = select_proposals(
            objectness,
            deltas,
            anchors,
            size,
            pre_nms_top_n=round(growth * self.pre_nms_top_n[not self.training]),
            post_nms_top_n=round(growth * self.post_nms_top_n[not self.training]),
            nms_threshold=self.proposal_nms_threshold[not self.training],
            min_objectness=0.0 if self.training else self.min_objectness,
        )
        if not self.training:
            return self._detect(features, images, proposals, growth)
        if targets is None:
            raise ValueError("targets is None in training mode; pass one dict for each image, or call eval() first")
        outputs = {
            "anchors": torch.cat(anchors),
            "objectness": torch.cat(objectness, 1),
            "anchor_deltas": torch.cat(deltas, 1),
        }
        if self.semantic_head is not None:
            outputs["semantic_logits"] = self.semantic_head(features)
        outputs |= self._sample(proposals, targets)
        roi_features = self.box_pooler(features, outputs["rois"], outputs["roi_batch"])
        outputs["class_logits"], outputs["roi_deltas"] = self.box_head(roi_features)
        outputs["mask_logits"] = self._mask_logits(features, images, outputs["mask_rois"], outputs["mask_batch"])
        return outputs

    @torch.no_grad()
    def _sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Proposals and true boxes to train on; rows of image n stand before those of image n + 1."""
        rois, matches, masks = [], [], []
        for boxes, target in zip(proposals, targets, strict=True):
            boxes = torch.cat([boxes, target["boxes"].to(boxes)])
            matched = self.roi_matcher(boxes, target["boxes"], target["label"])
            foreground, background = sample_balanced(matched, self.num_roi_samples, self.roi_foreground_fraction)
            rows = torch.cat([foreground, background])
            rois.append(boxes[rows])
            matches.append(matched[rows])
            few = foreground[torch.randperm(len(foreground))[: self.num_mask_samples].to(foreground.device)]
            masks.append((self._with_margin(boxes[few], target["label"].shape), matched[few]))
        return {
            "rois": torch.cat(rois),
            "roi_batch": _batch_index(rois),
            "roi_matched": torch.cat(matches),
            "mask_rois": torch.cat([m[0] for m in masks]),
            "mask_batch": _batch_index([m[0] for m in masks]),
            "mask_matched": torch.cat([m[1] for m in masks]),
        }

    def _detect(
        self, features: Mapping[str, Tensor], images: Tensor, proposals: Sequence[Tensor], growth: float
    ) -> list[dict[str, Tensor]]:
        size = images.shape[2:]
        most_proposals, most_detections = round(growth * self.post_nms_top_n[1]), round(growth * self.max_detections)
        detections = []
        for n, boxes in enumerate(proposals):
            logits, deltas = self._classify(features, boxes, n)
            found = select_detections(
                logits,
                deltas,
                boxes,
                size,
                score_threshold=self.score_threshold,
                nms_threshold=self.detection_nms_threshold,
                max_detections=most_detections,
            )
            rows = found.pop("rows")
            if len(boxes) >= most_proposals:
                self._warn_of_late_objects(rows[found["scores"] >= 0.5], len(boxes))
            if len(rows) >= most_detections > 0:
                least = float(found["scores"][-1])
                self._warn_once(
                    "max_detections",
                    f"{len(rows)} objects are as many as one image may have, those of scores below {least:.2f} are "
                    f"lost: raise max_detections = {self.max_detections}",
                )
            found["boxes"] = self._with_margin(found["boxes"], size)
            found["mask_logits"] = self._masks(features, images, found["boxes"], found["classes"], n)
            detections.append(_scored_by_masks(found) if self.mask_scoring else found)
        return detections

    def _with_margin(self, boxes: Tensor, size: Sequence[int]) -> Tensor:
        """Boxes [M, 6], enlarged by `mask_margin` within the image."""
        if self.mask_margin == 0:
            return boxes
        margin = self.mask_margin * (boxes[:, 3:] - boxes[:, :3])
        return clip_boxes(torch.cat([boxes[:, :3] - margin, boxes[:, 3:] + margin], 1), size)

    def _mask_logits(self, features: Mapping[str, Tensor], images: Tensor, boxes: Tensor, batch: Tensor) -> Tensor:
        """Mask logits [P, K, d, h, w] of boxes [P, 6], from the features and, where the head reads it, the image."""
        pooled, images_of_boxes = self.mask_pooler(features, boxes, batch), None
        if self.mask_head.image_channels:
            size = [n * finer for n, finer in zip(self.mask_pooler.output_size, self.mask_head.upsample, strict=True)]
            if self.mask_head.image_channels < images.shape[1]:
                images = images.mean(1, keepdim=True)
            with torch.autocast(images.device.type, enabled=False):
                images_of_boxes = roi_align3d(images.to(boxes.dtype), boxes, batch, size, (1.0, 1.0, 1.0), 1)
        logits: Tensor = self.mask_head(pooled, images_of_boxes)
        return logits

    def _classify(self, features: Mapping[str, Tensor], boxes: Tensor, image: int) -> tuple[Tensor, Tensor]:
        """Class logits [P, K + 1] and deltas [P, 6] of one image's proposals, some boxes at a time as in `_masks`."""
        parts = [
            self.box_head(self.box_pooler(features, part, torch.full_like(part[:, 0], image, dtype=torch.int64)))
            for part in boxes.split(256)
        ]
        return torch.cat([logits for logits, _ in parts]), torch.cat([deltas for _, deltas in parts])

    def _masks(
        self, features: Mapping[str, Tensor], images: Tensor, boxes: Tensor, classes: Tensor, image: int
    ) -> Tensor:
        """Mask logits [M, d, h, w] of the detected class, some boxes at a time: memory does not grow with M."""
        masks = []
        for part, label in zip(boxes.split(64), classes.split(64), strict=True):
            index = torch.full_like(label, image)
            logits = self._mask_logits(features, images, part, index)
            masks.append(logits[torch.arange(len(label), device=label.device), label])
        return torch.cat(masks)

    def _warn_of_late_objects(self, rows: Tensor, num_proposals: int) -> None:
        """Objects come from the best proposals; where even the last ones give some, those left out would too."""
        late = int((rows >= (1 - LATE_SHARE) * num_proposals).sum())
        if late > MOST_LATE * len(rows):
            self._warn_once(
                "post_nms_top_n",
                f"{late} of {len(rows)} objects come from the last twentieth of {num_proposals} proposals; others may "
                f"be lost: raise post_nms_top_n = {self.post_nms_top_n[1]}",
            )

    def _warn_once(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("%s", message)


def _scored_by_masks(detections: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detections with scores times the mean probability within the mask, 0 where it is empty, best first."""
    prob = detections["mask_logits"].flatten(1).sigmoid()
    is_object = prob > 0.5
    clarity = (prob * is_object).sum(1) / is_object.sum(1).clamp(min=1)
    scores, order = (detections["scores"] * clarity).sort(descending=True, stable=True)
    return {key: value[order] for key, value in detections.items()} | {"scores": scores}


def _batch_index(boxes: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(b),), n, dtype=torch.int64, device=b.device) for n, b in enumerate(boxes)])
