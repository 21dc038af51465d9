"""Command line of scripts/bench_data: measure the sections, print the tables, write the JSON file.

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

from bench.data.bars import verdicts
from bench.data.options import Options

# Each is a module with a METHOD and measure(options) -> rows of the report.
SECTIONS = ("build", "crops", "reads", "samples", "loader_memory")
DESCRIPTION = (
    "Measures the data layer: building a crop index against only reading its labels, an index of ten million crops, "
    "crops read from disk, training samples, and the memory of a loader's worker."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = argparse.ArgumentParser(prog="scripts/bench_data", description=DESCRIPTION)
    listed = ", ".join(SECTIONS)
    parser.add_argument(
        "--only", metavar="SECTION", nargs="+", choices=SECTIONS, default=SECTIONS, help=f"some of {listed}"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch, default 1")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where volumes are written, default a temporary one")
    parser.add_argument(
        "--json", "--output", metavar="FILE", type=Path, help="write every number, and where it is from, to FILE"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its numbers mean nothing")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        refuse("--threads must be at least 1")
    if arguments.folder is not None and not arguments.folder.is_dir():
        refuse(f"--folder {arguments.folder} does not exist; make it first, with 10 GB of room")
    return arguments


def refuse(message: str) -> NoReturn:
    """End with one line and exit code 2, as the other scripts do."""
    print(f"bench_data: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    import torch  # after the options: --help needs none of this

    from bench import environment
    from bench.data import report

    torch.set_num_threads(arguments.threads)
    libraries = {name: importlib.metadata.version(name) for name in ("numpy", "zarr", "numcodecs", "tifffile")}
    result: dict[str, Any] = {
        "benchmark": "bench_data",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/bench_data", *sys.argv[1:]]),
        "is_quick": arguments.quick,
        "device": "cpu",
        "threads": arguments.threads,
        "hardware": environment.hardware("cpu"),
        "versions": environment.versions() | libraries,
        "operators": environment.operators(),
        "method": "",
        **{section: [] for section in (*SECTIONS, "bars")},
    }
    with tempfile.TemporaryDirectory(prefix="bench_data_", dir=arguments.folder) as temporary:
        options = Options(folder=Path(temporary).absolute(), threads=arguments.threads, is_quick=arguments.quick)
        for section in (section for section in SECTIONS if section in arguments.only):
            start = time.perf_counter()
            module = importlib.import_module(f"bench.data.{section}")
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
