"""Sizes that are doubled one at a time, to show how each operator's cost grows; and the tenfold steps of nms3d."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import ms_deform, nms, roi_align
from bench.problem import Problem


@dataclass(frozen=True)
class Steps:
    """One size that grows: `changes` are the sizes of each step, by what is written in the table."""

    op: str
    symbol: str
    make: Callable[..., Problem]
    base: dict[str, Any]
    changes: dict[str, dict[str, Any]]
    work: str
    limit: float | None = None


def one_size(key: str, *values: Any) -> dict[str, dict[str, Any]]:
    """Steps that change a single argument."""
    return {str(value): {key: value} for value in values}


POOL: dict[str, Any] = {"features": (2, 64, 32, 32, 32), "num_boxes": 256, "sides": (4, 20), "out": 7, "ratio": 2}
QUICK_POOL: dict[str, Any] = {"features": (1, 4, 8, 8, 8), "num_boxes": 8, "sides": (2, 6), "out": 2, "ratio": 2}
ATTEND: dict[str, Any] = {"levels": [(16, 16, 16)], "queries": 4096}
QUICK_ATTEND: dict[str, Any] = {"levels": [(4, 4, 4)], "queries": 8, "heads": 2, "channels": 4}
CUBES = [(32, 32, 32), (16, 16, 16), (8, 8, 8), (4, 4, 4)]


def doublings(is_quick: bool) -> list[Steps]:
    """Every size of every operator, doubled; `work` is what that does to the number of samples or boxes."""
    pool, attend = (QUICK_POOL, QUICK_ATTEND) if is_quick else (POOL, ATTEND)
    batch, width, *size = pool["features"]
    channels = {str(n): {"features": (batch, n, *size)} for n in (width, 2 * width, 4 * width)}
    volumes = {f"{n}³": {"features": (1, width, n, n, n)} for n in ((8, 16) if is_quick else (32, 64, 128))}
    sides = {f"{n}": {"features": (batch, width, 64, 64, 64), "sides": (n, n)} for n in (8, 16, 32)}
    levels = {str(n): {"levels": CUBES[-n:] if is_quick else CUBES[:n]} for n in (1, 2, 4)}
    values = {f"{n}³": {"levels": [(n, n, n)]} for n in ((4, 8) if is_quick else (8, 16, 32, 64))}
    counts = (100, 200) if is_quick else (10_000, 20_000, 40_000, 80_000, 160_000)
    no_baseline = {"has_baseline": False}

    def pooling(symbol: str, changes: dict[str, dict[str, Any]], work: str) -> Steps:
        return Steps("roi_align3d", symbol, roi_align.make, pool, changes, work)

    def attention(symbol: str, changes: dict[str, dict[str, Any]], work: str) -> Steps:
        return Steps("ms_deform_attn3d", symbol, ms_deform.make, attend, changes, work)

    num_boxes, num_queries = pool["num_boxes"], attend["queries"]
    return [
        pooling("K boxes", one_size("num_boxes", num_boxes, 2 * num_boxes, 4 * num_boxes), "x2"),
        pooling("C channels", channels, "x2"),
        pooling("out bins an axis", one_size("out", *((2, 4) if is_quick else (4, 8, 16))), "x8"),
        pooling("ratio samples an axis", one_size("ratio", 1, 2, 4), "x8"),
        pooling("voxels of features", volumes, "x1"),
        pooling("side of a box", sides, "x1"),
        Steps("nms3d", "n scattered", nms.make, no_baseline, one_size("num_boxes", *counts), "x2"),
        Steps(
            "nms3d",
            "n in 50 clusters",
            nms.make,
            {**no_baseline, "num_clusters": 50},
            one_size("num_boxes", *counts[:4]),
            "x2",
        ),
        attention("Lq queries", one_size("queries", num_queries, 2 * num_queries, 4 * num_queries), "x2"),
        attention("P points", one_size("points", 2, 4, 8), "x2"),
        attention("M heads", one_size("heads", 4, 8, 16), "x2"),
        attention("Dh channels", one_size("channels", 16, 32, 64), "x2"),
        attention("L levels", levels, "x2"),
        attention("voxels of value", values, "x1"),
    ]


def tenfold(is_quick: bool) -> list[Steps]:
    """nms3d on ten times as many boxes."""
    counts = (100, 1_000) if is_quick else (10_000, 100_000, 1_000_000)
    changes = {f"{count:,}": {"num_boxes": count} for count in counts}
    return [Steps("nms3d", "n scattered", nms.make, {"has_baseline": False}, changes, "x10", limit=13.0)]
