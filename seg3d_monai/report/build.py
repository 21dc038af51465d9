"""The page of a training or a prediction, for people who do not know the code.

It must not know where volumes come from.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.report import charts
from seg3d_monai.report.fault_tiles import add_faults
from seg3d_monai.report.looked_at import Fault, LookedAt, faults, known_truth, scored_matches
from seg3d_monai.report.page import Page, picture
from seg3d_monai.report.slices import PREDICTION_COLOUR, TRUTH_COLOUR, slices_figure
from seg3d_monai.report.sources import Source

MOST_PICTURES = 4
COLUMNS = {
    "tp": "found (TP)",
    "fp": "false (FP)",
    "fn": "missed (FN)",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "pq": "PQ",
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
    if source.volumes:
        _pictures(page, source.volumes, found)
    if source.train is not None and len(source.train):
        _training(page, source)
    if source.metrics is not None:
        _quality(page, source)
    if source.volumes:
        _objects(page, source.volumes)
    if source.metrics is not None:
        add_faults(page, source.volumes, found)
    if source.volumes:
        _seams(page, source)
    page.section("Time and memory")
    page.numbers(source.facts)
    page.section("How it was made", "What is needed to make it again; click at a name to see all of it.")
    if source.made:
        page.table(["what", "value"], list(source.made.items()))
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
    elif not source.volumes:
        known = None if source.validation is None or "explained" not in source.validation else source.validation
        explained = None if known is None or not len(known) else float(known["explained"].max())
        page.numbers({"share of the hidden that is known": explained})
        page.note(
            "Parts of volumes are hidden, and the network says what is behind them. The number is the share of the "
            "variance of hidden voxels, in volumes that it does not learn from, that it knows at its best; 1 for who "
            "knows all. Parts without contrast count as known, so that it is not 0 for who guesses nothing."
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
    page.key(
        ({"true outlines": TRUTH_COLOUR} if any(looked.truth is not None for looked in chosen) else {})
        | {"predicted outlines": PREDICTION_COLOUR}
    )
    for looked in chosen:
        pair = []
        for projects, caption in ((False, "slices through the middle"), (True, "brightest voxels")):
            figure = slices_figure(
                looked.image,
                _truth(looked),
                looked.labels,
                looked.spacing_um,
                looked.name,
                projects=projects,
                origin=looked.origin,
            )
            pair.append((picture(figure, 75, f"{looked.name}, {caption}"), f"{looked.name}: {caption}"))
        page.row(pair, "wide")


def _training(page: Page, source: Source) -> None:
    assert source.train is not None
    page.section("Training", "Losses fall as the network learns; metrics are of volumes that it does not learn from.")
    rows = [(charts.losses(source.train), "losses, means over a hundredth of the training")]
    if source.validation is not None and len(source.validation):
        minutes = source.validation["elapsed_seconds"] / 60
        shown = {"F1 at 0.5": "f1_50", "F1 at 0.7": "f1_70", "SEG": "seg", "known of the hidden": "explained"}
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
            (
                charts.lines(curve, x="IoU asked for", y="F1", marks=True, is_share=True),
                "F1 against the IoU from which objects match",
            ),
            (
                charts.lines(precision_recall, x="recall", y="precision", is_share=True),
                "precision against recall at IoU 0.5, as the least score falls to the one that was used",
            ),
            (
                charts.histogram({"right": scores[hits], "wrong": scores[~hits]}, x="score"),
                "scores of predicted objects, right or wrong at IoU 0.5",
            ),
        ]
    )
    page.table(["IoU", *COLUMNS.values()], [[name, *(row[key] for key in COLUMNS)] for name, row in thresholds.items()])
    page.note("PQ, panoptic quality: F1 times the mean IoU of the objects that are found.")


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


def _seams(page: Page, source: Source) -> None:
    page.section("Seams", "A stack is predicted in blocks; objects at the border of two must not differ from others.")
    if source.seams is not None:
        cells, differ = source.seams
        page.numbers({"cells": cells, "that differ": differ, "share": differ / cells if cells else 0.0})
        page.note("The same volumes, predicted in blocks and in one block.")
    if source.seam_check is not None:
        found = source.seam_check
        page.table(
            ["cells", "number", "that differ", "share", "95 % interval"],
            [_seam_row("next to a block's face", found["at_faces"]), _seam_row("elsewhere", found["away"])],
        )
        page.numbers({"excess at faces": found["excess"]})
        page.note(
            "A region is predicted under two grids of blocks, and the answers are compared. The excess is the share "
            f"that differs at faces less that elsewhere, 95 % interval {_interval(found.get('excess_interval'))}; "
            "blocks leave seams where that lies above 0."
        )
    if source.seams is None and source.seam_check is None:
        page.note(source.seam_note)


def _seam_row(name: str, tally: Mapping[str, Any]) -> list[Any]:
    return [
        name,
        tally["num_cells"],
        tally["num_disagreeing"],
        tally["rate"],
        _interval(tally.get("rate_interval")),
    ]


def _interval(ends: Sequence[float] | None) -> str:
    return "unknown" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _truth(looked: LookedAt) -> np.ndarray | None:
    return None if looked.truth is None else known_truth(looked.truth)
