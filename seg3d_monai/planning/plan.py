"""The plan of one bundle: its rules in the order in which they depend on each other.

What the user gives wins over a rule, and every later rule works with it. Must not know: files, how a plan is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from seg3d_monai.data.volume import NEAR_SPACING, Spacing, check_spacing
from seg3d_monai.planning import data_rules, inference_rules, network_rules
from seg3d_monai.planning.bundle_config import INFERENCE, TRAIN, BundleConfig
from seg3d_monai.planning.choices import Choices, Decision
from seg3d_monai.planning.counts import Counts, objects_in_regions
from seg3d_monai.planning.fingerprint import Fingerprint
from seg3d_monai.planning.memory import MemoryModel, measure_memory
from seg3d_monai.planning.wording import by, memory_text, names, number

Triple = tuple[int, int, int]

SMALL, TYPICAL, LARGE, CROWDED = 5, 75, 95, 99
"""Percentiles that stand for small, for most and for large objects, and for crowded crops."""
HALVED_AT = 0.75
"""Share of the queries that the objects of a block may take: from 0.8 on prediction looks at it in parts."""


@dataclass(frozen=True)
class Plan:
    """A bundle's plan.

    Args:
        bundle: its name.
        decisions: what was decided.
        train: keys and values of the overlay for training, those that the bundle does not have already.
        inference: the same for prediction.
        facts: what a training and a prediction will be like, a sentence each.
    """

    bundle: str
    decisions: tuple[Decision, ...]
    train: dict[str, Any]
    inference: dict[str, Any]
    facts: tuple[str, ...]


def plan_bundle(fingerprint: Fingerprint, bundle: BundleConfig, memory: int, given: Mapping[str, Any]) -> Plan:
    """Make a plan.

    Args:
        fingerprint: of the training set.
        bundle: what is planned.
        memory: bytes that the tensors of a training, or of a prediction, may take.
        given: keys that the user has decided; those that the bundle does not take are left out.

    Returns:
        The plan, with the reason of each of its keys.

    Raises:
        ValueError: the memory is too small for a crop that holds one object, or for what was given; the volumes differ
            in channels; resampling is asked of volumes without a voxel size; no object counts.
    """
    return _Planner(fingerprint, bundle, memory, given).plan()


class _Planner:
    """Measurements and decisions of one plan on their way."""

    def __init__(self, fingerprint: Fingerprint, bundle: BundleConfig, memory: int, given: Mapping[str, Any]) -> None:
        self.fingerprint = fingerprint
        self.bundle = bundle
        self.memory = memory
        self.choices = Choices(bundle, given)
        self.choose = self.choices.choose

    def plan(self) -> Plan:
        self.target = self._target()
        self._objects()
        self._inputs()
        self.level_strides = self._strides()
        self.coarsest = list(self.level_strides.values())[-1]
        self._wanted_crop()
        self._network()
        model = self._measured()
        self._fit_crop(model)
        self._network()
        batch = self._batch(model)
        read = self._blocks(model)
        values = self.choices.values
        self.bundle.check(values)
        visible, whole = self.counts.visible, self.counts.whole
        return Plan(
            bundle=self.bundle.name,
            decisions=tuple(self.choices.decisions.values()),
            train=self.bundle.overlay(TRAIN, values),
            inference=self.bundle.overlay(INFERENCE, values),
            facts=(
                f"A crop holds {number(visible.mean())} objects, {number(whole.mean())} of them whole; a crowded one "
                f"{number(self.crowded)}.",
                f"The tensors of a training step take {memory_text(model.training(self.crop, batch))} of "
                f"{memory_text(self.memory)}.",
                f"A block of a prediction reads {by(read)} voxels and takes {memory_text(model.prediction(read))}.",
            ),
        )

    def _target(self) -> Spacing | None:
        """The voxel size that crops are resampled to."""
        target = self.choose("target_spacing_um", data_rules.target_spacing, self.fingerprint)
        if target is None:
            return None
        if not self.bundle.takes("target_spacing_um"):
            raise ValueError(
                f"the volumes have different voxel sizes, and the bundle {self.bundle.name} has no key "
                "target_spacing_um to bring them to one; index volumes of one voxel size"
            )
        if self.fingerprint.without_spacing:
            raise ValueError(
                f"target_spacing_um={target}: {names(self.fingerprint.without_spacing)} do not say their voxel size; "
                "give it in the manifest's columns spacing_z_um, spacing_y_um, spacing_x_um, and index again"
            )
        return check_spacing(target, "target_spacing")

    def _objects(self) -> None:
        """Which objects count, and how large those are that end within their volume."""
        whole = self.fingerprint.is_whole
        sizes, extents = self.fingerprint.sizes(self.target)[whole], self.fingerprint.extents(self.target)[whole]
        least = self.choose("train#dataset#min_object_voxels", data_rules.smallest_object, sizes)
        counting = sizes >= (least or 0)
        if not counting.any():
            raise ValueError(
                f"train#dataset#min_object_voxels={least} leaves no object, the largest has {sizes.max():.0f} voxels; "
                "lower it"
            )
        self.extents = extents[counting]
        self.small, self.median, self.typical, self.large = np.percentile(
            self.extents, [SMALL, 50, TYPICAL, LARGE], axis=0
        )
        self.choose("min_voxels", data_rules.smallest_mask, sizes[counting])
        self.density = float(np.percentile(self.fingerprint.densities(self.target), LARGE))

    def _inputs(self) -> None:
        """Channels, classes and normalisation."""
        channels = sorted({volume.channels for volume in self.fingerprint.volumes})
        if len(channels) > 1:
            raise ValueError(f"the training volumes have {' and '.join(map(str, channels))} channels; index equal ones")
        self.choose("in_channels", lambda: (channels[0], "what the volumes have"))
        self.choose("num_classes", lambda: (self.fingerprint.num_classes, "what the index has"))
        foreground = np.array([volume.foreground for volume in self.fingerprint.volumes])
        default = self.bundle.get("inferer#percentiles")
        percentiles = self.choose("inferer#percentiles", data_rules.upper_percentile, foreground, default)
        self.choose("index#percentiles", lambda: (percentiles, "those of the prediction"))

    def _strides(self) -> dict[str, Triple]:
        """Strides of the backbone's levels by name, finest first."""
        if self.bundle.takes("backbone#stem_stride") and self.bundle.takes("backbone#stage_strides"):
            num_stages = len(self.bundle.get("backbone#stage_strides"))
            (stem, stages), reason = network_rules.strides(self.median, num_stages)
            self.choose("backbone#stem_stride", lambda: (stem, reason))
            self.choose("backbone#stage_strides", lambda: (stages, "see the stem's"))
        return dict(self.bundle.build("backbone", self.choices.values).strides)

    def _wanted_crop(self) -> None:
        voxel = self.target or self.fingerprint.spacing_um
        is_square = voxel is None or abs(voxel[1] / voxel[2] - 1) <= NEAR_SPACING
        self.shape = np.median(self.fingerprint.shapes(self.target), axis=0)
        self._set_crop(
            self.choose(
                "crop_size", data_rules.crop_size, self.median, self.large, self.shape, self.coarsest, is_square
            )
        )

    def _set_crop(self, crop: Sequence[int]) -> None:
        self.crop: Triple = (crop[0], crop[1], crop[2])
        self.counts: Counts = objects_in_regions(self.fingerprint, self.crop, self.target)
        self.crowded = float(np.percentile(self.counts.visible, CROWDED))

    def _network(self) -> None:
        """Anchors, masks, limits and queries, as far as the bundle has them."""
        if self.bundle.takes("network_def#anchor_shapes"):
            self._anchors()
            self._limits()
        if self.bundle.takes("num_queries"):
            self.choose("num_queries", network_rules.num_queries, self.crowded)

    def _anchors(self) -> None:
        default = self.bundle.get("network_def#anchor_shapes")
        num_levels = len(self.choices.given.get("network_def#anchor_shapes", default))
        fused = self.bundle.get("network_def#fpn_levels") or list(self.level_strides)
        pyramid = {f"p{name[1:]}": step for name, step in self.level_strides.items() if name in fused}
        levels = self.choose(
            "network_def#anchor_levels", network_rules.anchor_levels, pyramid, num_levels, self.small, self.large
        )
        self.choose("network_def#anchor_shapes", network_rules.anchor_shapes, self.extents, default, len(levels))
        self.choose("network_def#mask_roi_size", network_rules.mask_roi_size, self.typical)

    def _limits(self) -> None:
        """How many boxes are kept, and trained on."""
        for key, kind in (("pre_nms_top_n", "anchors"), ("post_nms_top_n", "proposals")):
            id = f"network_def#{key}"
            self.choose(id, network_rules.kept_boxes, kind, self.crowded, self.density, self.bundle.get(id))
        id = "network_def#max_detections"
        self.choose(id, network_rules.most_detections, self.density, self.bundle.get(id))
        for id in ("network_def#num_roi_samples", "loss#num_anchor_samples"):
            self.choose(id, network_rules.num_samples, self.crowded, self.bundle.get(id))

    def _measured(self) -> MemoryModel:
        return measure_memory(
            self.bundle,
            self.choices.values,
            crop_size=self.crop,
            objects=max(1, round(float(self.counts.visible.mean()))),
            extent=(ceil(self.median[0]), ceil(self.median[1]), ceil(self.median[2])),
        )

    def _fit_crop(self, model: MemoryModel) -> None:
        """Make the crop smaller where the memory does not hold it."""
        batch = self.choices.given.get("batch_size", 1)
        wanted = crop = self.crop
        z, y, x = (
            min(n, data_rules.fit_into(step * ceil(length / step), whole, step))
            for n, length, whole, step in zip(crop, self.large, self.shape, self.coarsest, strict=True)
        )
        while (needed := model.training(crop, batch)) > self.memory:
            is_given = "crop_size" in self.choices.given
            smaller = None if is_given else data_rules.smaller_crop(crop, self.median, (z, y, x), self.coarsest)
            if smaller is None:
                holds = "as given" if is_given else f"that hold one large object ({by(self.large)})"
                raise ValueError(
                    f"memory={memory_text(self.memory)} is too small: training {self.bundle.name} on {batch} at a time "
                    f"of crops of {by(crop)} voxels, {holds}, takes {memory_text(needed)}; give that much"
                )
            crop = smaller
        if crop != wanted:
            needed_for_all = memory_text(model.training(wanted, batch))
            reason = f"memory holds no more; {by(wanted)} would be better, which takes {needed_for_all}"
            self.choose("crop_size", lambda: (crop, reason))
            self._set_crop(crop)

    def _batch(self, model: MemoryModel) -> int:
        wanted, reason = data_rules.batch_size(self.bundle.get("batch_size"), float(self.counts.visible.mean()))
        fitting = wanted
        while fitting > 1 and model.training(self.crop, fitting) > self.memory:
            fitting -= 1
        if fitting < wanted:
            reason = f"memory holds no more crops; {wanted} would be better"
        return int(self.choose("batch_size", lambda: (fitting, reason)))

    def _blocks(self, model: MemoryModel) -> Triple:
        """Halo and block size; returns what a block reads."""
        halo = self.choose("halo", inference_rules.halo, self.large)
        queries = self.choices.values.get("num_queries")

        def fits(read: Triple) -> bool:
            is_crowded = queries is not None and self.density * prod(read) > HALVED_AT * queries
            return model.prediction(read) <= self.memory and not is_crowded

        limit = "memory is full" if queries is None else "memory or queries are full"
        rule = inference_rules.block_size
        large = self.bundle.get("block_size") if self._is_local() else None
        block = self.choose("block_size", rule, self.crop, halo, self.coarsest, fits, limit, large)
        return inference_rules.read_size(block, halo)

    def _is_local(self) -> bool:
        """Whether none of the network's norms looks at a whole image."""
        keys = ("backbone#norm", "network_def#norm")
        return all(self.bundle.takes(key) and self.bundle.get(key) != "group" for key in keys)
