"""A training in TensorBoard: losses, learning rate, validation metrics, and slices of a few validation volumes.

TensorBoard is imported here only, when it is asked for. How a picture is drawn is given; this file knows neither models
nor what a metric means.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events

from seg3d_monai.engine.evaluator import EvaluatorEvents, VolumeEvaluator
from seg3d_monai.engine.handlers import LossMeans
from seg3d_monai.engine.replicas import rank
from seg3d_monai.engine.trainer import InstanceTrainer, TrainerEvents

__all__ = ["TensorBoard"]

LARGEST_PICTURE = (64, 256, 256)
"""Voxels (z, y, x) of a volume that are drawn at most; more would show no cell."""


class TensorBoard:
    """Write events under `output_dir/tensorboard`, for `tensorboard --logdir`; a resumed run goes on there.

    Steps are iterations. Scalars are "train/NAME" for each loss (means over an interval and over processes),
    "train/lr", and "validation/NAME" for each metric. Pictures are "validation/VOLUME"; the newest of each also lies in
    `output_dir/slices`.

    Args:
        output_dir: folder of the run; made if missing.
        interval: iterations between points of the losses, > 0.
        validator: whose volumes are drawn; None draws nothing.
        draw: called as `draw(path, image [C, Z, Y, X], truth [Z, Y, X], prediction [Z, Y, X], spacing_um, title,
            position=(z, y, x))`, writes a PNG; None draws nothing.
        num_pictures: volumes that are drawn, the first ones of each validation, >= 0.

    Raises:
        ImportError: if TensorBoard is not installed, with the extra that brings it.
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        output_dir: str | Path,
        interval: int = 10,
        validator: VolumeEvaluator | None = None,
        draw: Callable[..., Any] | None = None,
        num_pictures: int = 2,
    ) -> None:
        if interval < 1 or num_pictures < 0:
            raise ValueError(f"interval={interval}, num_pictures={num_pictures}: give iterations > 0 and pictures >= 0")
        self._writer_class = import_writer()
        self.folder = Path(output_dir)
        self.interval = interval
        self.validator = validator
        self.draw = draw
        self.num_pictures = num_pictures
        self._means = LossMeans()
        self._writer: Any = None

    def attach(self, engine: InstanceTrainer) -> None:
        """Listen for iterations, validations and their volumes."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(TrainerEvents.VALIDATED, self._validated)
        if self.validator is not None and self.draw is not None:
            self.validator.add_event_handler(EvaluatorEvents.PREDICTED, self._predicted, engine)

    def _iteration_completed(self, engine: InstanceTrainer) -> None:
        self._means.add(engine.state.output[0])
        if engine.state.iteration % self.interval == 0:
            self._write("train", engine, {"lr": engine.optimizer.param_groups[0]["lr"]} | self._means.take())

    def _validated(self, engine: InstanceTrainer) -> None:
        self._write("validation", engine, engine.state.metrics)

    def _write(self, group: str, engine: InstanceTrainer, values: dict[str, float]) -> None:
        if rank() != 0:
            return
        writer = self._writer_at(engine)
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, engine.state.iteration)
        writer.flush()  # never closed: the last validation may come after all other ends

    def _writer_at(self, engine: InstanceTrainer) -> Any:
        if self._writer is None:  # what an earlier run wrote after its checkpoint is hidden, or would come twice
            self._writer = self._writer_class(str(self.folder / "tensorboard"), purge_step=engine.state.iteration)
        return self._writer

    def _predicted(self, validator: VolumeEvaluator, engine: InstanceTrainer) -> None:
        if rank() != 0 or validator.state.iteration > self.num_pictures:
            return
        name, volume, truth = validator.state.batch["name"], validator.state.batch["volume"], validator.state.truth
        point = _point_of_interest(truth)
        ranges = [_range_around(*pns) for pns in zip(point, LARGEST_PICTURE, truth.shape, strict=True)]
        window = tuple(slice(lower, upper) for lower, upper in ranges)
        image = volume.read((*(lower for lower, _ in ranges), *(upper for _, upper in ranges)))
        position = [p - lower for p, (lower, _) in zip(point, ranges, strict=True)]
        path = self.folder / "slices" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.png"
        title = f"{name}, epoch {engine.state.epoch}"
        prediction = validator.state.prediction[window]
        self.draw(path, image, truth[window], prediction, volume.spacing_um, title, position=position)  # type: ignore[misc]
        from matplotlib.image import imread  # here, since it takes long and most trainings draw nothing

        picture = imread(path)[..., :3]
        self._writer_at(engine).add_image(f"validation/{name}", picture, engine.state.iteration, dataformats="HWC")


def import_writer() -> Any:
    """TensorBoard's SummaryWriter, of torch.

    Raises:
        ImportError: if TensorBoard is not installed, with the extra that brings it.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'tensorboard=true needs TensorBoard; pip install "seg3d_monai[tracking]"', name="tensorboard"
        ) from error
    return SummaryWriter


def _point_of_interest(labels: np.ndarray) -> tuple[int, ...]:
    """Of all instances' voxels the middle one, as memory runs; without instances the middle of the volume."""
    found = np.flatnonzero((labels > 0) & (labels != np.iinfo(labels.dtype).max))
    if len(found) == 0:
        return tuple(size // 2 for size in labels.shape)
    return tuple(int(i) for i in np.unravel_index(found[len(found) // 2], labels.shape))


def _range_around(point: int, length: int, size: int) -> tuple[int, int]:
    """`length` voxels with a point in the middle, shifted into [0, size) and cut to it."""
    lower = max(0, min(point - length // 2, size - length))
    return lower, min(lower + length, size)
