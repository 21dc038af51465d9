"""Component builder and named sizes of 3D Mask R-CNN."""

from collections.abc import Sequence

from torch import nn

from seg3d_monai.backbones import FeaturePyramid, resnet_backbone
from seg3d_monai.heads import AnchorGrid, BoxHead, MaskHead, RoIPooler, RPNHead, SemanticHead
from seg3d_monai.matching import IoUMatcher
from seg3d_monai.models.mask_rcnn import MaskRCNN3d


def maskrcnn3d(
    *,
    backbone: nn.Module,
    anchor_shapes: Sequence[Sequence[Sequence[float]]],
    num_classes: int = 1,
    fpn_channels: int = 256,
    fpn_levels: Sequence[str] | None = None,
    anchor_levels: Sequence[str] | None = None,
    box_roi_size: Sequence[int] = (7, 7, 7),
    box_hidden: int = 1024,
    mask_roi_size: Sequence[int] = (14, 14, 14),
    mask_channels: int = 256,
    mask_convs: int = 4,
    mask_levels: Sequence[str] | None = None,
    mask_margin: float = 0.0,
    mask_image_channels: int = 0,
    mask_scoring: bool = False,
    image_power: float = 1.0,
    sampling_ratio: int = 2,
    semantic: bool = False,
    norm: str = "group",
    roi_foreground_iou: float = 0.5,
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
) -> MaskRCNN3d:
    """3D Mask R-CNN over any backbone.

    Args:
        backbone: module with `channels` and `strides` by level; a feature pyramid is put over it.
        anchor_shapes: for each anchor level, finest first, a list of (z, y, x) extents in voxels.
        num_classes: foreground classes.
        fpn_channels: channels of the pyramid.
        fpn_levels: backbone levels of the pyramid; default all.
        anchor_levels: pyramid levels with anchors; default the `len(anchor_shapes)` finest.
        box_roi_size: (z, y, x) bins of the box head.
        box_hidden: units of the box head's layers.
        mask_roi_size: (z, y, x) bins of the mask head, whose masks have twice as many.
        mask_channels: channels of the mask head.
        mask_convs: convolutions of the mask head.
        mask_levels: pyramid levels that masks are pooled from; default as boxes. One fine level gives sharper
            masks of small objects.
        mask_margin, mask_scoring: see `MaskRCNN3d`.
        image_power: see `ImagePower`.
        mask_image_channels: channels of the image that the mask head reads beside the features, for outlines finer than
            the finest level: 0, those of the image, or 1 for their mean.
        sampling_ratio: RoIAlign samples a bin and axis.
        semantic: whether foreground and borders are learned beside, on the finest level of `mask_levels`.
        norm: of `ConvNormAct`, in the pyramid and the heads; the backbone has its own.
        roi_foreground_iou: least IoU of a proposal with a true box that it is trained on.
        num_roi_samples, roi_foreground_fraction, num_mask_samples, pre_nms_top_n, post_nms_top_n,
            proposal_nms_threshold, min_objectness, score_threshold, detection_nms_threshold,
            max_detections: see `MaskRCNN3d`.

    Returns:
        The network, with fresh weights.

    Raises:
        ValueError: a level that does not exist, or anchor shapes that do not fit the levels.
    """
    bottom_up = fpn_levels or list(backbone.channels)  # type: ignore[arg-type]
    names = ["p" + level[1:] for level in bottom_up]
    read_for_boxes = list(anchor_levels or names[: len(anchor_shapes)])
    read_for_masks = list(mask_levels or read_for_boxes)
    for argument, levels in (("anchor_levels", read_for_boxes), ("mask_levels", read_for_masks)):
        if unknown := [level for level in levels if level not in names]:
            raise ValueError(f"{argument} {unknown} are not levels of the pyramid; choose from {names}")
    pyramid = FeaturePyramid(
        backbone=backbone,
        out_channels=fpn_channels,
        levels=fpn_levels,
        out_levels=sorted({*read_for_boxes, *read_for_masks}),
        norm=norm,
    )
    strides = {level: pyramid.strides[level] for level in read_for_boxes}
    anchors = AnchorGrid(shapes=anchor_shapes, strides=strides)
    return MaskRCNN3d(
        backbone=pyramid,
        anchors=anchors,
        rpn=RPNHead(in_channels=fpn_channels, num_anchors=anchors.num_anchors, levels=read_for_boxes, norm=norm),
        box_pooler=RoIPooler(output_size=box_roi_size, strides=strides, sampling_ratio=sampling_ratio),
        box_head=BoxHead(in_channels=fpn_channels, roi_size=box_roi_size, num_classes=num_classes, hidden=box_hidden),
        mask_pooler=RoIPooler(
            output_size=mask_roi_size,
            strides={level: pyramid.strides[level] for level in read_for_masks},
            sampling_ratio=sampling_ratio,
        ),
        mask_head=MaskHead(
            in_channels=fpn_channels,
            channels=mask_channels,
            num_convs=mask_convs,
            num_classes=num_classes,
            image_channels=mask_image_channels,
            norm=norm,
        ),
        semantic_head=SemanticHead(in_channels=fpn_channels, level=read_for_masks[0]) if semantic else None,
        roi_matcher=IoUMatcher(foreground_iou=roi_foreground_iou, background_iou=roi_foreground_iou, match_best=False),
        image_power=image_power,
        mask_margin=mask_margin,
        mask_scoring=mask_scoring,
        num_roi_samples=num_roi_samples,
        roi_foreground_fraction=roi_foreground_fraction,
        num_mask_samples=num_mask_samples,
        pre_nms_top_n=pre_nms_top_n,
        post_nms_top_n=post_nms_top_n,
        proposal_nms_threshold=proposal_nms_threshold,
        min_objectness=min_objectness,
        score_threshold=score_threshold,
        detection_nms_threshold=detection_nms_threshold,
        max_detections=max_detections,
    )


def maskrcnn3d_tiny(*, in_channels: int = 1, num_classes: int = 1) -> MaskRCNN3d:
    """For CPUs: ResNet-10 of width 32, pyramid of 32 channels, cells of about 8 to 40 voxels across.

    Args:
        in_channels: image channels.
        num_classes: foreground classes.

    Returns:
        The network, with fresh weights.
    """
    return maskrcnn3d(
        backbone=resnet_backbone(depth=10, in_channels=in_channels, width=32),
        anchor_levels=("p2", "p3"),
        anchor_shapes=(((8, 14, 14), (14, 18, 18)), ((16, 28, 28), (24, 36, 36))),
        num_classes=num_classes,
        fpn_channels=32,
        box_hidden=256,
        mask_roi_size=(6, 12, 12),
        mask_channels=32,
        mask_convs=2,
        mask_levels=("p1",),
    )


ANCHORS = (
    ((6, 10, 10), (10, 16, 16)),
    ((12, 20, 20), (20, 32, 32)),
    ((24, 40, 40), (40, 64, 64)),
)
"""Anchors of the sizes for GPUs, on p1 to p3: cells of 6 to 80 voxels across."""


def maskrcnn3d_r50(*, in_channels: int = 1, num_classes: int = 1) -> MaskRCNN3d:
    """For GPUs: ResNet-50, pyramid of 256 channels, the heads of the paper.

    Args:
        in_channels: image channels.
        num_classes: foreground classes.

    Returns:
        The network, with fresh weights.
    """
    return maskrcnn3d(
        backbone=resnet_backbone(depth=50, in_channels=in_channels), anchor_shapes=ANCHORS, num_classes=num_classes
    )


def maskrcnn3d_r101(*, in_channels: int = 1, num_classes: int = 1) -> MaskRCNN3d:
    """For GPUs: ResNet-101, pyramid of 256 channels, the heads of the paper.

    Args:
        in_channels: image channels.
        num_classes: foreground classes.

    Returns:
        The network, with fresh weights.
    """
    return maskrcnn3d(
        backbone=resnet_backbone(depth=101, in_channels=in_channels), anchor_shapes=ANCHORS, num_classes=num_classes
    )
