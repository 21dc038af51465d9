"""Mask DINO (Li et al. 2023) and Mask2Former (Cheng et al. 2022) for volumes: backbone -> pixel decoder -> decoder.

The two share everything but the decoder. Must not know losses, data or files.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from seg3d_monai.heads import DeformablePixelDecoder
from seg3d_monai.heads.instance_masks import select_instances
from seg3d_monai.layers import ImagePower

logger = logging.getLogger(__name__)


class MaskTransformer3d(nn.Module):
    """A transformer whose queries become instances.

    Args:
        backbone: images [N, C, D, H, W] -> {level: features}.
        pixel_decoder: {level: features} -> memory and mask features.
        decoder: memory and mask features, targets -> predictions of queries; `MaskDINODecoder` or
            `Mask2FormerDecoder`.
        num_queries: queries of the decoder, the most instances of one image.
        has_no_object: whether the last class logit is "no object" (Mask2Former).
        score_threshold: least score of an instance in evaluation.
        image_power: see `ImagePower`.

    Raises:
        ValueError: an `image_power` that is not above 0.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        pixel_decoder: DeformablePixelDecoder,
        decoder: nn.Module,
        num_queries: int,
        has_no_object: bool,
        score_threshold: float = 0.05,
        image_power: float = 1.0,
    ) -> None:
        super().__init__()
        self.image_power = ImagePower(image_power)
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.decoder = decoder
        self.capacity = num_queries
        self.has_no_object = has_no_object
        self.score_threshold = score_threshold

    def extra_repr(self) -> str:
        """The settings, for `repr`: no weight tells them."""
        return f"capacity={self.capacity}, score_threshold={self.score_threshold}"

    def forward(
        self,
        images: Tensor,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        valid_sizes: Tensor | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Training outputs, or instances in evaluation mode.

        Args:
            images: [N, C, D, H, W], normalised.
            targets: for each image {"boxes" [G, 6], "classes" [G], ...}; the denoising of Mask DINO needs them in
                training.
            valid_sizes: int64 [N, 3], voxels of each image that are no padding; None where nothing is padded.

        Returns:
            In training what `SetCriterion` takes. In evaluation, for each image {"boxes" [M, 6], "scores" [M],
            "classes" [M], "mask_logits": M tensors [d, h, w] over the boxes' voxels}.

        Raises:
            ValueError: training mode with denoising, without targets.
        """
        decoded = self.pixel_decoder(self.backbone(self.image_power(images)), valid_sizes)
        outputs: dict[str, Any] = self.decoder(decoded, targets)
        if self.training:
            return outputs
        boxes = outputs.get("boxes")
        return [
            select_instances(
                outputs["class_logits"][-1, n],
                outputs["mask_embeds"][-1, n],
                outputs["mask_features"][n],
                outputs["mask_stride"],
                images.shape[2:],
                None if boxes is None else boxes[-1, n],
                score_threshold=self.score_threshold,
                has_no_object=self.has_no_object,
            )
            for n in range(len(images))
        ]
