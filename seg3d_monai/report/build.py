"""The page of a training or a prediction, for people who do not know the code.

It must not know where volumes come from.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from seg3d_monai.report import charts
from seg3d_monai.report.looked_at import KINDS, Fault, LookedAt, faults, gravity, known_truth, scored_matches
from seg3d_monai.report.page import Page, picture
from seg3d_monai.report.slices import slices_figure
from seg3d_monai.report.sources import Source

MOST_PICTURES, MOST_TILES, MOST_ROWS = 4, 8, 40
TILE_MARGIN_UM = 8.0
EXPLAINED = {
    "missed": "true objects that nothing was predicted for",
    "false positive": "predicted objects where there is none; those of the highest score",
    "split": "one true object, several predicted ones",
    "merged": "several true objects, one predicted one",
    "mixed": "several of both",
    "poor outline": "found, but truth and prediction share less than half of their voxels",
}


def write_report(source: Source, file: Path) -> Path:
    """Write the page; an old one is replaced when the new one is whole.

    Args:
        source: what it is about.
        file: where it goes; its folder must exist.
    """
    partial = file.with_name(f".partial-{os.getpid()}-{file.name}")
    try:
        partial.write_text(build(source), encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def build(source: Source) -> str:
    """The text of the page; see `Source`."""
    page = Page(source.title, source.lead)
    found = [fault for looked in source.volumes for fault in faults(looked)]
    _summary(page, source)
    _pictures(page, source.volumes, found)
    if source.train is not None and len(source.train):
        _training(page, source)
    if source.metrics is not None:
        _quality(page, source)
    _objects(page, source.volumes)
    if source.metrics is not None:
        _faults(page, source.volumes, found)
    if source.seams is not None:
        _seams(page, source.seams)
    page.section("Time and memory")
    page.numbers(source.facts)
    page.section("How it was made", "Everything that is needed to make it again.")
    for name, text in source.texts.items():
        page.hidden(name, text)
    return page.text()


def _summary(page: Page, source: Source) -> None:
    page.section("Summary")
    if source.metrics is not None:
        half = source.metrics["thresholds"]["0.5"]
        page.numbers(
            {
                "true objects": source.metrics["num_truth"],
                "predicted": source.metrics["num_predicted"],
                "F1 at IoU 0.5": half["f1"],
                "precision": half["precision"],
                "recall": half["recall"],
                "SEG": source.metrics["seg"],
                "MUCov": source.metrics["mucov"],
            }
        )
        page.note(
            "An object counts as found when its outline and a predicted one share at least half of the voxels that "
            "either has (IoU 0.5). Precision: share of the predicted objects that are true. Recall: share of the true "
            "objects that are found. F1: both in one number. SEG: mean IoU of true objects with what covers most of "
            "them, 0 for those not found. MUCov: mean IoU of predicted objects with the best true one."
        )
    else:
        page.numbers({"objects shown": sum(len(looked.table) for looked in source.volumes)})
        page.note("Without annotated truth nothing can be said about what was missed.")
    for text in source.notes:
        page.note(text)


def _pictures(page: Page, volumes: Sequence[LookedAt], found: Iterable[Fault]) -> None:
    counts = Counter(fault.volume for fault in found)
    chosen = sorted(volumes, key=lambda looked: -counts[looked.name])[:MOST_PICTURES]
    many = f", those {len(chosen)} of {len(volumes)} with most faults" if len(volumes) > len(chosen) else ""
    page.section("Pictures", f"Slices through the middle, and the brightest voxel along each axis{many}.")
    for looked in chosen:
        pair = []
        for projects, caption in ((False, "slices through the middle"), (True, "brightest voxels")):
            figure = slices_figure(
                looked.image, _truth(looked), looked.labels, looked.spacing_um, looked.name, projects=projects
            )
            pair.append((picture(figure, 75, f"{looked.name}, {caption}"), f"{looked.name}: {caption}"))
        page.row(pair)


def _training(page: Page, source: Source) -> None:
    assert source.train is not None
    page.section("Training", "Losses fall as the network learns; metrics are of volumes that it does not learn from.")
    rows = [(charts.losses(source.train), "losses, means over a hundredth of the training")]
    if source.validation is not None and len(source.validation):
        minutes = source.validation["elapsed_seconds"] / 60
        shown = {"F1 at 0.5": "f1_50", "F1 at 0.7": "f1_70", "SEG": "seg"}
        curves = {name: (minutes, source.validation[key]) for name, key in shown.items() if key in source.validation}
        if curves:
            rows.append((charts.lines(curves, x="minutes", y="validation", marks=True), "validations"))
    page.row(rows)


def _quality(page: Page, source: Source) -> None:
    assert source.metrics is not None
    page.section("Quality", "How results change with what is asked of an outline, and with the least score.")
    thresholds = source.metrics["thresholds"]
    iou = [float(name) for name in thresholds]
    curve = {"F1": (iou, [row["f1"] for row in thresholds.values()])}
    scores, hits, num_truth = scored_matches(source.volumes)
    true = np.cumsum(hits)
    number = np.arange(1, len(hits) + 1)
    precision_recall = {"": (true / max(num_truth, 1), true / np.maximum(number, 1))}
    page.row(
        [
            (charts.lines(curve, x="IoU asked for", y="F1", marks=True), "F1 against the IoU from which objects match"),
            (
                charts.lines(precision_recall, x="recall", y="precision"),
                "precision against recall as the least score falls to the one that was used",
            ),
            (
                charts.histogram({"true": scores[hits], "false": scores[~hits]}, x="score"),
                "scores of predicted objects",
            ),
        ]
    )
    names = ("tp", "fp", "fn", "precision", "recall", "f1", "pq")
    page.table(["IoU", *names], [[name, *(row[key] for key in names)] for name, row in thresholds.items()])


def _objects(page: Page, volumes: Sequence[LookedAt]) -> None:
    page.section("Objects", "How large objects are, and how sure the network is of them.")
    is_known = all(looked.spacing_um is not None for looked in volumes)
    sizes: dict[str, list[float]] = {"predicted": [], "true": []}
    for looked in volumes:
        unit = float(np.prod(looked.spacing_um)) if is_known and looked.spacing_um is not None else 1.0
        for name, labels in (("predicted", looked.labels), ("true", _truth(looked))):
            if labels is not None:
                voxels = np.bincount(labels.ravel())[1:]
                sizes[name] += (voxels[voxels > 0] * unit).tolist()
    scores = np.concatenate([np.zeros(0), *(looked.table["score"].to_numpy(float) for looked in volumes)])
    unit_name = "volume, µm³" if is_known else "volume, voxels"
    page.row(
        [
            (
                charts.histogram({k: np.array(v) for k, v in sizes.items()}, x=unit_name, is_log=True),
                "sizes of objects",
            ),
            (charts.histogram({"predicted": scores}, x="score"), "scores of objects"),
        ]
    )


def _faults(page: Page, volumes: Sequence[LookedAt], found: Sequence[Fault]) -> None:
    counts = Counter(fault.kind for fault in found)
    page.section("Faults", "Where truth (thick) and prediction (thin) disagree; coordinates are voxels (z, y, x).")
    page.table(["kind", "places", "what it is"], [[kind, counts[kind], EXPLAINED[kind]] for kind in KINDS])
    by_name = {looked.name: looked for looked in volumes}
    for kind in KINDS:
        worst = sorted((fault for fault in found if fault.kind == kind), key=gravity, reverse=True)
        tiles = [(_tile(by_name[fault.volume], fault), _caption(fault)) for fault in worst[:MOST_TILES]]
        if tiles:
            page.tiles(f"{kind}: {EXPLAINED[kind]}", tiles)
    if found:
        rows = [
            [
                fault.kind,
                fault.volume,
                ", ".join(f"{place:.0f}" for place in fault.centroid),
                fault.voxels,
                fault.iou,
                fault.score,
            ]
            for fault in found[:MOST_ROWS]
        ]
        page.table(["kind", "volume", "z, y, x", "voxels", "IoU", "score"], rows)
        if len(found) > MOST_ROWS:
            page.note(f"{len(found) - MOST_ROWS} more are not listed.")


def _seams(page: Page, seams: tuple[int, int]) -> None:
    page.section("Seams", "The same volumes predicted in blocks and in one block; a stack is predicted in blocks.")
    page.numbers({"cells": seams[0], "that differ": seams[1], "share": seams[1] / seams[0] if seams[0] else 0.0})


def _tile(looked: LookedAt, fault: Fault) -> str:
    """Three slices through a fault, with some micrometres around it."""
    spacing = np.array(looked.spacing_um or (1.0, 1.0, 1.0))
    margin = np.ceil(TILE_MARGIN_UM / spacing).astype(int)
    low = np.maximum(np.array(fault.box[:3]) - margin, 0)
    high = np.minimum(np.array(fault.box[3:]) + margin, looked.image.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    place = np.array(fault.centroid) - looked.origin - low
    position = np.clip(np.rint(place).astype(int), 0, high - low - 1).tolist()
    assert looked.truth is not None
    truth = known_truth(looked.truth[box])
    figure = slices_figure(looked.image[box], truth, looked.labels[box], looked.spacing_um, position=position)
    return picture(figure, 45, f"{fault.kind} in {looked.name}")


def _caption(fault: Fault) -> str:
    score = "" if fault.score is None else f", score {fault.score:.2f}"
    place = ", ".join(f"{p:.0f}" for p in fault.centroid)
    return f"{fault.volume} at ({place}), {fault.voxels:,} voxels, IoU {fault.iou:.2f}{score}"


def _truth(looked: LookedAt) -> np.ndarray | None:
    return None if looked.truth is None else known_truth(looked.truth)
