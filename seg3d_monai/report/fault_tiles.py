"""The section of a report on faults: how many of each kind, the worst as pictures, and a list with coordinates.

It must not know files or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from seg3d_monai.report.looked_at import KINDS, Fault, LookedAt, gravity, known_truth
from seg3d_monai.report.page import Page, picture
from seg3d_monai.report.slices import PREDICTION_COLOUR, TRUTH_COLOUR, slices_figure

MOST_TILES, MOST_ROWS = 8, 40
TILE_MARGIN_UM = 8.0
TILE_INCH, TILE_DPI = 2.9, 110
EXPLAINED = {
    "missed": "true objects that nothing was predicted for",
    "false positive": "predicted objects where there is none; those of the highest score",
    "split": "one true object, several predicted ones",
    "merged": "several true objects, one predicted one",
    "mixed": "several of both",
    "poor outline": "found, but truth and prediction share less than half of their voxels",
}


def add_faults(page: Page, volumes: Sequence[LookedAt], found: Sequence[Fault]) -> None:
    """Add the section.

    Args:
        page: to which it is added.
        volumes: what is looked at; names must differ.
        found: faults of these volumes.
    """
    page.section("Faults", "Where truth and prediction disagree; coordinates are voxels (z, y, x) of the volume.")
    counts = Counter(fault.kind for fault in found)
    page.table(["kind", "places", "what it is"], [[kind, counts[kind], EXPLAINED[kind]] for kind in KINDS])
    if not found:
        return
    page.key({"true outlines": TRUTH_COLOUR, "predicted outlines": PREDICTION_COLOUR})
    by_name = {looked.name: looked for looked in volumes}
    for kind in KINDS:
        tiles = [(_tile(by_name[fault.volume], fault), _caption(fault)) for fault in _worst(found, kind)[:MOST_TILES]]
        if tiles:
            page.tiles(f"{kind}: {EXPLAINED[kind]}", tiles)
    listed = [fault for kind in KINDS for fault in _worst(found, kind)[: _rows_of_a_kind(counts)]]
    page.table(
        ["kind", "volume", "z, y, x", "voxels", "IoU", "score"],
        [[fault.kind, fault.volume, _place(fault), fault.voxels, fault.iou, fault.score] for fault in listed],
    )
    if len(found) > len(listed):
        page.note(f"{len(found) - len(listed)} more are not listed.")


def _worst(found: Sequence[Fault], kind: str) -> list[Fault]:
    return sorted((fault for fault in found if fault.kind == kind), key=gravity, reverse=True)


def _rows_of_a_kind(counts: Counter[str]) -> int:
    """As many of each kind as `MOST_ROWS` allows, so that none is crowded out by another."""
    rows = 1
    while rows < max(counts.values()) and sum(min(rows + 1, number) for number in counts.values()) <= MOST_ROWS:
        rows += 1
    return rows


def _tile(looked: LookedAt, fault: Fault) -> str:
    """Three slices through a fault, with some micrometres around it."""
    spacing = np.array(looked.spacing_um or (1.0, 1.0, 1.0))
    margin = np.ceil(TILE_MARGIN_UM / spacing).astype(int)
    low = np.maximum(np.array(fault.box[:3]) - margin, 0)
    high = np.minimum(np.array(fault.box[3:]) + margin, looked.image.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    place = np.array(fault.centroid) - looked.origin - low
    assert looked.truth is not None
    figure = slices_figure(
        looked.image[box],
        known_truth(looked.truth[box]),
        looked.labels[box],
        looked.spacing_um,
        position=np.clip(np.rint(place).astype(int), 0, high - low - 1).tolist(),
        origin=(low + looked.origin).tolist(),
        longest_inch=TILE_INCH,
        has_key=False,
    )
    return picture(figure, TILE_DPI, f"{fault.kind} in {looked.name} at ({_place(fault)})")


def _caption(fault: Fault) -> str:
    score = "" if fault.score is None else f", score {fault.score:.2f}"
    return f"{fault.volume} at ({_place(fault)}), {fault.voxels:,} voxels, IoU {fault.iou:.2f}{score}"


def _place(fault: Fault) -> str:
    return ", ".join(f"{place:.0f}" for place in fault.centroid)
