"""What a pre-trained network knows of a stack, to be looked at: the image, what was hidden of it, and what was guessed.

A region is cut into crops as in training; in each, patches are hidden and guessed. Takes network and criterion as
callables; imports no model.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from seg3d_monai.data.intensity import Intensity, measure_intensity
from seg3d_monai.data.tiff_write import write_ome_tiff
from seg3d_monai.data.volume import Volume, check_roi, open_volume
from seg3d_monai.inference.blocks import Roi
from seg3d_monai.inference.precision import autocast_dtype

SUFFIXES = (".tif", ".tiff")


class Criterion(Protocol):
    """What `MaskedReconstruction` is."""

    def __call__(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The losses by name."""

    def guessed_images(self, outputs: Mapping[str, Any]) -> Tensor:
        """What was guessed, in units of the images."""


class Reconstructor:
    """Hides patches of crops and lets a network guess them.

    Args:
        network: images [N, C, D, H, W] -> what `MaskedReconstruction` takes; its attribute `patch_size` is the
            (z, y, x) voxels of a patch.
        loss_function: the criterion of the training.
        crop_size: (z, y, x) voxels of a crop, as in training.
        percentiles: of each channel of the whole volume, which are mapped to 0 and 1.
        seed: of what is hidden.
        device: where the network runs.
        amp: as of `InstanceTrainer`.
        in_channels: channels that the network takes.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        loss_function: Criterion,
        crop_size: Sequence[int],
        percentiles: tuple[float, float] = (1.0, 99.8),
        seed: int = 0,
        device: str | torch.device = "cpu",
        amp: str = "off",
        in_channels: int = 1,
    ) -> None:
        self.network, self.loss_function = network, loss_function
        self.crop_size = tuple(int(n) for n in crop_size)
        self.percentiles, self.seed, self.in_channels = (percentiles[0], percentiles[1]), seed, in_channels
        self.device = torch.device(device)
        self.amp_type = autocast_dtype(amp, device)

    def __call__(self, volume: Volume, roi: Roi) -> tuple[np.ndarray, float]:
        """Guess a region.

        Args:
            volume: raw voxels.
            roi: (z1, y1, x1, z2, y2, x2), at least a patch along each axis and two in all.

        Returns:
            float32 [3 * C, D, H, W]: the image as the network reads it, the same with 0 where it was hidden, and with
            the guess there; and the share of the variance of hidden voxels that is known.

        Raises:
            ValueError: another number of channels, or a region that is too small.
        """
        if volume.shape[0] != self.in_channels:
            raise ValueError(
                f"the image has {volume.shape[0]} channels and the network takes {self.in_channels}; choose them with "
                "channels"
            )
        extent = [roi[axis + 3] - roi[axis] for axis in range(3)]
        size = self._crop(extent)
        self.network.to(self.device).eval()
        intensity = measure_intensity(volume, self.percentiles)
        shown = np.zeros((3 * self.in_channels, *extent), np.float32)
        losses = []
        for number, start in enumerate(crop_starts(extent, size)):
            place = [a + b for a, b in zip(roi[:3], start, strict=True)]
            raw = volume.read((*place, *(a + n for a, n in zip(place, size, strict=True))))
            crop, loss = self._guess(intensity, raw, number)
            shown[(slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))] = crop
            losses.append(loss)
        return shown, 1 - float(np.mean(losses))

    def _crop(self, extent: Sequence[int]) -> tuple[int, ...]:
        """Whole patches, no more than a crop or the region holds."""
        patch: Sequence[int] = self.network.patch_size  # type: ignore[assignment]
        size = tuple(min(crop, n) // p * p for crop, n, p in zip(self.crop_size, extent, patch, strict=True))
        if 0 in size or size == tuple(patch):
            raise ValueError(
                f"crop_size is {list(self.crop_size)} and the region {list(extent)} voxels; both must hold a patch of "
                f"{list(patch)} along each axis, and two in all"
            )
        return size

    def _guess(self, intensity: Intensity, raw: np.ndarray, number: int) -> tuple[np.ndarray, float]:
        image = torch.from_numpy(intensity.normalise(raw))[None].to(self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(self.seed + number)
            with torch.autocast(self.device.type, self.amp_type, enabled=self.amp_type is not None):
                outputs = self.network(image)
            loss = sum(float(part) for part in self.loss_function(outputs, []).values())
            seen, guess = outputs["images"].float(), self.loss_function.guessed_images(outputs)
        hidden = outputs["hidden"][:, None].float()
        for axis, cells in enumerate(outputs["patch_size"]):
            hidden = hidden.repeat_interleave(cells, 2 + axis)
        shown = torch.cat([seen, seen * (1 - hidden), torch.lerp(seen, guess, hidden)], 1)
        return shown[0].cpu().numpy(), loss


def reconstruct_volume(
    *,
    image: str | os.PathLike[str],
    inferer: Callable[[Volume, Roi], tuple[np.ndarray, float]],
    output: str | os.PathLike[str],
    roi: Sequence[int] | None = None,
    most_size: Sequence[int] = (64, 256, 256),
    axes: str | None = None,
    spacing: Sequence[float] | None = None,
    channels: Sequence[int] | int | None = None,
    time: int = 0,
    level: int = 0,
) -> str:
    """Write what a network knows of a region as an OME-TIFF; a file that is there is replaced.

    Args:
        image, axes, spacing, channels, time, level: as `open_volume`.
        inferer: such as a `Reconstructor`.
        output: NAME.tif.
        roi: (z1, y1, x1, z2, y2, x2) in voxels; None is the middle.
        most_size: (z, y, x) voxels of the middle, at most.

    Returns:
        One line that says what was written.

    Raises:
        FileNotFoundError: the image or the output's folder does not exist.
        ValueError: the output is not named .tif, or as the inferer.
    """
    target = Path(output)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"output is {str(output)!r}; give a NAME.tif, which is what is written")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"output {str(output)!r}: its folder does not exist; make it first")
    volume = open_volume(image, axes=axes, spacing=spacing, channels=channels, time=time, level=level)
    region = check_roi(_middle(volume.shape[1:], most_size) if roi is None else roi, volume.shape)
    shown, explained = inferer(volume, region)
    partial = target.with_name(f".partial-{os.getpid()}-{target.stem}.tif")
    try:
        write_ome_tiff(partial, shown, volume.spacing_um)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return f"explained = {explained:.3f} in {list(region)}; image, visible part and guess are the channels of {target}"


def crop_starts(extent: Sequence[int], size: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Where crops of a size begin that cover an extent; the last one of an axis ends at its border."""
    along = [sorted({min(start, n - s) for start in range(0, n, s)}) for n, s in zip(extent, size, strict=True)]
    return itertools.product(*along)


def _middle(extent: Sequence[int], most: Sequence[int]) -> list[int]:
    size = [min(n, m) for n, m in zip(extent, most, strict=True)]
    start = [(n - s) // 2 for n, s in zip(extent, size, strict=True)]
    return [*start, *(a + s for a, s in zip(start, size, strict=True))]
