"""The features of a pre-trained backbone as one tensor, for other runtimes and for MONAI's checks of a bundle.

A masked autoencoder draws what it hides; what is of use afterwards is the backbone, which sees the whole image.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from seg3d_monai.export.plain_operators import plain_operators
from seg3d_monai.models.masked_autoencoder import InpaintingAutoencoder, TokenAutoencoder


class BackboneFeatures(nn.Module):
    """A masked autoencoder's backbone on the whole image; nothing is hidden.

    Its modules and parameters are the network's own, under the same names, so that the same weights fit.

    Args:
        network: what `masked_autoencoder3d` builds.

    Raises:
        TypeError: another network.
    """

    image_power: nn.Module
    backbone: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, InpaintingAutoencoder | TokenAutoencoder):
            raise TypeError(f"network is a {type(network).__name__}; give what masked_autoencoder3d builds")
        for name, child in network.named_children():
            self.add_module(name, child)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.is_beneath = isinstance(network, InpaintingAutoencoder)
        assert self.state_dict().keys() == network.state_dict().keys()
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        """The coarsest level of the backbone, float32 [N, features, d, h, w].

        Args:
            images: [N, C, D, H, W], normalised.
        """
        is_traced = torch.jit.is_tracing()
        with plain_operators() if is_traced or torch.compiler.is_exporting() else nullcontext():
            if is_traced:
                images = images.expand([int(n) for n in images.shape])  # at another shape it fails, see `DensePart`
            backbone = self.backbone.backbone if self.is_beneath else self.backbone
            assert isinstance(backbone, nn.Module)
            levels: dict[str, Tensor] = backbone(self.image_power(images))
            return list(levels.values())[-1].float()
