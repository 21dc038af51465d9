"""The report for people: where it was measured and how, a table per section, and at last the bars."""

from collections.abc import Callable, Sequence
from typing import Any

from bench import report
from bench.engine.bars import Row

TITLES = {
    "engine": "The engine against a plain loop, one worker",
    "zero0": "DeepSpeed's ZeRO 0 against the engine without, one worker",
    "workers": "Two workers of one thread against one",
    "gradients": "The same step taken in different ways",
    "bytes": "What a worker holds at the worst moment of a step, MB",
    "start": "Start",
}


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    tables: dict[str, Callable[[Sequence[Row]], str]] = {
        "engine": times_table,
        "zero0": times_table,
        "workers": workers_table,
        "gradients": gradients_table,
        "bytes": bytes_table,
        "start": start_lines,
    }
    # The operators' report without any of its sections is the head that all have.
    parts = [report.text({**result, **{section: [] for section in report.SECTIONS}})]
    for section, heading in TITLES.items():
        if result[section]:
            parts += [_title(heading), tables[section](result[section])]
    return "\n".join([*parts, _title("Bars"), bars_table(result["bars"])])


def times_table(rows: Sequence[Row]) -> str:
    """Step times of one against those of the other."""
    lines = [
        [
            f"{row['threads']} threads, {row['num_steps']} steps each",
            "",
            f"{row['ours_ms']:,.1f}",
            f"{row['baseline_ms']:,.1f}",
            f"{row['ours_ms'] / row['baseline_ms']:.3f}x",
            f"{row['times_baseline_mean']:.3f}x",
            f"{row['times_baseline']:.3f}x",
            f"{row['first_loss']:.4f} to {row['last_loss']:.4f}",
            f"{row['largest_deviation']:.1e}",
            "",
        ]
        for row in rows
    ]
    head = ["", "", "ours ms", "baseline ms", "of medians", "of means", "median ratio", "loss", "difference", ""]
    return report.table(lines, head)


def workers_table(rows: Sequence[Row]) -> str:
    """Time a sample with one worker and with two."""
    lines = [
        [
            f"batches of {row['batch_size']}",
            "",
            " ".join(f"{value:,.1f}" for value in row["one_ms"]),
            " ".join(f"{value:,.1f}" for value in row["two_ms"]),
            f"{row['speed_up']:.2f}x",
            f"{row['speed_up_of_means']:.2f}x",
            "",
        ]
        for row in rows
    ]
    return report.table(lines, ["", "", "1 worker, ms a sample", "2 workers", "speed-up", "of means", ""])


def gradients_table(rows: Sequence[Row]) -> str:
    """Relative differences from the first way."""
    lines = [
        [
            row["way"],
            "",
            f"{row['norm']:.4f}",
            f"{row['overall']:.1e}",
            f"{row['worst']:.1e}",
            f"{row['loss_deviation']:.1e}",
            f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}",
            f"  worst: {row['worst_parameter']}" if row["worst"] else "",
        ]
        for row in rows
    ]
    return report.table(lines, ["way", "", "norm", "all", "worst parameter", "losses", "loss", ""])


def bytes_table(rows: Sequence[Row]) -> str:
    """Megabytes of each kind."""
    kinds = list(rows[0]["mb"])
    lines = [
        [
            f"ZeRO {row['stage']}, {row['workers']} worker{'s' * (row['workers'] > 1)}",
            "",
            *(f"{row['mb'][kind]:,.0f}" for kind in kinds),
            f"{row['state_mb']:,.0f}",
            report.number(row["peak_rss_mb"], ",.0f"),
            f"  after {row['at']}; buffers: {_largest(row['buffers_mb'])}",
        ]
        for row in rows
    ]
    words = f"{rows[0]['num_parameters']:,} parameters; without averaged weights, which are not in the sum\n"
    return words + report.table(lines, ["", "", *kinds, "sum", "peak RSS", ""])


def _largest(buffers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:,.0f}" for name, number in buffers.items() if number >= 1) or "none"


def start_lines(rows: Sequence[Row]) -> str:
    """Seconds of each start."""
    return "\n".join(f"{row['workers']} workers: {' '.join(f'{s:.1f}' for s in row['runs_s'])} s" for row in rows)


def bars_table(rows: Sequence[Row]) -> str:
    """What was measured against its bar."""
    lines = [
        [row["work"], row["quantity"], f"{row['value']:.3g}", row["bar"], "pass" if row["met"] else "FAIL"]
        for row in rows
    ]
    return report.table(lines, ["work", "quantity", "measured", "bar", "verdict"])


def _title(words: str) -> str:
    return f"\n{words}\n{'=' * len(words)}"
