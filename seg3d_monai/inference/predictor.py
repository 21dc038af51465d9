"""A trained detector as a predictor of raw blocks: normalise, detect, paste masks. Must not import models."""

import copy
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seg3d_monai.data.intensity import Intensity, measure_intensity
from seg3d_monai.data.volume import Volume
from seg3d_monai.inference.crowding import detect
from seg3d_monai.inference.instances import Instances
from seg3d_monai.inference.mask_paste import paste_mask
from seg3d_monai.inference.precision import autocast_dtype


class InstancePredictor:
    """Callable (block, roi) -> Instances around a network.

    Args:
        network: in evaluation mode images [1, C, D, H, W] -> [{"boxes", "scores", "classes", "mask_logits"}]; mask
            logits are one grid over each box. A block that holds nearly as many instances as its attribute `capacity`,
            if it has one, is looked at in parts (crowding.py).
        percentiles: of each channel of the whole volume, which are mapped to 0 and 1.
        score_threshold: least score of an instance.
        mask_threshold: probability at which a voxel belongs to an instance.
        min_voxels: least number of voxels of an instance's mask.
        min_visible: least share of its mask that no instance with a higher score covers; those with less are
            second views of the same cell, as in Panoptic FPN (Kirillov et al. 2019).
        device: where the network runs.
        amp: "auto", "off", "bf16" or "fp16"; see `autocast_dtype`.
        intensity: the volume's intensity range; `for_volume` measures it.

    Raises:
        ValueError: unknown `amp`, or a threshold out of its range.
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
    ) -> None:
        if not 0 < mask_threshold < 1:
            raise ValueError(f"mask_threshold is {mask_threshold}; give a probability between 0 and 1")
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold is {score_threshold}; give a score in 0 to 1")
        if min_voxels < 0:
            raise ValueError(f"min_voxels is {min_voxels}; give 0 or more")
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible is {min_visible}; give a share in 0 to 1")
        self.network = network
        self.percentiles = (percentiles[0], percentiles[1])
        self.score_threshold = score_threshold
        self.mask_threshold = mask_threshold
        self.min_voxels = min_voxels
        self.min_visible = min_visible
        self.device = torch.device(device)
        self.amp = autocast_dtype(amp, device)
        self.intensity = intensity

    def for_volume(self, volume: Volume) -> "InstancePredictor":
        """The same predictor bound to the intensity range of one volume, measured once for all of its blocks."""
        bound = copy.copy(self)
        bound.intensity = measure_intensity(volume, self.percentiles)
        return bound

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
            "score_threshold": self.score_threshold,
            "mask_threshold": self.mask_threshold,
            "min_voxels": self.min_voxels,
            "min_visible": self.min_visible,
            "amp": str(self.amp),
        }

    @torch.inference_mode()
    def __call__(self, block: Tensor, roi: tuple[int, ...]) -> Instances:
        """Instances of one block.

        Args:
            block: float32 [C, d, h, w], raw voxels.
            roi: (z1, y1, x1, z2, y2, x2) of the block in the volume; not used.

        Raises:
            ValueError: not bound to a volume.
        """
        if self.intensity is None:
            raise ValueError("the predictor knows no intensity range; call for_volume(volume) first")
        image = torch.from_numpy(self.intensity.normalise(np.asarray(block))).to(self.device)
        was_training = self.network.training
        network = self.network.to(self.device).eval()
        try:
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                capacity = getattr(network, "capacity", None)
                found: Any = detect(network, image, capacity=capacity, score_threshold=self.score_threshold)
        finally:
            network.train(was_training)
        boxes, masks, kept = found["boxes"].float(), [], []
        claimed = np.zeros(image.shape[1:], dtype=bool)
        for i in found["scores"].argsort(descending=True, stable=True).tolist():
            if found["scores"][i] < self.score_threshold:
                break
            mask = paste_mask(found["mask_logits"][i], boxes[i], self.mask_threshold).numpy()
            window = claimed[tuple(slice(low, low + n) for low, n in zip(_corner(boxes[i]), mask.shape, strict=True))]
            voxels = np.count_nonzero(mask)
            if voxels >= self.min_voxels and np.count_nonzero(mask & ~window) >= self.min_visible * voxels:
                window |= mask
                masks.append(mask)
                kept.append(i)
        return Instances(
            boxes=boxes[kept].numpy(),
            scores=found["scores"][kept].numpy(),
            classes=found["classes"][kept].numpy(),
            masks=masks,
        )


def _corner(box: Tensor) -> list[int]:
    """Lower corner of a box's voxels."""
    return [int(v) for v in box[:3].floor().tolist()]
