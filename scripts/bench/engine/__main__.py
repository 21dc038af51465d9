"""Command line of scripts/bench_engine: measure the sections, print the tables, write the JSON file.

The exit code is 0 whether bars are met or not: they are for people to read.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from bench.engine.bars import verdicts

# Each is a module with a METHOD and measure(options) -> rows of the report.
SECTIONS = ("engine", "zero0", "workers", "gradients", "bytes", "start")
DESCRIPTION = (
    "Measures the training engine on the shipped Mask R-CNN: its time against a plain loop, DeepSpeed's ZeRO 0 against "
    "doing without, two workers against one, gradients of the same step taken in different ways, bytes of weights, "
    "gradients and optimizer state under ZeRO 3, and how long two workers take to start."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = argparse.ArgumentParser(prog="scripts/bench_engine", description=DESCRIPTION)
    listed = ", ".join(SECTIONS)
    parser.add_argument(
        "--only", metavar="SECTION", nargs="+", choices=SECTIONS, default=SECTIONS, help=f"some of {listed}"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads of the engine and zero0 sections, default 2; others have 1"
    )
    parser.add_argument(
        "--json", "--output", metavar="FILE", type=Path, help="write every number, and where it is from, to FILE"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its numbers mean nothing")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        refuse("--threads must be at least 1")
    return arguments


def refuse(message: str) -> NoReturn:
    """End with one line and exit code 2, as the other scripts do."""
    print(f"bench_engine: error: {message}", file=sys.stderr)
    sys.exit(2)


def installed(*names: str) -> dict[str, str]:
    """Versions of packages, those that are not there left out."""
    there = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in names if name in there}


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    from bench import environment  # after the options: --help needs none of this
    from bench.engine import report
    from bench.engine.bundle import Options, write_data

    result: dict[str, Any] = {
        "benchmark": "bench_engine",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/bench_engine", *sys.argv[1:]]),
        "is_quick": arguments.quick,
        "device": "cpu",
        "threads": arguments.threads,
        "hardware": environment.hardware("cpu"),
        "versions": environment.versions() | installed("deepspeed", "ray", "pytorch-ignite"),
        "operators": environment.operators(),
        "method": "",
        **{section: [] for section in (*SECTIONS, "bars")},
    }
    with tempfile.TemporaryDirectory(prefix="bench_engine_") as temporary:
        folder = Path(temporary).absolute()
        data = write_data(folder, arguments.quick)
        options = Options(folder=folder, data=data, threads=arguments.threads, is_quick=arguments.quick)
        for section in (section for section in SECTIONS if section in arguments.only):
            start = time.perf_counter()
            module = importlib.import_module(f"bench.engine.{section}")
            result[section] = module.measure(options)
            result["method"] = f"{result['method']} {module.METHOD}".lstrip()
            result["bars"] = list(verdicts(result))
            # What goes on is said on stderr; stdout holds the report alone.
            print(f"{section} took {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
            if arguments.json:  # after every section: a run that is stopped leaves what it measured
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report.text(result))


if __name__ == "__main__":
    main()
