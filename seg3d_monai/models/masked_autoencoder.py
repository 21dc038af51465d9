"""Pre-training without labels: a network sees an image with patches hidden, and says what is behind them.

A Vision Transformer reads the visible patches alone, and a small transformer guesses the rest (MAE, He et al. 2022).
Any other backbone reads the image with a learned value in place of what is hidden (SimMIM, Xie et al. 2022), and a
feature pyramid over it is read out at its finest level.

Must not know losses, data or files.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from seg3d_monai.backbones import FeaturePyramid
from seg3d_monai.backbones.vit import ViT, ViTBlock
from seg3d_monai.layers import ImagePower, LayerNorm, repeat_cells
from seg3d_monai.layers.conv import check_axes

Targets = Sequence[Mapping[str, Tensor]]


class PatchMask(nn.Module):
    """Draws which patches are hidden, equally many of each image; with torch's generator.

    Args:
        ratio: share that is hidden, above 0 and below 1.
        block_patches: (z, y, x) patches of a block that is hidden or not as one, as far as the number allows; ones hide
            patches one by one.

    Raises:
        ValueError: a ratio out of range, or a block that is not three positive integers.
    """

    def __init__(self, ratio: float, block_patches: Sequence[int] = (1, 1, 1)) -> None:
        super().__init__()
        if not 0 < ratio < 1:
            raise ValueError(f"mask_ratio is {ratio}; give a share above 0 and below 1")
        self.ratio = ratio
        self.block_patches = check_axes("block_patches", block_patches)

    def forward(self, num_images: int, size: Sequence[int], device: torch.device) -> Tensor:
        """bool [num_images, z, y, x] for (z, y, x) patches; one patch at least is hidden, and one is visible."""
        blocks = [-(-n // b) for n, b in zip(size, self.block_patches, strict=True)]
        order = torch.rand(num_images, 1, *blocks, device=device)
        order = repeat_cells(order, self.block_patches, 2)[:, 0, : size[0], : size[1], : size[2]]
        # Patches of a block have nearly the same number, so that a block is cut only at the end of the order.
        order = order + 1e-4 * torch.rand(num_images, *size, device=device)
        total = prod(size)
        number = min(max(1, round(self.ratio * total)), total - 1)
        hidden = torch.zeros(num_images, total, dtype=torch.bool, device=device)
        hidden.scatter_(1, order.flatten(1).topk(number, dim=1).indices, True)
        return hidden.unflatten(1, tuple(size))

    def extra_repr(self) -> str:
        """The settings."""
        return f"ratio={self.ratio}, block_patches={self.block_patches}"


class TokenAutoencoder(nn.Module):
    """Masked autoencoder of a Vision Transformer.

    Args:
        backbone: the transformer that is trained for later use; its pyramid is not.
        mask: which patches are hidden.
        in_channels: image channels.
        decoder_channels: channels of the small transformer, a multiple of `decoder_heads`.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        image_power: see `ImagePower`; the network reads and reconstructs such images.
    """

    def __init__(
        self,
        *,
        backbone: ViT,
        mask: PatchMask,
        in_channels: int,
        decoder_channels: int,
        decoder_depth: int,
        decoder_heads: int,
        image_power: float = 1.0,
    ) -> None:
        super().__init__()
        self.image_power = ImagePower(image_power)
        self.backbone = backbone
        self.backbone.pyramid.requires_grad_(False)  # nothing reads it here, and optimizers want gradients
        self.mask = mask
        self.patch_size = backbone.strides["c3"]
        self.project = nn.Linear(backbone.channels["c3"], decoder_channels)
        self.hidden_token = nn.Parameter(torch.zeros(decoder_channels))
        self.blocks = nn.ModuleList(ViTBlock(decoder_channels, decoder_heads) for _ in range(decoder_depth))
        self.norm = LayerNorm(decoder_channels, eps=1e-6)
        self.read = nn.Linear(decoder_channels, in_channels * prod(self.patch_size))

    def forward(self, images: Tensor, targets: Targets | None = None) -> dict[str, object]:
        """[N, C, D, H, W] -> what `MaskedReconstruction` takes; targets are not looked at.

        Raises:
            ValueError: an extent that patches do not divide, or a single patch.
        """
        images, size = self.image_power(images), patches_of(images, self.patch_size)
        tokens, _ = self.backbone.tokens(images)
        hidden = self.mask(len(images), size, images.device).flatten(1)
        number, channels = len(images), tokens.shape[2]
        encoded = self.project(self.backbone.encode(tokens[~hidden].view(number, -1, channels)))
        guess = (
            self.hidden_token.to(encoded.dtype).expand(*hidden.shape, -1).masked_scatter(~hidden[..., None], encoded)
        )
        guess = guess + self.backbone.positions(size, guess.shape[2], guess.device).to(guess.dtype)
        for block in self.blocks:
            guess = block(guess)
        voxels = self.read(self.norm(guess)).transpose(1, 2).unflatten(2, size)
        return {
            "images": images,
            "reconstruction": voxels_of(voxels, self.patch_size),
            "hidden": hidden.unflatten(1, size),
            "patch_size": self.patch_size,
        }


class InpaintingAutoencoder(nn.Module):
    """Any backbone that says what is behind hidden patches of its input.

    Args:
        backbone: a feature pyramid whose only output is its finest level; what is beneath is trained for later use.
        mask: which patches are hidden.
        in_channels: image channels.
        patch_size: (z, y, x) voxels of a patch, a multiple of the finest level's stride.
        image_power: see `ImagePower`; the network reads and reconstructs such images.
    """

    def __init__(
        self,
        *,
        backbone: FeaturePyramid,
        mask: PatchMask,
        in_channels: int,
        patch_size: Sequence[int],
        image_power: float = 1.0,
    ) -> None:
        super().__init__()
        self.image_power = ImagePower(image_power)
        self.backbone = backbone
        self.mask = mask
        self.patch_size = check_axes("patch_size", patch_size)
        ((self.level, self.stride),) = backbone.strides.items()
        if any(p % s for p, s in zip(self.patch_size, self.stride, strict=True)):
            raise ValueError(
                f"patch_size is {list(patch_size)}; give multiples of the finest stride {list(self.stride)}"
            )
        self.hidden_value = nn.Parameter(torch.zeros(in_channels))
        self.read = nn.Conv3d(backbone.channels[self.level], in_channels * prod(self.stride), 1)

    def forward(self, images: Tensor, targets: Targets | None = None) -> dict[str, object]:
        """[N, C, D, H, W] -> what `MaskedReconstruction` takes; targets are not looked at.

        Raises:
            ValueError: an extent that patches do not divide, or a single patch.
        """
        images, size = self.image_power(images), patches_of(images, self.patch_size)
        hidden = self.mask(len(images), size, images.device)
        is_hidden = repeat_cells(hidden[:, None].to(images.dtype), self.patch_size, 2)
        value = self.hidden_value.to(images.dtype)[:, None, None, None]
        features = self.backbone(images + is_hidden * (value - images))
        return {
            "images": images,
            "reconstruction": voxels_of(self.read(features[self.level]), self.stride),
            "hidden": hidden,
            "patch_size": self.patch_size,
        }


def masked_autoencoder3d(
    *,
    backbone: nn.Module,
    in_channels: int = 1,
    mask_ratio: float = 0.6,
    block_patches: Sequence[int] = (1, 1, 1),
    patch_size: Sequence[int] = (4, 8, 8),
    decoder_channels: int = 96,
    decoder_depth: int = 2,
    decoder_heads: int = 3,
    norm: str = "group",
    image_power: float = 1.0,
) -> TokenAutoencoder | InpaintingAutoencoder:
    """The autoencoder for a backbone.

    Args:
        backbone: a `ViT`, whose own patches are hidden, or any other with `channels` and `strides` by level.
        in_channels: image channels.
        mask_ratio: share of the patches that is hidden.
        block_patches: (z, y, x) patches that are hidden together; see `PatchMask`.
        patch_size: (z, y, x) voxels of a patch, for other backbones than a `ViT`.
        decoder_channels: of the small transformer, or of the feature pyramid.
        decoder_depth, decoder_heads: of the small transformer.
        norm: of the feature pyramid; the backbone has its own.
        image_power: see `ImagePower`; that of the detector that the backbone is for.

    Returns:
        A `TokenAutoencoder` around a `ViT`, else an `InpaintingAutoencoder`.

    Raises:
        ValueError: as the classes.
    """
    mask = PatchMask(mask_ratio, block_patches)
    if isinstance(backbone, ViT):
        return TokenAutoencoder(
            backbone=backbone,
            mask=mask,
            in_channels=in_channels,
            decoder_channels=decoder_channels,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            image_power=image_power,
        )
    finest = "p" + next(iter(backbone.channels))[1:]  # type: ignore[arg-type]
    pyramid = FeaturePyramid(backbone=backbone, out_channels=decoder_channels, out_levels=[finest], norm=norm)
    return InpaintingAutoencoder(
        backbone=pyramid, mask=mask, in_channels=in_channels, patch_size=patch_size, image_power=image_power
    )


def patches_of(images: Tensor, patch_size: Sequence[int]) -> tuple[int, int, int]:
    """How many patches (z, y, x) an image has.

    Raises:
        ValueError: its extent is no multiple of the patch, or it has one patch alone.
    """
    extent = tuple(images.shape[2:])
    if any(n % p for n, p in zip(extent, patch_size, strict=True)) or extent == tuple(patch_size):
        raise ValueError(
            f"images have {extent} voxels and patches {tuple(patch_size)}; give a crop_size of whole patches, two at "
            "least"
        )
    z, y, x = (n // p for n, p in zip(extent, patch_size, strict=True))
    return z, y, x


def voxels_of(cells: Tensor, cell_size: Sequence[int]) -> Tensor:
    """[N, C * prod(cell_size), d, h, w] -> [N, C, D, H, W]: the voxels that each cell holds."""
    cells = cells.unflatten(1, (-1, *cell_size))  # [N, C, a, b, c, d, h, w]
    return cells.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
