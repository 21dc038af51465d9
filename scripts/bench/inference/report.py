"""The report for people: where it was measured and how, a table per section, and at last the bars."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench import report
from bench.inference.bars import Row

TITLES = {
    "seams": "Dense tissue, seen differently by every block",
    "exact": "The perfect predictor on shapes that span five blocks along every axis",
    "whole": "Whole stack",
    "memory": "Peak memory",
    "workers": "Workers",
    "records": "Ten million instances",
    "kills": "Kills",
}
ERRORS = ("split", "merged", "lost", "wrong")


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    tables: dict[str, Callable[[Sequence[Row]], str]] = {
        "seams": seams_table,
        "exact": exact_table,
        "whole": whole_lines,
        "memory": memory_table,
        "workers": workers_table,
        "records": records_table,
        "kills": kills_table,
    }
    # The operators' report without any of its sections is the head that all have.
    parts = [report.text({**result, **{section: [] for section in report.SECTIONS}})]
    for section, heading in TITLES.items():
        if result[section]:
            parts += [_title(heading), tables[section](result[section])]
    return "\n".join([*parts, _title("Bars"), bars_table(result["bars"])])


def seams_table(rows: Sequence[Row]) -> str:
    """Errors at seams and away from them."""
    lines = []
    for row in rows:
        for place in ("seam", "away"):
            counts = row[place]
            share = 100 * counts["wrong"] / max(counts["cells"], 1)
            lines.append(
                [
                    f"{row['diameter']:g}, {row['sigma']:g}" if place == "seam" else "",
                    place,
                    *(f"{counts[key]:,}" for key in ("cells", *ERRORS)),
                    f"{share:.2f}",
                    f"{100 * row['excess']:+.2f} ± {100 * row['excess_error']:.2f}" if place == "seam" else "",
                    f"{row['objects']:,}" if place == "away" else "",
                    "",
                ]
            )
    return report.table(lines, ["diameter, sigma", "", "cells", *ERRORS, "wrong %", "excess %", "objects", ""])


def exact_table(rows: Sequence[Row]) -> str:
    """Errors on hard shapes."""
    lines = [
        [row["cells"], *(_extent(row[key]) for key in ("shape", "block_size", "halo"))]
        + [f"{row['num_cells']:,}", str(row["errors"]), ""]
        for row in rows
    ]
    return report.table(lines, ["cells", "stack", "blocks", "halo", "number", "errors", ""])


def whole_lines(rows: Sequence[Row]) -> str:
    """What the whole stack took, in words."""
    lines = []
    for row in rows:
        found = row["instances_of_blocks"]
        forward = row["forward_runs_s"]
        lines += [
            f"{row['model']}: {_extent(row['shape'])} ({row['voxels'] / 1e9:.2f} Gvoxel), blocks of "
            f"{_extent(row['block_size'])} with a halo of {_extent(row['halo'])}, autocast {row['autocast']}",
            f"    {row['num_blocks']} blocks, {min(found)} to {max(found)} instances a block, median "
            f"{statistics.median(found):g}; {row['num_objects']:,} objects",
            f"    whole {row['whole_s']:,.1f} s, of which in the predictor {row['predictor_s']:,.1f} s and after the "
            f"last block {row['after_last_block_s']:,.1f} s",
            f"    bare {row['bare_s']:,.1f} s: forward {row['bare_forward_s']:,.1f} s "
            f"({min(forward):,.2f} to {max(forward):,.2f} s a block), read {row['bare_read_s']:,.1f} s",
            f"    whole / bare {row['times_bare']:.3f}; a plain loop {row['plain_s']:,.1f} s, whole / plain "
            f"{row['times_plain']:.3f}",
        ]
    return "\n".join(lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Peaks of both stacks."""
    lines = [
        [
            row[name],
            "",
            f"{row[f'{name}_num_blocks']:,}",
            f"{row[f'{name}_num_objects']:,}",
            f"{row[f'{name}_seconds']:,.1f}",
            report.number(row[f"{name}_after_import_gb"], ".3f"),
            report.number(row[f"{name}_peak_gb"], ".3f"),
            "",
        ]
        for row in rows
        for name in ("small", "large")
    ]
    return report.table(lines, ["stack", "", "blocks", "objects", "seconds", "after import GB", "peak GB", ""])


def workers_table(rows: Sequence[Row]) -> str:
    """Seconds of each turn."""
    lines = [
        [_extent(row["shape"]), f"{row['num_blocks']} blocks", f"{row['num_objects']:,}"]
        + [" ".join(f"{seconds:,.1f}" for seconds in row[key]) for key in ("one_s", "two_s")]
        + [f"{row['speed_up']:.2f}x", f"{row['machine']:.2f}x", ""]
        for row in rows
    ]
    head = ["stack", "", "objects", "1 worker s", "2 workers s", "faster", "machine", ""]
    return report.table(lines, head)


def records_table(rows: Sequence[Row]) -> str:
    """Seconds and memory of stitching the records."""
    lines = [
        [f"{row[key]:,}" for key in ("num_blocks", "num_instances", "num_links", "num_objects")]
        + [f"{row['read_seconds']:,.1f}", f"{row['seconds']:,.1f}", report.number(row["peak_gb"], ".2f"), ""]
        for row in rows
    ]
    return report.table(lines, ["blocks", "instances", "links", "objects", "reading s", "all s", "peak GB", ""])


def kills_table(rows: Sequence[Row]) -> str:
    """What became of the killed runs."""
    lines = [
        [
            str(row["num_workers"]),
            ", ".join(f"{count} {phase}" for phase, count in row["phases"].items()),
            str(row["num_blocks"]),
            f"{row['undisturbed_s']:.1f}",
            *(str(row[key]) for key in ("num_kills", "num_in_flight", "num_different", "num_repeated")),
            "",
        ]
        for row in rows
    ]
    head = ["workers", "killed", "blocks", "undisturbed s", "kills", "in flight", "different", "repeated", ""]
    return report.table(lines, head)


def bars_table(rows: Sequence[Row]) -> str:
    """What was measured against its bar."""
    lines = [
        [row["work"], row["quantity"], report.number(row["value"], ".2f"), row["bar"], report.yes_or_no(row["met"])]
        for row in rows
    ]
    return report.table(lines, ["work", "quantity", "measured", "bar", "met?"])


def _title(words: str) -> str:
    return f"\n{words}\n{'=' * len(words)}"


def _extent(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
