"""What a network computes before anything whose size depends on the data: proposals, suppression, RoIs, selection.

Other runtimes take graphs whose tensors have fixed shapes. `DensePart` is that part of a network as a module;
docs/export.md says how to go on from its outputs.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from seg3d_monai.export.plain_operators import plain_operators
from seg3d_monai.models import MaskRCNN3d, MaskTransformer3d
from seg3d_monai.ops.boxes import ANCHOR_WEIGHTS, clip_boxes, decode_boxes


class DensePart(nn.Module):
    """The dense part of a detector, for evaluation.

    Its modules are the network's own, under the same names: both have the same state dict, so whatever loads weights
    by name loads them into either. It may be traced or exported as it is; `seg3d_monai.ops` then takes no part in it.

    Args:
        network: Mask R-CNN, Mask DINO or Mask2Former.

    Raises:
        TypeError: another network. A masked autoencoder draws what it hides and is for pre-training only.
    """

    image_power: nn.Module
    backbone: nn.Module
    pixel_decoder: nn.Module
    decoder: nn.Module
    anchors: nn.Module
    rpn: nn.Module
    semantic_head: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, MaskRCNN3d | MaskTransformer3d):
            raise TypeError(
                f"network is a {type(network).__name__}, which has no dense part to export; give a MaskRCNN3d or a "
                "MaskTransformer3d"
            )
        for name, child in network.named_children():
            self.add_module(name, child)
        self.has_semantic_head = getattr(network, "semantic_head", None) is not None
        self.is_transformer = isinstance(network, MaskTransformer3d)
        self.has_no_object = isinstance(network, MaskTransformer3d) and network.has_no_object
        assert self.state_dict().keys() == network.state_dict().keys()
        self.train(network.training)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Dense outputs by name, all float32.

        Args:
            images: [N, C, D, H, W], normalised.

        Returns:
            Of Mask R-CNN "objectness" [N, A], logits; "boxes" [N, A, 6], what the anchors became, clipped to the image;
            "features_p1" ... [N, C, d, h, w], each level that a head reads; with a semantic head "semantic_logits"
            [N, 2, d, h, w]. Anchors stand level after level, finest first.
            Of a transformer, the last layer's "class_logits" [N, Q, K], with "no object" last for Mask2Former;
            "mask_logits" [N, Q, d, h, w] at the stride of the mask features; for Mask DINO "boxes" [N, Q, 6].
            Boxes are (z1, y1, x1, z2, y2, x2) in voxels of the image.

        Raises:
            ValueError: training mode.
        """
        if self.training:
            raise ValueError("a dense part is for evaluation; call eval() first")
        is_traced = torch.jit.is_tracing()
        with plain_operators() if is_traced or torch.compiler.is_exporting() else nullcontext():
            if is_traced:
                # A trace keeps some numbers of this shape, such as the image's border; at another one it would be
                # silently wrong, and this is where it fails instead.
                images = images.expand([int(n) for n in images.shape])
            images = self.image_power(images)
            return self._of_queries(images) if self.is_transformer else self._of_anchors(images)

    def _of_anchors(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        objectness, deltas = (torch.cat(parts, 1) for parts in self.rpn(features))
        anchors = torch.cat(self.anchors(features)).expand_as(deltas)
        boxes = decode_boxes(deltas.flatten(0, 1), anchors.flatten(0, 1), ANCHOR_WEIGHTS)
        outputs = {"objectness": objectness, "boxes": clip_boxes(boxes, images.shape[2:]).view_as(deltas)}
        outputs |= {f"features_{level}": values for level, values in features.items()}
        if self.has_semantic_head:
            outputs["semantic_logits"] = self.semantic_head(features)
        return outputs

    def _of_queries(self, images: Tensor) -> dict[str, Tensor]:
        decoded = self.decoder(self.pixel_decoder(self.backbone(images)))
        embeds, features = decoded["mask_embeds"][-1], decoded["mask_features"].float()
        outputs = {
            "class_logits": decoded["class_logits"][-1],
            "mask_logits": (embeds @ features.flatten(2)).unflatten(2, features.shape[2:]),
        }
        if "boxes" in decoded:
            outputs["boxes"] = decoded["boxes"][-1]
        return outputs


class DenseTensor(DensePart):
    """The dense part as one tensor with channels, as MONAI's `verify_net_in_out` and `ckpt_export` want it.

    Args:
        network: as `DensePart`.
    """

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """One tensor.

        Args:
            images: [N, C, D, H, W], normalised.

        Returns:
            Of Mask R-CNN [N, 7, A]: the objectness of each anchor, a logit, and the box that it became.
            Of a transformer [N, Q, d, h, w], 0 to 1: the probability of a query's best class times that of its mask.
            The largest over the queries says at each place which object is there, and how surely (MaskFormer, Cheng et
            al. 2021, sec. 3.4).
        """
        outputs = super().forward(images)
        if not self.is_transformer:
            return torch.cat([outputs["objectness"][:, None], outputs["boxes"].transpose(1, 2)], 1)
        logits = outputs["class_logits"]
        prob = logits.softmax(-1)[..., :-1] if self.has_no_object else logits.sigmoid()
        return prob.amax(-1)[..., None, None, None] * outputs["mask_logits"].sigmoid()
