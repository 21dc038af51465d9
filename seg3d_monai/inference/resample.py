"""A predictor of one voxel size on a stack of another: blocks are resampled on the fly, instances brought back.

The model's voxels are counted from the corner of the volume, never from that of the block, so two blocks that see the
same place see the same bits; data/resampling.py holds the arithmetic, which training shares. Masks are brought back by
the same means and interpolation. This file knows no network and no files.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seg3d_monai.data.resampling import (
    MOST_RATIO,
    UNCHANGED,
    Step,
    resample_image,
    resampled_roi,
    step_between,
    taps,
)
from seg3d_monai.data.volume import NEAR_SPACING, Volume, check_spacing
from seg3d_monai.inference.blocks import Roi, roi_shape
from seg3d_monai.inference.detections import Detections, InstanceSettings
from seg3d_monai.inference.instances import Instances

KEEP = "keep"
TOLERANCE = 0.02
"""An axis whose voxel sizes differ by less is left alone: resampling would blur it and gain nothing."""

_TIE = 1e-4  # of a voxel: a centre on the face of a mask belongs to the upper side, as half-open boxes have it

_log = logging.getLogger(__name__)


class ResamplingPredictor:
    """Callable (block, roi) -> Instances around a predictor that was made for voxels of another size.

    The predictor gets blocks in its own voxel size, and as their roi the place in the volume resampled as a whole.
    Its instances come back in voxels of the input, clipped to the block; where no voxel is half covered by a mask, that
    mask comes back empty. A voxel of the model at an inner face of a block is made of the part that the block
    sees: of a halo, the outermost voxel (of the larger of the two sizes) gives no full context, and `predict_volume`,
    which takes block size and halo as voxels of the model, adds that. Where all sizes agree blocks and instances pass
    untouched. The log says once which is the case.

    Args:
        predictor: callable (block: float32 Tensor [C, d, h, w], roi) -> Instances.
        spacing_um: (z, y, x) micrometres per voxel that it was made for.
        volume_spacing_um: (z, y, x) micrometres per voxel of the stack; `for_volume` takes it from the volume.
        tolerance: share of the voxel size by which an axis may differ and is left alone, 0 or more.
        takes_unknown: whether a stack that does not say its voxel size passes untouched; else it is refused.

    Raises:
        ValueError: a spacing is not three positive numbers, or they differ more than fifty-fold along an axis.
    """

    def __init__(
        self,
        predictor: Any,
        *,
        spacing_um: Sequence[float],
        volume_spacing_um: Sequence[float] | None = None,
        tolerance: float = TOLERANCE,
        takes_unknown: bool = False,
    ) -> None:
        self.predictor = predictor
        self.spacing_um = check_spacing(spacing_um, "model_spacing")
        self.tolerance = tolerance
        self.takes_unknown = takes_unknown
        self._said: set[Step | None] = set()
        self.volume_spacing_um = None if volume_spacing_um is None else check_spacing(volume_spacing_um)
        if self.volume_spacing_um is not None:
            _check_ratio(self.spacing_um, self.volume_spacing_um)

    def for_volume(self, volume: Volume) -> ResamplingPredictor:
        """The same predictor bound to the voxel size of one volume; the inner one is bound to the volume as it is.

        Raises:
            ValueError: the volume does not know its voxel size, or it differs more than fifty-fold along an axis.
        """
        bound = self._at_spacing_of(volume)
        if hasattr(self.predictor, "for_volume"):
            bound.predictor = self.predictor.for_volume(volume)
        return bound

    def binding(self) -> dict[str, Any]:
        """What the inner predictor's `for_volume` has measured, for `rebind`."""
        return dict(self.predictor.binding()) if hasattr(self.predictor, "binding") else {}

    def rebind(self, volume: Volume, binding: dict[str, Any]) -> ResamplingPredictor:
        """What `for_volume` gave when it was asked before, without measuring again."""
        if not hasattr(self.predictor, "rebind"):
            return self.for_volume(volume)
        bound = self._at_spacing_of(volume)
        bound.predictor = self.predictor.rebind(volume, binding)
        return bound

    def step_in(self, volume: Volume) -> Step:
        """(z, y, x) voxels of a volume per voxel of the model, 1 along an axis that is left alone.

        Raises:
            ValueError: as `for_volume`.
        """
        return self._at_spacing_of(volume)._step()

    def _at_spacing_of(self, volume: Volume) -> ResamplingPredictor:
        if volume.spacing_um is None and not self.takes_unknown:
            raise ValueError(
                f"{volume.path or 'the volume'} does not say its voxel size, and the predictor was made for "
                f"{list(self.spacing_um)} micrometre (z, y, x); pass --spacing '[z,y,x]'"
            )
        bound = copy.copy(self)
        bound.volume_spacing_um = self.spacing_um if volume.spacing_um is None else check_spacing(volume.spacing_um)
        _check_ratio(self.spacing_um, bound.volume_spacing_um)
        self._say(volume.spacing_um, bound._step())
        return bound

    def _say(self, spacing_um: Step | None, step: Step) -> None:
        if spacing_um in self._said:
            return
        self._said.add(spacing_um)
        model, stack = _text(self.spacing_um), "unknown" if spacing_um is None else _text(spacing_um)
        if step != UNCHANGED:
            done = "blocks are resampled, block_size and halo count the model's voxels; --model_spacing keep does not"
        elif spacing_um is None:
            done = "blocks are not resampled; --spacing '[z,y,x]' says the stack's"
        else:
            done = f"blocks are not resampled, as they agree to {self.tolerance:.0%}"
        _log.info("voxel size (z, y, x) of the model is %s micrometre, of the stack %s: %s", model, stack, done)

    @property
    def settings(self) -> InstanceSettings:
        """The settings of the inner predictor; missing where it has none."""
        settings: InstanceSettings = self.predictor.settings
        return settings

    def with_settings(self, settings: InstanceSettings) -> ResamplingPredictor:
        """The same predictor, the inner one under other settings."""
        changed = copy.copy(self)
        changed.predictor = self.predictor.with_settings(settings)
        return changed

    def detect(self, block: Tensor, roi: Roi) -> Detections:
        """What the inner predictor's `detect` finds in the resampled block; its instances come back as those of
        `__call__` do.
        """
        step = self._step()
        found: Detections = self.predictor.detect(resample(block, roi, step), resampled_roi(roi, step))
        return replace(found, restore=partial(restore, roi=roi, step=step))

    def identity(self) -> dict[str, Any]:
        """Facts that tell predictors apart: those of the inner one and the voxel size that it sees."""
        kind = self.predictor if hasattr(self.predictor, "__qualname__") else type(self.predictor)
        named = {"type": f"{kind.__module__}.{kind.__qualname__}"}
        return {
            "resampled_to_um": list(self.spacing_um),
            "tolerance": self.tolerance,
            "predictor": self.predictor.identity() if hasattr(self.predictor, "identity") else named,
        }

    def __call__(self, block: Tensor, roi: Roi) -> Instances:
        """Instances of one block.

        Args:
            block: float32 [C, d, h, w], raw voxels.
            roi: (z1, y1, x1, z2, y2, x2) of the block in the volume.

        Raises:
            ValueError: not bound to a volume.
            TypeError: the inner predictor does not return Instances.
        """
        step = self._step()
        found = self.predictor(resample(block, roi, step), resampled_roi(roi, step))
        return restore(found, roi, step)

    @property
    def predict_batch(self) -> Callable[[Sequence[Tensor], Sequence[Roi]], list[Instances]]:
        """Instances of several blocks, as `__call__` finds them in one; missing where the inner predictor has none."""
        inner = self.predictor.predict_batch

        def predict(blocks: Sequence[Tensor], rois: Sequence[Roi]) -> list[Instances]:
            step = self._step()
            resampled = [resample(block, roi, step) for block, roi in zip(blocks, rois, strict=True)]
            found = inner(resampled, [resampled_roi(roi, step) for roi in rois])
            return [restore(instances, roi, step) for instances, roi in zip(found, rois, strict=True)]

        return predict

    def _step(self) -> Step:
        """Voxels of the input per voxel of the model."""
        if self.volume_spacing_um is None:
            raise ValueError("the predictor knows no voxel size of the stack; call for_volume(volume) first")
        return step_between(self.spacing_um, self.volume_spacing_um, self.tolerance)


def at_model_spacing(
    predictor: Any, model_spacing: Sequence[float] | str | None, trained_um: Sequence[float] | None
) -> Any:
    """A predictor that sees voxels of the size that its model was trained with; what a bundle's `model_spacing` does.

    Args:
        predictor: callable (block, roi) -> Instances.
        model_spacing: (z, y, x) micrometres per voxel, to which every stack is resampled; "keep" to resample none; None
            for the size that the checkpoint keeps: stacks whose voxel size is known and differs by more than
            `NEAR_SPACING` are resampled to it.
        trained_um: what the checkpoint keeps, (z, y, x) micrometres per voxel, or None.

    Returns:
        A `ResamplingPredictor`, or the predictor itself where nothing is ever resampled.

    Raises:
        ValueError: if `model_spacing` is none of these.
    """
    if model_spacing is None and trained_um is not None:
        return ResamplingPredictor(predictor, spacing_um=trained_um, tolerance=NEAR_SPACING, takes_unknown=True)
    if model_spacing is None or model_spacing == KEEP:
        why = "model_spacing is keep" if model_spacing else "the training had no known voxel size in common"
        _log.info("blocks are not resampled: %s", why)
        return predictor
    if isinstance(model_spacing, str):
        raise ValueError(f"model_spacing is {model_spacing!r}; pass [z, y, x] in micrometre, {KEEP!r} or null")
    return ResamplingPredictor(predictor, spacing_um=model_spacing)


def resample(block: Tensor, roi: Roi, step: Step) -> Tensor:
    """A block in voxels of another size.

    Args:
        block: floating [C, d, h, w].
        roi: (z1, y1, x1, z2, y2, x2) of the block in the volume.
        step: (z, y, x) voxels of the volume per resampled voxel.

    Returns:
        [C, *roi_shape(resampled_roi(roi, step))] of the block's dtype; the block itself where every step is 1. Voxels
        whose sources the block holds have the same bits whichever block they are made from.
    """
    return resample_image(block, roi, resampled_roi(roi, step), step)


def restore(found: Instances, roi: Roi, step: Step) -> Instances:
    """Instances of a resampled block in the frame of the block itself.

    Args:
        found: instances in the frame of `resample(block, roi, step)`.
        roi: (z1, y1, x1, z2, y2, x2) of the block in the volume.
        step: (z, y, x) voxels of the volume per resampled voxel.

    Returns:
        As many instances, clipped to the block. A box grows where its mask reaches beyond it.

    Raises:
        TypeError: `found` is not Instances.
    """
    if not isinstance(found, Instances):
        raise TypeError(f"the predictor returned {type(found).__name__}; return seg3d_monai.inference.Instances")
    if step == UNCHANGED:
        return found
    grid = resampled_roi(roi, step)
    extent = np.array(roi_shape(roi))
    boxes = (found.boxes.astype(np.float64) + np.tile(grid[:3], 2)) * np.tile(step, 2) - np.tile(roi[:3], 2)
    boxes = boxes.clip(0, np.tile(extent, 2))
    masks = []
    for box, model_box, mask in zip(boxes, found.boxes, found.masks, strict=True):
        # A mask's voxels reach less than one voxel of the model beyond its box.
        low = np.floor(box[:3] - step).astype(int).clip(0)
        high = np.ceil(box[3:] + step).astype(int).clip(max=extent)
        first = np.floor(model_box[:3]).astype(int) + grid[:3]
        voxels = _restore_mask(mask, first, low + roi[:3], high + roi[:3], grid, step)
        if voxels.any():
            places = [np.flatnonzero(voxels.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
            box[:3] = np.minimum(box[:3], low + [p[0] for p in places])
            box[3:] = np.maximum(box[3:], low + [p[-1] + 1 for p in places])
        start, stop = np.floor(box[:3]).astype(int) - low, np.ceil(box[3:]).astype(int) - low
        masks.append(voxels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))])
    return Instances(boxes=boxes, scores=found.scores, classes=found.classes, masks=masks)


def _restore_mask(
    mask: NDArray[np.bool_], first: Sequence[int], low: Sequence[int], high: Sequence[int], grid: Roi, step: Step
) -> NDArray[np.bool_]:
    """The voxels low .. high of the volume, for a mask that starts at voxel `first` of the resampled one."""
    if not mask.any():
        return np.zeros(np.subtract(high, low), dtype=bool)
    covered = mask.astype(np.float32)
    for axis in range(3):
        target = np.arange(low[axis], high[axis]) + _TIE
        source, weights = taps(target, (grid[axis], grid[axis + 3]), 1 / step[axis])
        source -= first[axis]
        weights[(source < 0) | (source >= mask.shape[axis])] = 0
        # In numpy: a mask is small, and threads that wait for each other would take longer than the work.
        result = np.zeros((*covered.shape[:axis], len(target), *covered.shape[axis + 1 :]), dtype=np.float32)
        for tap in range(source.shape[1]):
            weight = weights[:, tap].astype(np.float32).reshape(-1, *(1,) * (2 - axis))
            result += covered.take(source[:, tap], axis, mode="clip") * weight
        covered = result
    return covered > 0.5


def _check_ratio(model: Step, stack: Step) -> None:
    for axis, a, b in zip("zyx", model, stack, strict=True):
        if max(a / b, b / a) > MOST_RATIO:
            raise ValueError(
                f"spacing along {axis} is {b} micrometre in the stack and {a} in what the predictor was made for; "
                "pass the stack's with --spacing '[z,y,x]', in micrometre, or --model_spacing keep"
            )


def _text(spacing: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in spacing)
