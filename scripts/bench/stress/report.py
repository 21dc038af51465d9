"""The report for people: where it was measured and how, what was trained, and a line for each prediction."""

from collections.abc import Sequence
from typing import Any

from bench import report
from bench.stress.bars import F1_BAR, Row


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    # The operators' report without any of its sections is the head that all have.
    parts = [report.text({**result, **{section: [] for section in report.SECTIONS}})]
    parts += ["", training_table(result["training"])]
    if result["volumes"]:
        parts += ["", volumes_table(result["volumes"])]
    return "\n".join([*parts, "", bars_lines(result["bars"])])


def training_table(rows: Sequence[Row]) -> str:
    """A line for each training."""
    lines = []
    for row in rows:
        name = f"{row['ratio']:g}:1"
        if "error" in row:
            lines.append([name, "failed", *[""] * 8])
            continue
        settings = row["settings"]
        lines.append(
            [name, f"{row['num_volumes']} volumes, {row['num_objects']} objects", f"{row['steps']:,}"]
            + [report.number(row["step_s"], ".2f")]
            + [str(settings["batch_size"]), *(_by(settings[key]) for key in ("crop_size", "block_size", "halo"))]
            + [str(settings.get("network_def#max_detections", settings.get("num_queries", "")))]
            + [_caps(row)]
        )
    head = ["z:xy", "trained on", "steps", "s / step", "batch", "crop", "block", "halo", "most objects", "  caps"]
    return report.table(lines, head)


def volumes_table(rows: Sequence[Row]) -> str:
    """A line for each prediction."""
    lines = [
        [f"{row['ratio']:g}:1", f"{row['volume']} {row['way']}", _by(row["shape"]), str(row["num_blocks"])]
        + [f"{row['labelled_share']:.0%}", f"{row['touching_share']:.0%}", f"{row['cut_share']:.0%}"]
        + [f"{row['median_planes']:g}", f"{row['num_objects']:,}", f"{row['num_predicted']:,}"]
        + [f"{row[score]:.3f}" for score in ("f1_50", "precision", "recall", "f1_70")]
        + [report.yes_or_no(row["f1_50"] >= F1_BAR), _caps(row)]
        for row in rows
    ]
    head = ["z:xy", "volume", "voxels", "blocks", "labelled", "touching", "cut", "planes", "objects", "found"]
    return report.table(lines, [*head, "F1@0.5", "precision", "recall", "F1@0.7", "met?", "  caps"])


def bars_lines(rows: Sequence[Row]) -> str:
    """How many of each bar are met."""
    lines = []
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        own = [row for row in rows if row["quantity"] == quantity]
        lines.append(f"{quantity} {own[0]['bar']}: {sum(row['met'] for row in own)} of {len(own)}")
    return "\n".join(lines)


def _by(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))


def _caps(row: Row) -> str:
    return "  " + (", ".join(row["caps"]) or "none")
