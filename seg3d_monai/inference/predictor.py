"""A trained detector as a predictor of raw blocks: normalise, detect, merge mirrored views, paste masks.

Must not import models.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seg3d_monai.data.intensity import Intensity, measure_intensity
from seg3d_monai.data.volume import Volume
from seg3d_monai.inference.crowding import detect_batch
from seg3d_monai.inference.detections import Detections, InstanceSettings
from seg3d_monai.inference.flips import AXES, flip_combinations, mirrored
from seg3d_monai.inference.instances import Instances
from seg3d_monai.inference.precision import autocast_dtype


class InstancePredictor:
    """Callable (block, roi) -> Instances around a network.

    Args:
        network: in evaluation mode images [N, C, D, H, W] -> N times {"boxes", "scores", "classes", "mask_logits"};
            boxes lie within the image, mask logits are one grid over each box. A block that holds nearly as many
            instances as its attribute `capacity`, if it has one, is looked at in parts (crowding.py).
        percentiles: of each channel of the whole volume, which are mapped to 0 and 1.
        score_threshold, mask_threshold, min_voxels, min_visible: which detections are instances, and where their masks
            end; see `InstanceSettings`.
        device: where the network runs.
        amp: "auto", "off", "bf16" or "fp16"; see `autocast_dtype`.
        intensity: the volume's intensity range; `for_volume` measures it.
        flips: axes along which a block is also predicted mirrored, in every combination: "xy" or ["x", "y"] gives four
            views (none, y, x, y and x), "zyx" eight, at as many times the cost. See `merge_views`. Worth it only for
            axes along which the network was trained with flips.
        in_channels: channels that the network takes; `for_volume` refuses others. None does not look.

    Raises:
        ValueError: unknown `amp` or `flips`, or a threshold out of its range.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        percentiles: tuple[float, float] = (1.0, 99.8),
        score_threshold: float = 0.5,
        mask_threshold: float = 0.5,
        min_voxels: int = 1,
        min_visible: float = 0.0,
        device: str | torch.device = "cpu",
        amp: str = "off",
        intensity: Intensity | None = None,
        flips: Sequence[str] | str = (),
        in_channels: int | None = None,
    ) -> None:
        if len(set(flips)) < len(flips) or not set(flips) <= set(AXES):
            raise ValueError(f"flips is {flips!r}; name some of the axes z, y and x, each once")
        self.network = network
        self.percentiles = (percentiles[0], percentiles[1])
        self.settings = InstanceSettings(
            score_threshold=score_threshold,
            mask_threshold=mask_threshold,
            min_voxels=min_voxels,
            min_visible=min_visible,
        )
        self.device = torch.device(device)
        self.amp = autocast_dtype(amp, device)
        self.intensity = intensity
        self.flips = tuple(axis for axis in AXES if axis in flips)
        self.in_channels = in_channels

    def for_volume(self, volume: Volume) -> "InstancePredictor":
        """The same predictor bound to the intensity range of one volume, measured once for all of its blocks.

        Raises:
            ValueError: the volume has another number of channels than the network takes.
        """
        if self.in_channels is not None and volume.shape[0] != self.in_channels:
            raise ValueError(
                f"the input has {volume.shape[0]} channels and the model takes {self.in_channels}; choose some with "
                "channels (--channels), or say which axis they are with axes (--axes)"
            )
        return self._bound(measure_intensity(volume, self.percentiles))

    def binding(self) -> dict[str, Any]:
        """What `for_volume` has measured, for `rebind`."""
        return {} if self.intensity is None else self.intensity.to_json()

    def rebind(self, volume: Volume, binding: dict[str, Any]) -> "InstancePredictor":
        """What `for_volume` gave when it was asked before, without measuring again."""
        return self._bound(Intensity.from_json(binding)) if binding else self.for_volume(volume)

    def _bound(self, intensity: Intensity) -> "InstancePredictor":
        bound = copy.copy(self)
        bound.intensity = intensity
        return bound

    def with_settings(self, settings: InstanceSettings) -> "InstancePredictor":
        """The same predictor under other settings."""
        changed = copy.copy(self)
        changed.settings = settings
        return changed

    def identity(self) -> dict[str, Any]:
        """Facts that tell predictors apart: the weights' hash and every setting that changes instances."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {
            "weights_sha256": digest.hexdigest(),
            "network_sha256": hashlib.sha256(repr(self.network).encode()).hexdigest(),
            "intensity": None if self.intensity is None else self.intensity.to_json(),
            **asdict(self.settings),
            "amp": str(self.amp),
            "flips": list(self.flips),
        }

    def __call__(self, block: Tensor, roi: Sequence[int]) -> Instances:
        """Instances of one block: `predict_batch` for a batch of one."""
        return self.predict_batch([block], [roi])[0]

    @torch.inference_mode()
    def detect(self, block: Tensor, roi: Sequence[int]) -> Detections:
        """What the network finds in one block; its instances under `settings` are those of `__call__`.

        A network of limited capacity looks at a block in parts where it holds many detections of at least the
        `score_threshold` of `settings`; that alone depends on them.

        Raises:
            ValueError: as `predict_batch`.
        """
        return self._detect(self._normalised(block, roi)[None])[0]

    @torch.inference_mode()
    def predict_batch(self, blocks: Sequence[Tensor], rois: Sequence[Sequence[int]]) -> list[Instances]:
        """Instances of several blocks; those of one shape go through the network together.

        The composition of a batch changes float bits, so results equal those one by one up to rounding.

        Args:
            blocks: each float32 [C, d, h, w], raw voxels; as many of one shape as the device's memory holds.
            rois: (z1, y1, x1, z2, y2, x2) of each block in the volume; named in errors.

        Returns:
            Instances of each block, in the blocks' order.

        Raises:
            ValueError: not bound to a volume, as many blocks as rois are not given, a voxel is NaN, or the network's
                boxes are not finite.
        """
        if len(blocks) != len(rois):
            raise ValueError(f"{len(blocks)} blocks and {len(rois)} rois; give one roi for each block")
        groups: dict[torch.Size, list[int]] = {}
        for number, block in enumerate(blocks):
            groups.setdefault(block.shape, []).append(number)
        instances: dict[int, Instances] = {}
        for numbers in groups.values():
            images = [self._normalised(blocks[n], rois[n]) for n in numbers]
            batch = torch.stack(images) if len(images) > 1 else images[0][None]
            for number, found in zip(numbers, self._detect(batch), strict=True):
                instances[number] = found.instances(self.settings)
        return [instances[n] for n in range(len(blocks))]

    def _normalised(self, block: Tensor, roi: Sequence[int]) -> Tensor:
        if self.intensity is None:
            raise ValueError("the predictor knows no intensity range; call for_volume(volume) first")
        values = self.intensity.normalise(np.asarray(block))
        if math.isnan(values.sum()):  # one NaN spreads through the whole block, and nothing would be found in it
            raise ValueError(f"block with roi {list(roi)} holds NaN; replace NaN voxels before use")
        return torch.from_numpy(values)

    def _detect(self, images: Tensor) -> list[Detections]:
        """What the network finds in each image, in all views."""
        images = images.to(self.device)
        was_training = self.network.training
        network = self.network.to(self.device).eval()
        views = []
        try:
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                for axes in flip_combinations(self.flips):
                    results = detect_batch(
                        network,
                        images.flip([axis + 2 for axis in axes]) if axes else images,
                        capacity=getattr(network, "capacity", None),
                        score_threshold=self.settings.score_threshold,
                    )
                    views.append([mirrored(found, axes, images.shape[2:]) for found in results])
        finally:
            network.train(was_training)
        return [Detections(views=of_image, size=tuple(images.shape[2:])) for of_image in zip(*views, strict=True)]
