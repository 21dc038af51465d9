"""Command line of scripts/bench_inference: measure the sections, print the tables, write the JSON file.

The exit code is 0 whether bars are met or not: they are for people to read.
"""

import argparse
import datetime
import importlib
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from bench.inference.bars import verdicts
from bench.inference.options import Options

# Each is a module with a METHOD and measure(options) -> rows of the report.
SECTIONS = ("seams", "exact", "whole", "memory", "workers", "records", "kills")
NEED_WEIGHTS = ("whole", "workers")
DESCRIPTION = (
    "Measures whole-stack inference: errors at the seams between blocks, time against the bare network, peak memory, "
    "workers, ten million instances, and runs that are killed."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = argparse.ArgumentParser(prog="scripts/bench_inference", description=DESCRIPTION)
    listed = ", ".join(SECTIONS)
    parser.add_argument(
        "--only", metavar="SECTION", nargs="+", choices=SECTIONS, default=SECTIONS, help=f"some of {listed}"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="weights of bundles/maskrcnn3d; without it they are trained"
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="how long they are trained, default 4")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, default 2; workers have 1 each")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where stacks are written, default a temporary one")
    parser.add_argument(
        "--json", "--output", metavar="FILE", type=Path, help="write every number, and where it is from, to FILE"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its numbers mean nothing")
    arguments = parser.parse_args()
    if arguments.threads < 1 or not arguments.minutes > 0:
        refuse("--threads must be at least 1, --minutes more than 0")
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        refuse(f"--checkpoint {arguments.checkpoint} does not exist; leave it out to train the weights")
    if arguments.folder is not None and not arguments.folder.is_dir():
        refuse(f"--folder {arguments.folder} does not exist; make it first, with 10 GB of room")
    return arguments


def refuse(message: str) -> NoReturn:
    """End with one line and exit code 2, as the other scripts do."""
    print(f"bench_inference: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    import torch  # after the options: --help needs none of this

    from bench import environment
    from bench.inference import report

    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "benchmark": "bench_inference",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/bench_inference", *sys.argv[1:]]),
        "is_quick": arguments.quick,
        "device": "cpu",
        "threads": arguments.threads,
        "hardware": environment.hardware("cpu"),
        "versions": environment.versions(),
        "operators": environment.operators(),
        "method": "",
        "weights": None,
        **{section: [] for section in (*SECTIONS, "bars")},
    }
    with tempfile.TemporaryDirectory(prefix="bench_inference_", dir=arguments.folder) as temporary:
        folder, checkpoint = Path(temporary).absolute(), arguments.checkpoint
        if checkpoint is not None:
            result["weights"] = f"given: {checkpoint.name}"
        elif not arguments.quick and set(NEED_WEIGHTS) & set(arguments.only):
            from bench.inference.model import train

            checkpoint = train(folder / "training", arguments.minutes)
            result["weights"] = f"trained for {arguments.minutes:g} minutes"
        options = Options(folder=folder, checkpoint=checkpoint, threads=arguments.threads, is_quick=arguments.quick)
        for section in (section for section in SECTIONS if section in arguments.only):
            start = time.perf_counter()
            # Only what was asked for is imported: the bundle's sections take several seconds for that.
            module = importlib.import_module(f"bench.inference.{section}")
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
