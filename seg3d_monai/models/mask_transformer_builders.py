"""Component builders and named sizes of 3D Mask DINO and 3D Mask2Former."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from seg3d_monai.backbones import resnet_backbone
from seg3d_monai.decoders import Denoising, Mask2FormerDecoder, MaskDINODecoder
from seg3d_monai.heads import DeformablePixelDecoder
from seg3d_monai.models.mask_transformer import MaskTransformer3d


def maskdino3d(
    *,
    backbone: nn.Module,
    num_classes: int = 1,
    memory_levels: Sequence[str] = ("c2", "c3", "c4"),
    mask_levels: Sequence[str] = ("c1",),
    hidden: int = 256,
    mask_channels: int = 256,
    encoder_layers: int = 6,
    encoder_feedforward: int = 1024,
    decoder_layers: int = 9,
    decoder_feedforward: int = 2048,
    num_queries: int = 300,
    num_heads: int = 8,
    num_points: int = 4,
    content_queries: Literal["learned", "selected"] = "selected",
    box_from_mask: bool = True,
    anchor_cells: float = 4.0,
    denoising_queries: int = 100,
    max_denoising_queries: int = 400,
    label_noise: float = 0.2,
    box_noise: float = 0.4,
    activation_checkpointing: bool = False,
    score_threshold: float = 0.05,
    image_power: float = 1.0,
) -> MaskTransformer3d:
    """3D Mask DINO over any backbone.

    Args:
        backbone: module with `channels` and `strides` by level.
        num_classes: foreground classes.
        memory_levels: backbone levels of the memory, finest first.
        mask_levels: backbone levels that are fused into the mask features, finest first.
        hidden: channels of memory and queries.
        mask_channels: channels of the mask features.
        encoder_layers, encoder_feedforward: layers of the pixel decoder, and channels inside their MLPs.
        decoder_layers, decoder_feedforward: the same of the decoder.
        num_queries: the most instances of one image.
        num_heads, num_points: heads of all attentions, and places that a head reads in a level.
        content_queries, box_from_mask, anchor_cells: see `MaskDINODecoder`.
        denoising_queries: denoising queries of an image in training; 0 for none.
        max_denoising_queries, label_noise, box_noise: see `Denoising`.
        activation_checkpointing: recompute the pixel decoder's layers in the backward pass.
        score_threshold: least score of an instance in evaluation.
        image_power: see `ImagePower`.

    Returns:
        The network, with fresh weights.
    """
    denoising = None
    if denoising_queries:
        denoising = Denoising(
            num_queries=denoising_queries,
            label_noise=label_noise,
            box_noise=box_noise,
            max_queries=max_denoising_queries,
        )
    return MaskTransformer3d(
        backbone=backbone,
        pixel_decoder=DeformablePixelDecoder(
            channels=backbone.channels,  # type: ignore[arg-type]
            strides=backbone.strides,  # type: ignore[arg-type]
            memory_levels=memory_levels,
            mask_levels=mask_levels,
            hidden=hidden,
            mask_channels=mask_channels,
            num_layers=encoder_layers,
            num_heads=num_heads,
            num_points=num_points,
            feedforward=encoder_feedforward,
            activation_checkpointing=activation_checkpointing,
        ),
        decoder=MaskDINODecoder(
            channels=hidden,
            mask_channels=mask_channels,
            num_classes=num_classes,
            num_queries=num_queries,
            num_layers=decoder_layers,
            num_heads=num_heads,
            num_points=num_points,
            feedforward=decoder_feedforward,
            num_levels=len(memory_levels),
            content_queries=content_queries,
            box_from_mask=box_from_mask,
            anchor_cells=anchor_cells,
            denoising=denoising,
        ),
        num_queries=num_queries,
        has_no_object=False,
        score_threshold=score_threshold,
        image_power=image_power,
    )


def mask2former3d(
    *,
    backbone: nn.Module,
    num_classes: int = 1,
    memory_levels: Sequence[str] = ("c2", "c3", "c4"),
    mask_levels: Sequence[str] = ("c1",),
    hidden: int = 256,
    mask_channels: int = 256,
    encoder_layers: int = 6,
    encoder_feedforward: int = 1024,
    decoder_layers: int = 9,
    decoder_feedforward: int = 2048,
    num_queries: int = 100,
    num_heads: int = 8,
    num_points: int = 4,
    query_source: Literal["learned", "selected"] = "learned",
    activation_checkpointing: bool = False,
    score_threshold: float = 0.05,
    image_power: float = 1.0,
) -> MaskTransformer3d:
    """3D Mask2Former over any backbone.

    Args:
        query_source: see `Mask2FormerDecoder`; all others: arguments as for `maskdino3d`.

    Returns:
        The network, with fresh weights.
    """
    return MaskTransformer3d(
        backbone=backbone,
        pixel_decoder=DeformablePixelDecoder(
            channels=backbone.channels,  # type: ignore[arg-type]
            strides=backbone.strides,  # type: ignore[arg-type]
            memory_levels=memory_levels,
            mask_levels=mask_levels,
            hidden=hidden,
            mask_channels=mask_channels,
            num_layers=encoder_layers,
            num_heads=num_heads,
            num_points=num_points,
            feedforward=encoder_feedforward,
            activation_checkpointing=activation_checkpointing,
        ),
        decoder=Mask2FormerDecoder(
            channels=hidden,
            mask_channels=mask_channels,
            num_classes=num_classes,
            num_queries=num_queries,
            num_layers=decoder_layers,
            num_heads=num_heads,
            feedforward=decoder_feedforward,
            num_levels=len(memory_levels),
            query_source=query_source,
        ),
        num_queries=num_queries,
        has_no_object=True,
        score_threshold=score_threshold,
        image_power=image_power,
    )


def maskdino3d_tiny(*, in_channels: int = 1, num_classes: int = 1) -> MaskTransformer3d:
    """For CPUs: ResNet-10 of width 32, 64 channels, 2 + 3 layers.

    Args:
        in_channels: image channels.
        num_classes: foreground classes.

    Returns:
        The network, with fresh weights.
    """
    return maskdino3d(
        backbone=resnet_backbone(depth=10, in_channels=in_channels, width=32),
        num_classes=num_classes,
        hidden=64,
        mask_channels=64,
        encoder_layers=2,
        encoder_feedforward=128,
        decoder_layers=3,
        decoder_feedforward=256,
        num_queries=200,
        num_heads=4,
    )


def maskdino3d_r50(*, in_channels: int = 1, num_classes: int = 1) -> MaskTransformer3d:
    """For GPUs: ResNet-50, 256 channels, 6 + 9 layers and 300 queries, as in the paper.

    Args:
        in_channels: image channels.
        num_classes: foreground classes.

    Returns:
        The network, with fresh weights.
    """
    return maskdino3d(
        backbone=resnet_backbone(depth=50, in_channels=in_channels, activation_checkpointing=True),
        num_classes=num_classes,
        activation_checkpointing=True,
    )


def mask2former3d_tiny(*, in_channels: int = 1, num_classes: int = 1) -> MaskTransformer3d:
    """For CPUs: ResNet-10 of width 32, 64 channels, 2 + 3 layers, queries selected from the image.

    Args:
        in_channels: image channels.
        num_classes: foreground classes.

    Returns:
        The network, with fresh weights.
    """
    return mask2former3d(
        backbone=resnet_backbone(depth=10, in_channels=in_channels, width=32),
        num_classes=num_classes,
        hidden=64,
        mask_channels=64,
        encoder_layers=2,
        encoder_feedforward=128,
        decoder_layers=3,
        decoder_feedforward=256,
        num_queries=200,
        num_heads=4,
        query_source="selected",
    )


def mask2former3d_r50(*, in_channels: int = 1, num_classes: int = 1) -> MaskTransformer3d:
    """For GPUs: ResNet-50, 256 channels, 6 + 9 layers and 100 learned queries, as in the paper.

    Args:
        in_channels: image channels.
        num_classes: foreground classes.

    Returns:
        The network, with fresh weights.
    """
    return mask2former3d(
        backbone=resnet_backbone(depth=50, in_channels=in_channels, activation_checkpointing=True),
        num_classes=num_classes,
        activation_checkpointing=True,
    )
