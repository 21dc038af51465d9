"""The report for people: where it was measured, what was compared with what, and one table per section."""

import itertools
import textwrap
from typing import Any

from bench import memory

Row = dict[str, Any]

SECTIONS = {
    "bars": "Sizes and bars",
    "anisotropic": "Elongated volumes against cubes, time per unit of work",
    "bfloat16": "bfloat16 against float32",
    "tenfold": "Ten times as many boxes",
    "doubling": "Each size doubled; factors are against the row above, work is that of the samples or boxes",
}
METHOD = (
    "Medians of wall time, contenders by turns, after one run that does not count; a slow baseline runs once. "
    "ratio = baseline / ours. "
    "floor = bytes that must move (every input read once, every result written once; backward also reads the output's "
    "gradient and the inputs it depends on) at the rate of clone() of a tensor as large as the output (of 17 MB if the "
    "output is smaller), its read and write counted. results = output and gradients. "
    "extra = peak memory beyond inputs and results: " + memory.METHOD + "."
)


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    tables = {
        "bars": lambda rows: f"{work_list(rows)}\n\n{bars_table(rows)}",
        "anisotropic": lambda rows: two_ways_table(rows, "cubic", "anisotropic", "anisotropic_over_cubic"),
        "bfloat16": lambda rows: two_ways_table(rows, "float32", "bfloat16", "bfloat16_over_float32"),
        "tenfold": growth_table,
        "doubling": growth_table,
    }
    paths = ", ".join(f"{op['op']} {op['path']} ({op['reason']})" for op in result["operators"])
    parts = [
        f"{result['command']}   {result['date']}" + ("   QUICK: tiny sizes" if result["is_quick"] else ""),
        ", ".join(f"{key} {value}" for key, value in result["hardware"].items())
        + f", {result['threads']} threads, device {result['device']}",
        ", ".join(f"{key} {value}" for key, value in result["versions"].items()),
        paths,
        *textwrap.wrap(result["method"], 120),
    ]
    report = "\n".join(parts)
    for section, title in SECTIONS.items():
        if result[section]:
            report += f"\n\n{title}\n{'=' * len(title)}\n{tables[section](result[section])}"
    return report


def table(rows: list[list[str]], head: list[str]) -> str:
    """Columns of equal width; the first two to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def text(line: list[str]) -> str:
        cells = [
            cell.ljust(width) if number < 2 or number == len(head) - 1 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(head), "  ".join("-" * width for width in widths), *map(text, rows)])


def yes_or_no(met: bool | None) -> str:
    """How a bar was met."""
    return "not measured" if met is None else "yes" if met else "NO"


def sameness(row: Row) -> str:
    """Whether what was timed computes the same; nothing where it was not compared."""
    if "agreement" not in row:
        return ""
    return "same result" if row["agreement"]["agrees"] else "DIFFERENT RESULT, the times mean nothing"


def number(value: float | None, pattern: str) -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else format(value, pattern)


def bars_table(rows: list[Row]) -> str:
    """Sizes and bars."""
    lines = []
    for row in rows:
        met = "; ".join(f"{bar['bar']}: {yes_or_no(bar['met'])}" for bar in row["bars"])
        lines.append(
            [
                f"{row['op']} {row['name']}",
                row["pass"],
                number(row["ours_ms"], ",.2f"),
                number(row.get("baseline_ms"), ",.1f"),
                number(row.get("ratio"), ",.1f") + ("x" if "ratio" in row else ""),
                number(row["floor_ms"], ",.3f"),
                number(row["times_floor"], ",.1f") + "x",
                number(row["copy_gb_per_s"], ",.1f"),
                number(row["results_mb"], ",.1f"),
                number(row.get("extra_mb"), ",.1f"),
                met,
            ]
        )
    head = ["operator", "pass", "ours ms", "baseline ms", "ratio", "floor ms", "ours/floor", "copy GB/s"]
    return table(lines, [*head, "results MB", "extra MB", "bar: met?"])


def work_list(rows: list[Row]) -> str:
    """What each row's work is, what it is compared with, and whether both compute the same."""
    lines = []
    for row in rows:
        if row["pass"] == "forward":
            lines.append(f"{row['op']} {row['name']}: {row['work']}")
        if "agreement" in row:
            lines.append(f"    {row['pass']} against {row['baseline']}: {sameness(row)} ({row['agreement']['words']})")
    return "\n".join(lines)


def two_ways_table(rows: list[Row], first: str, second: str, quotient: str) -> str:
    """Two variants of the same work, per unit of it."""
    lines = [
        [
            f"{row['op']} {row['name']}",
            row["pass"],
            f"{row[f'{first}_ms']:,.2f}",
            f"{row[f'{second}_ms']:,.2f}",
            f"{row[f'{first}_ns_per_unit']:,.3f}",
            f"{row[f'{second}_ns_per_unit']:,.3f}",
            row["unit"],
            f"{row[quotient]:.2f}",
            f"{row['bar']}: {yes_or_no(row['met'])}",
            sameness(row),
        ]
        for row in rows
    ]
    head = ["operator", "pass", f"{first} ms", f"{second} ms", f"{first} ns", f"{second} ns", "per", "quotient"]
    return table(lines, [*head, "bar: met?", ""])


def growth_table(rows: list[Row]) -> str:
    """How time grows with each size; the factors are against the row above."""
    lines = []
    for (op, symbol), group in itertools.groupby(rows, key=lambda row: (row["op"], row["symbol"])):
        for position, row in enumerate(group):
            lines.append(
                [
                    f"{op}: {symbol}" if position == 0 else "",
                    row["size"],
                    row["work"] if position else "",
                    number(row["forward_ms"], ",.2f"),
                    number(row.get("forward_factor"), ".2f"),
                    number(row.get("forward + backward_ms"), ",.2f"),
                    number(row.get("forward + backward_factor"), ".2f"),
                    f"{row['bar']}: {yes_or_no(row['met'])}" if "bar" in row else "",
                ]
            )
    head = ["what grows", "size", "work", "forward ms", "factor", "fwd + bwd ms", "factor", "bar: met?"]
    return table(lines, head)
