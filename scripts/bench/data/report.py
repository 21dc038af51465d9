"""The report for people: where it was measured and how, a table per section, and at last the bars."""

from collections.abc import Callable, Sequence
from typing import Any

from bench import report
from bench.data.bars import Row

TITLES = {
    "build": "Building an index",
    "crops": "An index of many crops",
    "reads": "Crops read from disk",
    "samples": "Training samples",
    "loader_memory": "Memory of a loader's worker",
    "convert": "Converting a stack to OME-Zarr",
    "plan": "A plan made from data",
    "annotate": "Annotating what is suggested",
}


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    tables: dict[str, Callable[[Sequence[Row]], str]] = {
        "build": build_table,
        "crops": crops_table,
        "reads": reads_table,
        "samples": samples_table,
        "loader_memory": loader_memory_table,
        "convert": convert_table,
        "plan": plan_table,
        "annotate": annotate_table,
    }
    # The operators' report without any of its sections is the head that all have.
    parts = [report.text({**result, **{section: [] for section in report.SECTIONS}})]
    for section, heading in TITLES.items():
        if result[section]:
            parts += [_title(heading), tables[section](result[section])]
    return "\n".join([*parts, _title("Bars"), bars_table(result["bars"])])


def build_table(rows: Sequence[Row]) -> str:
    """Seconds of each turn, and voxels a second."""
    lines = [
        [f"{row['num_volumes']} volumes", f"{row['voxels'] / 1e9:.2f} Gvoxel"]
        + [f"{row['num_instances']:,}", f"{row['num_crops']:,}"]
        + [" ".join(f"{seconds:,.1f}" for seconds in row[key]) for key in ("read_s", "one_s", "two_s")]
        + [f"{row['build_over_read']:.2f}x", f"{row['speed_up']:.2f}x", ""]
        for row in rows
    ]
    head = [
        "labels",
        "",
        "instances",
        "crops",
        "only read s",
        "1 process s",
        "2 processes s",
        "build / read",
        "2 / 1",
        "",
    ]
    return report.table(lines, head)


def crops_table(rows: Sequence[Row]) -> str:
    """What an index of many crops takes."""
    lines = [
        [f"{row['num_crops']:,}", f"{row['num_volumes']:,}", f"{row['num_visible']:,}", f"{row['file_mb']:,.0f}"]
        + [f"{row['open_ms']:.1f}", f"{row['record_ms']:.3f}", f"{row['slow_record_ms']:.3f}", f"{row['count_s']:.2f}"]
        + [
            f"{row['sampler_s']:.2f}",
            report.number(row["sampler_peak_mb"], ".0f"),
            f"{row['sampler_pickle_mb']:.1f}",
            "",
        ]
        for row in rows
    ]
    head = ["crops", "volumes", "instances in crops", "file MB", "open ms", "record ms", "99 % ms", "count s"]
    return report.table(lines, [*head, "sampler s", "peak MB", "sent MB", ""])


def reads_table(rows: Sequence[Row]) -> str:
    """Milliseconds a crop."""
    lines = [
        [row["format"], f"{row['gigabytes']:.2f} GB"]
        + [f"{row[f'{name}_ms']:,.1f}" for name in ("ours", "uncached", "bare", "whole")]
        + [f"{row['bare_over_ours']:.2f}x", f"{row['whole_over_ours']:.0f}x", ""]
        for row in rows
    ]
    return report.table(
        lines, ["format", "", "ours ms", "uncached ms", "bare ms", "whole ms", "ours / bare", "ours / whole", ""]
    )


def samples_table(rows: Sequence[Row]) -> str:
    """Samples a second."""
    lines = [
        [
            row["augmentation"],
            "x".join(map(str, row["crop"])),
            f"{row['ours_instances']:.0f}",
            f"{row['ours_per_s']:.2f}",
        ]
        + [f"{row['dense_per_s']:.2f}", f"{row['ratio']:.1f}x", ""]
        for row in rows
    ]
    return report.table(lines, ["augmentation", "crop", "instances", "ours / s", "dense / s", "faster", ""])


def loader_memory_table(rows: Sequence[Row]) -> str:
    """Peaks of workers."""
    lines = [
        [
            f"{row['gigabytes']:.1f} GB",
            row["start"],
            f"{row['num_crops']}",
            *(report.number(row[key], ",.0f") for key in ("peak_mb", "resident_mb")),
            "",
        ]
        for row in rows
    ]
    return report.table(lines, ["volume", "started by", "crops", "peak MB", "resident MB", ""])


def convert_table(rows: Sequence[Row]) -> str:
    """Seconds of each turn, and megabytes a second of one thread."""
    lines = [
        [row["format"], f"{row['gigabytes']:.2f} GB"]
        + [" ".join(f"{seconds:,.1f}" for seconds in row[key]) for key in ("one_s", "two_s")]
        + [f"{1e3 * row['gigabytes'] * len(row['one_s']) / sum(row['one_s']):,.0f}", f"{row['speed_up']:.2f}x", ""]
        for row in rows
    ]
    return report.table(lines, ["from", "", "1 thread s", "2 threads s", "MB / s of one", "2 / 1", ""])


def plan_table(rows: Sequence[Row]) -> str:
    """Seconds of a plan, and what came of trainings."""
    lines = []
    for row in rows:
        about = [row["data"], f"{row['num_volumes']:,}", f"{row['num_objects']:,}", f"{row['plan_s']:.1f}"]
        runs = [(name, row[name]) for name in ("planned", "hand") if name in row] or [("", None)]
        for place, (name, run) in enumerate(runs):
            cells = ["", ""] if run is None else [f"{row['minutes']:g}", f"{run['steps']}"]
            cells += [report.number(run and run[key], ".3f") for key in ("f1", "precision", "recall", "seg", "map")]
            lines.append([*(about if place == 0 else [""] * len(about)), name, *cells, ""])
    head = ["data", "volumes", "objects", "plan s", "training", "minutes", "steps", "F1@0.5", "precision", "recall"]
    return report.table(lines, [*head, "SEG", "mAP", ""])


def annotate_table(rows: Sequence[Row]) -> str:
    """What each way to go on gives on the specimens held back."""
    lines = [
        [row["arm"], "" if row["seed"] is None else f"seed {row['seed']}", f"{row['num_labelled']}"]
        + [f"{row['minutes']:g}", *(report.number(row.get(name), ",.0f") for name in ("num_regions", "num_objects"))]
        + [f"{row[name]:.3f}" for name in ("f1_50", "f1_70", "seg", "map")]
        + [f"{row['tp']} / {row['fp']} / {row['fn']}", report.number(row.get("suggest_s"), ".0f"), ""]
        for row in rows
    ]
    head = ["way", "", "volumes", "minutes", "regions", "objects", "F1@0.5", "F1@0.7", "SEG", "mAP", "TP / FP / FN"]
    return report.table(lines, [*head, "suggest s", ""])


def bars_table(rows: Sequence[Row]) -> str:
    """What was measured against its bar."""
    lines = [
        [row["work"], row["quantity"], report.number(row["value"], ".3g"), row["bar"], report.yes_or_no(row["met"])]
        for row in rows
    ]
    return report.table(lines, ["work", "quantity", "measured", "bar", "met?"])


def _title(words: str) -> str:
    return f"\n{words}\n{'=' * len(words)}"
