"""How good settings are, counted from detections that are kept: the network looks at each volume once.

The blocks are those of a prediction. In each, instances come from its detections by the prediction's own code, and a
voxel belongs to the best of them (rule 1 of inference/stitch.py). A true object counts in the block that owns most of
it. So does an instance that lies mostly on a true object: where that object counts; any other counts in its own block,
if that owns most of it (rule 4). Where a volume is one block the numbers are those of a prediction; where it is
several, objects that a block's read ROI cuts are cut in truth and prediction, and what stitching makes of two blocks
that disagree is left out.

A lower score threshold adds instances behind those there are and changes nothing of these, not even their voxels. So
all thresholds are read off one table. Must not import models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seg3d_monai.data.intensity import check_block
from seg3d_monai.engine.objective import Objective
from seg3d_monai.engine.tune_search import SCORE, Curve, Settings
from seg3d_monai.inference import Instances
from seg3d_monai.inference.blocks import BlockPlan, roi_slices
from seg3d_monai.inference.detections import Detections, MaskedDetections
from seg3d_monai.inference.evidence import label_map, take_census
from seg3d_monai.inference.predict import plan_blocks
from seg3d_monai.metrics import ContingencyTable, InstanceMetrics
from seg3d_monai.metrics.contingency import ignore_value

__all__ = ["DetectionJudge", "network_attributes"]

MOST_STEPS = 100
"""Of a curve: half of them as many shares of the scores, half as many shares of the objects."""
Ints = NDArray[np.int64]
_log = logging.getLogger(__name__)


@contextmanager
def network_attributes(network: nn.Module, values: Mapping[str, float]) -> Iterator[None]:
    """Run a network under other values of its attributes."""
    before = {name: getattr(network, name) for name in values}
    try:
        for name, value in values.items():
            setattr(network, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(network, name, value)


@dataclass(frozen=True, eq=False)
class _Block:
    """A block of a volume and its true objects.

    Attributes:
        volume: place of the volume.
        plan: the blocks of the volume.
        index: which of them.
        codes: int32 [d, h, w] of what the block reads: 0 background, 1 to T the true objects that count here, T + 1
            where the truth is ignored, from T + 2 objects that count in other blocks.
        num_codes: how many there are.
        voxels: int64 [T] of the objects that count here.
    """

    volume: int
    plan: BlockPlan
    index: int
    codes: NDArray[np.int32]
    num_codes: int
    voxels: Ints


@dataclass(frozen=True, eq=False)
class _Counts:
    """Voxels that instances share with true objects.

    Attributes:
        scores: float64 [P] of the instances.
        predicted: int64 [K] place of an instance among them.
        truth: int64 [K] number of a true object from 1, 0 for background.
        voxels: int64 [K] that both share.
        is_ignored: bool [K] whether these are voxels whose truth is ignored.
    """

    scores: NDArray[np.float64]
    predicted: Ints
    truth: Ints
    voxels: Ints
    is_ignored: NDArray[np.bool_]


class DetectionJudge:
    """Scores settings on volumes.

    Settings are `score_threshold`, `mask_threshold`, `min_voxels`, `min_visible` and attributes of the network.

    Args:
        dataset: of dicts {"volume": Volume, "label": Volume, "name": str, ...}.
        predictor: with `detect`, as `InstancePredictor` has it, and `for_volume` if it has one.
        network: of the predictor.
        network_names: attributes of the network that are settings; each combination costs a look at all volumes.
        objective: what is best.
        block_size: voxels (z, y, x) a block owns; None for each volume in one block.
        halo: voxels (z, y, x) read around a block.
        least_score: the least score threshold that is looked at.

    Attributes:
        num_truth: true objects.
        num_blocks: blocks of all volumes.

    Raises:
        ValueError: the volumes hold no object.
    """

    def __init__(
        self,
        *,
        dataset: Sequence[dict[str, Any]],
        predictor: Any,
        network: nn.Module,
        network_names: Sequence[str],
        objective: Objective,
        block_size: Sequence[int] | None,
        halo: Sequence[int] | None,
        least_score: float,
    ) -> None:
        items = [dataset[place] for place in range(len(dataset))]
        self._volumes = [item["volume"] for item in items]
        self._network, self._network_names = network, tuple(network_names)
        self._objective, self._least_score = objective, least_score
        self._blocks: list[_Block] = []
        for place, item in enumerate(items):
            plan = plan_blocks(item["volume"], predictor, block_size, halo)
            self._blocks += _blocks_of(place, plan, item["label"])
        self._truth_voxels = np.concatenate([np.zeros(0, np.int64), *(block.voxels for block in self._blocks)])
        self.num_truth, self.num_blocks = len(self._truth_voxels), len(self._blocks)
        if not self.num_truth:
            named = ", ".join(item["name"] for item in items[:4]) + (", …" if len(items) > 4 else "")
            raise ValueError(
                f"there is no object in {named}, so no setting is better than another; choose other volumes with "
                "tune_split or tune_where"
            )
        bind = getattr(predictor, "for_volume", lambda volume: predictor)
        self._predictors = [bind(volume) for volume in self._volumes]
        self._found: dict[Any, list[Detections]] = {}
        self._masked: tuple[Any, list[MaskedDetections]] = (None, [])
        self._counts: dict[Any, _Counts] = {}
        self._curves: dict[Any, Curve] = {}

    def report(self, settings: Settings) -> dict[str, Any]:
        """All metrics under these settings, as `InstanceMetrics.compute` gives them; the volumes count as one."""
        return self._report(self._counted(settings), settings[SCORE])

    def curve(self, settings: Settings) -> Curve:
        """The objective over the score threshold, the other settings as they are."""
        key = self._key(settings)
        if key not in self._curves:
            counts = self._counted(settings)
            upper = _steps(counts.scores)
            self._curves[key] = Curve(
                lower=self._least_score,
                upper=upper,
                values=[self._objective.of(self._report(counts, threshold)) for threshold in upper],
                num_objects=[int((counts.scores >= threshold).sum()) for threshold in upper],
            )
        return self._curves[key]

    def _report(self, counts: _Counts, score_threshold: float) -> dict[str, Any]:
        rows = counts.scores[counts.predicted] >= score_threshold
        truth, voxels, is_ignored = counts.truth[rows], counts.voxels[rows], counts.is_ignored[rows]
        uncovered = self._truth_voxels.copy()
        is_true = truth > 0
        np.subtract.at(uncovered, truth[is_true] - 1, voxels[is_true])
        missed = np.flatnonzero(uncovered)
        table = ContingencyTable()
        table.add_counts(
            np.concatenate([truth, missed + 1]),
            np.concatenate([counts.predicted[rows] + 1, np.zeros_like(missed)]),
            np.concatenate([voxels, uncovered[missed]]),
            np.concatenate([is_ignored, np.zeros(len(missed), bool)]),
        )
        metrics = InstanceMetrics()
        metrics.add_table(table)
        return metrics.compute()

    def _counted(self, settings: Settings) -> _Counts:
        key = self._key(settings)
        if key not in self._counts:
            min_voxels, min_visible = int(settings["min_voxels"]), settings["min_visible"]
            parts, first, first_true = [], 0, 0
            for block, masked in zip(self._blocks, self._masks(settings), strict=True):
                part = _count_block(block, masked.instances(min_voxels, min_visible), first, first_true)
                parts.append(part)
                first += len(part.scores)
                first_true += len(block.voxels)
            self._counts[key] = _Counts(
                **{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
            )
        return self._counts[key]

    def _key(self, settings: Settings) -> tuple[tuple[str, float], ...]:
        """All settings but the score threshold."""
        return tuple(sorted((name, value) for name, value in settings.items() if name != SCORE))

    def _masks(self, settings: Settings) -> list[MaskedDetections]:
        """Masks of all blocks; those of one threshold at a time, as they are many."""
        detections = self._detections({name: settings[name] for name in self._network_names})
        key = (id(detections), settings["mask_threshold"])
        if self._masked[0] != key:
            self._masked = (None, [])
            self._masked = (key, [one.masked(self._least_score, settings["mask_threshold"]) for one in detections])
        return self._masked[1]

    def _detections(self, values: Mapping[str, float]) -> list[Detections]:
        key = tuple(values.values())
        if key not in self._found:
            shown = "".join(f", {name} {value:g}" for name, value in values.items())
            _log.info("the network looks at %d volumes in %d blocks%s", len(self._volumes), len(self._blocks), shown)
            with network_attributes(self._network, values):
                self._found[key] = [self._detect(block) for block in self._blocks]
        return self._found[key]

    def _detect(self, block: _Block) -> Detections:
        volume, roi = self._volumes[block.volume], block.plan[block.index].read
        voxels = volume.read(roi)
        check_block(voxels, roi, volume.path)
        tensor = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))
        found: Detections = self._predictors[block.volume].detect(tensor, roi)
        return found


def _blocks_of(place: int, plan: BlockPlan, label: Any) -> list[_Block]:
    """The blocks of one volume; every true object counts in the block that owns most of it, the first of several."""
    truth = label.read((0, 0, 0, *label.shape[1:]))[0]
    ignore = ignore_value(truth.dtype)
    ids, inverse = np.unique(truth, return_inverse=True)
    is_ignored = np.zeros(len(ids), bool) if ignore is None else ids == ignore
    is_object = (ids > 0) & ~is_ignored
    num_objects = int(is_object.sum())
    numbers = np.where(is_object, np.cumsum(is_object), np.where(is_ignored, num_objects + 1, 0)).astype(np.int32)
    codes = numbers[inverse].reshape(truth.shape)
    most, home = np.zeros(num_objects + 2, np.int64), np.zeros(num_objects + 2, np.int64)
    for block in plan:
        owned = np.bincount(codes[roi_slices(block.owned)].ravel(), minlength=num_objects + 2)
        home[owned > most] = block.index
        np.maximum(most, owned, out=most)
    blocks = []
    for block in plan:
        part = codes[roi_slices(block.read)]
        is_seen = np.bincount(part.ravel(), minlength=num_objects + 2) > 0
        is_mine = home == block.index
        is_mine[[0, -1]] = is_seen[[0, -1]] = False
        mine, others = np.flatnonzero(is_mine), np.flatnonzero(is_seen & ~is_mine)
        renumbered = np.zeros(num_objects + 2, np.int32)
        renumbered[mine] = np.arange(1, len(mine) + 1)
        renumbered[-1] = len(mine) + 1
        renumbered[others] = np.arange(len(others)) + len(mine) + 2
        seen, num_codes = renumbered[part], len(mine) + 2 + len(others)
        voxels = np.bincount(seen.ravel(), minlength=num_codes)[1 : len(mine) + 1]
        blocks.append(_Block(place, plan, block.index, seen, num_codes, voxels))
    return blocks


def _count_block(block: _Block, instances: Instances, first: int, first_true: int) -> _Counts:
    """What the instances of a block share with its true objects.

    Args:
        block: the block.
        instances: in the block's frame.
        first: how many instances the blocks before have.
        first_true: how many true objects they have.
    """
    roi, width, count, num_true = block.plan[block.index].read, block.num_codes, len(instances), len(block.voxels)
    placed = instances.place(roi)
    labels = label_map(placed, roi).ravel()
    covered = np.flatnonzero(labels)
    pairs = labels[covered].astype(np.int64) * width + block.codes.ravel()[covered]
    shared = np.bincount(pairs, minlength=(count + 1) * width).reshape(count + 1, width)[1:]
    counts_here = shared.any(axis=1)
    if len(block.plan) > 1:
        census = take_census(block.plan, block.index, placed)
        at_home = np.zeros(count, bool)
        at_home[: len(census)] = census.home == block.index
        of_objects = shared.copy()
        of_objects[:, [0, num_true + 1]] = 0
        object_below = of_objects.argmax(axis=1)
        is_on_object = 2 * of_objects.max(axis=1) > shared.sum(axis=1)
        counts_here &= np.where(is_on_object, object_below <= num_true, at_home)
    # Objects that count elsewhere are background here.
    shared[:, 0] += shared[:, num_true + 2 :].sum(axis=1)
    row, code = np.nonzero(shared[counts_here, : num_true + 2])
    is_ignored = code == num_true + 1
    return _Counts(
        scores=instances.scores[counts_here].astype(np.float64),
        predicted=first + row,
        truth=np.where((code > 0) & ~is_ignored, code + first_true, 0),
        voxels=shared[counts_here][row, code],
        is_ignored=is_ignored,
    )


def _steps(scores: NDArray[np.float64]) -> list[float]:
    """Score thresholds between which a curve is flat, or nearly so where there are very many; 1 is the last."""
    distinct = np.unique(scores)
    if len(distinct) > MOST_STEPS:
        half = MOST_STEPS // 2
        by_score = np.searchsorted(distinct, np.arange(1, half + 1) / half, side="right") - 1
        by_rank = np.linspace(0, len(distinct) - 1, half).astype(int)
        distinct = distinct[np.unique(np.concatenate([by_score[by_score >= 0], by_rank]))]
    return [float(score) for score in distinct if score < 1] + [1.0]
