"""Suggest regions to annotate: draw candidates, look at each with the model, choose, export.

Memory does not grow with the volumes, and time with the number of candidates alone. Everything follows from the seed.
The folder gets its name when it is complete.

Must not import models: predictor and backbone are handed in.
"""

import csv
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from seg3d_monai.annotation.candidates import Candidate, Pool, draw_annotated, draw_candidates
from seg3d_monai.annotation.choose import choose
from seg3d_monai.annotation.export import labels_to_correct, napari_command, write_region
from seg3d_monai.annotation.look import Look, Windows, look_at, without_blanks
from seg3d_monai.annotation.task import AnnotationTask, Region, labels_digest, write_task
from seg3d_monai.data import CropIndex
from seg3d_monai.inference.blocks import intersection

Strategy = Literal["model", "random"]

TABLE = "suggestions.csv"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suggestions:
    """What was suggested.

    Attributes:
        folder: where it is.
        num_regions: regions to annotate.
        num_candidates: regions that they were chosen from.
        open_first: the command that opens the first region.
    """

    folder: Path
    num_regions: int
    num_candidates: int
    open_first: str

    def __str__(self) -> str:
        return (
            f"{self.num_regions} regions in {self.folder}, chosen from {self.num_candidates}; {TABLE} says why\n"
            f"open the first: {self.open_first}\n"
            "correct the layer labels and save it over its file; what the layer margin covers does not count\n"
            f"take them back: seg3d annotate import {self.folder} MANIFEST"
        )


@dataclass(frozen=True)
class _Pick:
    """A chosen region, and why; None where it was drawn at random."""

    candidate: Candidate
    doubt: float | None
    uncertainty: float | None
    unlikeness: float | None


def suggest_regions(
    db: str | Path,
    output: str | Path,
    *,
    predictor: Any,
    backbone: nn.Module,
    num: int = 10,
    candidates: int = 100,
    pool: Pool = "unannotated",
    strategy: Strategy = "model",
    where: str | None = None,
    split: str = "train",
    crop_size: Sequence[int] | None = None,
    margin: Sequence[int] = (8, 24, 24),
    accept_score: float = 0.5,
    unlike_weight: float = 0.5,
    seed: int = 0,
    training: dict[str, Any] | None = None,
    progress: bool = True,
) -> Suggestions:
    """Choose regions that are worth annotating and export them with a prediction to correct.

    Args:
        db: the crop index.
        output: folder to write; must not hold anything.
        predictor: callable (block: float32 Tensor [C, d, h, w] of raw voxels, roi) -> Instances, with `for_volume` if
            it has one. It should return doubtful instances too, with scores well below `accept_score`, but not the
            crowd of low scores that detectors find in noise.
        backbone: of the predictor's network.
        num: how many regions.
        candidates: how many to choose from, at most; half as many annotated ones are looked at for comparison.
        pool: "unannotated" or "all", see `draw_candidates`.
        strategy: "model", or "random", a draw without looking, to compare with.
        where: filter over the columns of the index.
        split: of the volumes; those without one may be suggested too.
        crop_size: extent of a region, (z, y, x) voxels; the index's crops by default.
        margin: voxels (z, y, x) that are shown around a region and do not count.
        accept_score: least score of an instance that the exported labels hold.
        unlike_weight: of unlikeness against uncertainty, 0 to 1, see `choose`.
        seed: of every draw.
        training: facts to keep for the command that goes on training.
        progress: show progress bars.

    Returns:
        What was suggested. The folder holds 001, 002, … in the order of the choice, suggestions.csv and task.json.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: for arguments out of range, a folder that holds something, or when no crop matches.
    """
    output, index = Path(output), CropIndex(db)
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy={strategy!r} is unknown; use one of {', '.join(get_args(Strategy))}")
    if not 0.0 <= accept_score <= 1.0:
        raise ValueError(f"accept_score={accept_score} (--score_threshold) is not a score; use a number from 0 to 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r} cannot be used; give an integer >= 0")
    if len(margin) != 3 or min(margin) < 0:
        raise ValueError(f"margin={list(margin)} is not three voxel counts from 0; give [z,y,x]")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something already; give a new folder")
    drawn = draw_candidates(
        index, number=candidates, pool=pool, where=where, split=split, crop_size=crop_size, seed=seed
    )
    windows = Windows(index, predictor, margin)
    if strategy == "model":
        annotated = draw_annotated(index, number=candidates // 2, split=split, crop_size=crop_size, seed=seed)
        looks, centres = look_at(windows, drawn, annotated, backbone, progress=progress)
    else:
        order = np.random.default_rng([seed, 2]).permutation(len(drawn))
        looks = [
            Look(one, float(rank), np.zeros(1, np.float32))
            for one, rank in zip(without_blanks(windows, drawn), order, strict=False)
        ]
        centres, unlike_weight = np.zeros((0, 1), np.float32), 0.0
    if not looks:
        raise ValueError(f"all {len(drawn)} candidates are of a single grey value; draw more (--candidates)")
    choices = choose(
        doubts=[look.doubt for look in looks],
        features=np.stack([look.features for look in looks]),
        centres=centres,
        specimens=[look.candidate.volume.specimen for look in looks],
        number=num,
        conflict=lambda a, b: _meet(windows, looks[a].candidate, looks[b].candidate),
        unlike_weight=unlike_weight,
    )
    if len(choices) < num:
        _log.warning("%d regions in place of %d: the others overlap with these", len(choices), num)
    picks = []
    for choice in choices:
        look = looks[choice.candidate]
        why = (look.doubt, choice.uncertainty, choice.unlikeness) if strategy == "model" else (None, None, None)
        picks.append(_Pick(look.candidate, *why))
    open_first = _export(index, output, windows, picks, accept_score, split, training or {})
    return Suggestions(output, len(picks), len(looks), open_first)


def _meet(windows: Windows, a: Candidate, b: Candidate) -> bool:
    """Whether two regions or their margins overlap: a cell in between would get two ids."""
    return a.volume.id == b.volume.id and intersection(windows.roi(a), windows.roi(b)) is not None


def _export(
    index: CropIndex,
    output: Path,
    windows: Windows,
    picks: Sequence[_Pick],
    accept_score: float,
    split: str,
    training: dict[str, Any],
) -> str:
    """Write all regions, the table and the task; the command that opens the first region."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    regions, rows = [], []
    for number, pick in enumerate(picks, start=1):
        region, objects, names = _export_region(index, partial, number, windows, pick.candidate, accept_score)
        regions.append(region)
        volume = pick.candidate.volume
        command = napari_command(output / region.folder, names, volume.spacing_um)
        why = ("" if value is None else f"{value:.3f}" for value in (pick.doubt, pick.uncertainty, pick.unlikeness))
        rows.append([region.folder, volume.name, volume.specimen, *region.roi, *why, objects, command])
    corners = ("z1", "y1", "x1", "z2", "y2", "x2")
    header = ["folder", "volume", "specimen", *corners, "doubt", "uncertainty", "unlikeness", "objects", "napari"]
    with (partial / TABLE).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    volumes = index.volumes(labelled=None)
    task = AnnotationTask(
        index=str(index.path),
        config=index.config.to_json(),
        split=split,
        splits={volume.name: volume.split for volume in volumes},
        specimens={volume.name: volume.specimen for volume in volumes},
        num_classes=index.num_classes,
        regions=tuple(regions),
        training=training,
    )
    write_task(partial, task)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return str(rows[0][-1])


def _export_region(
    index: CropIndex, folder: Path, number: int, windows: Windows, candidate: Candidate, accept_score: float
) -> tuple[Region, int, list[str]]:
    """Write one region; what is remembered of it, how many objects its labels hold, and its files."""
    volume, window = candidate.volume, windows.roi(candidate)
    voxels = windows.voxels(candidate)
    known, ignore = None, 0
    if volume.label is not None:
        label = index.open_label(volume)
        known, ignore = label.read(window)[0], int(np.iinfo(label.dtype).max)
        mask = index.open_ignore(volume)
        if mask is not None:
            known[mask.read(window)[0] != 0] = ignore
    found = windows.predict(candidate, voxels)
    labels, known_ids, classes = labels_to_correct(found, window, known, ignore, accept_score)
    if index.num_classes > 1:
        table = index.instances(volume.id, labels=known_ids)
        by_label = dict(zip(table.labels.tolist(), table.classes.tolist(), strict=True))
        classes |= {place: by_label[label] for place, label in enumerate(known_ids, start=1)}
    else:
        classes = {}
    region = Region(
        number=number,
        volume=volume.name,
        shape=volume.shape[1:],
        roi=candidate.roi,
        window=window,
        labels_sha256=labels_digest(labels),
        known_ids=known_ids,
        classes=classes,
    )
    names = write_region(
        folder / region.folder,
        image=voxels,
        labels=labels,
        roi=candidate.roi,
        window=window,
        spacing_um=volume.spacing_um,
        classes=classes,
    )
    return region, len(np.unique(labels[labels > 0])), names
