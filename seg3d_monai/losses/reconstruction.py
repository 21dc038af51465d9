"""How well hidden voxels were guessed (He et al. 2022)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MaskedReconstruction(nn.Module):
    """Mean squared error over the voxels of hidden patches.

    Args:
        normalise: whether each patch is to be guessed with its mean taken off and divided by its standard deviation, so
            that dim patches count as bright ones. The loss is then 1 for who guesses nothing.
        least_std: least standard deviation that a patch is divided by, in units of the image, above 0: what an empty
            patch holds is noise, which nobody can guess.

    Raises:
        ValueError: `least_std` is not above 0.
    """

    def __init__(self, normalise: bool = True, least_std: float = 0.02) -> None:
        super().__init__()
        if not least_std > 0:
            raise ValueError(f"least_std is {least_std}; it must be more than 0")
        self.normalise = normalise
        self.least_std = least_std

    def forward(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """{"reconstruction": scalar, float32}.

        Args:
            outputs: {"images" [N, C, D, H, W], "reconstruction" the same, "hidden" bool [N, d, h, w] patches,
                "patch_size" (z, y, x) voxels}.
            targets: not looked at.
        """
        wanted, guess = (patched(outputs[name].float(), outputs["patch_size"]) for name in ("images", "reconstruction"))
        if self.normalise:
            deviation, mean = self._moments(wanted)
            wanted = (wanted - mean) / deviation
        error = (guess - wanted).square().mean(-1)
        hidden = outputs["hidden"].flatten(1)
        return {"reconstruction": (error * hidden).sum() / hidden.sum()}

    def guessed_images(self, outputs: Mapping[str, Any]) -> Tensor:
        """What was guessed, in units of the images, to be looked at.

        Normalised patches get the true mean and deviation of their place, as in the pictures of He et al.: the network
        is not asked for these.

        Args:
            outputs: as of `forward`.

        Returns:
            float32 [N, C, D, H, W].
        """
        size = outputs["patch_size"]
        images, guess = outputs["images"].float(), patched(outputs["reconstruction"].float(), size)
        if self.normalise:
            deviation, mean = self._moments(patched(images, size))
            guess = guess * deviation + mean
        return unpatched(guess, images.shape, size)

    def _moments(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Deviation, at least `least_std`, and mean of each patch."""
        deviation, mean = torch.std_mean(patches, dim=-1, keepdim=True, correction=0)
        return deviation.clamp_min(self.least_std), mean


def patched(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """[N, C, D, H, W] -> [N, patches, C * voxels of a patch]; patches in the order of (z, y, x)."""
    a, b, c = patch_size
    cells = images.unflatten(4, (-1, c)).unflatten(3, (-1, b)).unflatten(2, (-1, a))  # [N, C, d, a, h, b, w, c]
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatched(patches: Tensor, shape: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """[N, patches, C * voxels of a patch] -> images of a shape [N, C, D, H, W]; turns `patched` round."""
    size = [n // p for n, p in zip(shape[2:], patch_size, strict=True)]
    cells = patches.unflatten(2, (shape[1], *patch_size)).unflatten(1, size)  # [N, d, h, w, C, a, b, c]
    return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(tuple(shape))
