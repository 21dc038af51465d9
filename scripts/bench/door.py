"""What the command lines of benchmarks that consist of sections have in common.

A section is a module of the benchmark's package with a METHOD and measure(options) -> rows of the report.
"""

import argparse
import datetime
import importlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


def section_parser(script: str, description: str, sections: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the options --only, --json and --quick."""
    parser = argparse.ArgumentParser(prog=f"scripts/{script}", description=description)
    listed = ", ".join(sections)
    parser.add_argument(
        "--only", metavar="SECTION", nargs="+", choices=sections, default=sections, help=f"some of {listed}"
    )
    parser.add_argument(
        "--json", "--output", metavar="FILE", type=Path, help="write every number, and where it is from, to FILE"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its numbers mean nothing")
    return parser


def refuse(script: str, message: str) -> NoReturn:
    """End with one line and exit code 2, as the other scripts do."""
    print(f"{script}: error: {message}", file=sys.stderr)
    sys.exit(2)


def new_result(
    script: str, sections: Sequence[str], *, threads: int, is_quick: bool, versions: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A result without rows: where it is measured, with what, and by which command."""
    from bench import environment  # imports torch: --help needs none of this

    return {
        "benchmark": script,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([f"scripts/{script}", *sys.argv[1:]]),
        "is_quick": is_quick,
        "device": "cpu",
        "threads": threads,
        "hardware": environment.hardware("cpu"),
        "versions": environment.versions() | dict(versions or {}),
        "operators": environment.operators(),
        "method": "",
        **{section: [] for section in (*sections, "bars")},
    }


def measure_sections(
    result: dict[str, Any],
    package: str,
    sections: Iterable[str],
    options: Any,
    verdicts: Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]],
    file: Path | None,
) -> None:
    """Fill a result section by section; after each it is written to the file, if there is one.

    So a run that is stopped leaves what it measured. Only what was asked for is imported: some take several seconds.
    """
    for section in sections:
        start = time.perf_counter()
        module = importlib.import_module(f"{package}.{section}")
        result[section] = module.measure(options)
        result["method"] = f"{result['method']} {module.METHOD}".lstrip()
        result["bars"] = list(verdicts(result))
        # What goes on is said on stderr; stdout holds the report alone.
        print(f"{section} took {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
