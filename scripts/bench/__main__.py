"""Command line of scripts/bench_ops: choose rows, measure them, print the tables, write the JSON file.

The exit code is 0 whether bars are met or not: they are for people to read.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

DESCRIPTION = (
    "Measures roi_align3d, nms3d, ms_deform_attn3d, layer_norm and group_norm against grid_sample, MONAI's "
    "non_max_suppression, torch's own norms and a plain copy: time, extra memory, growth with each size."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = argparse.ArgumentParser(prog="scripts/bench_ops", description=DESCRIPTION)
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="only rows whose name holds NAME: nms3d, bars/roi_align3d, bfloat16, ...; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, default 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument(
        "--repeats", type=int, default=15, help="runs of each contender, fewer of long ones; default 15"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number, and where it is from, to FILE")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its times mean nothing")
    arguments = parser.parse_args()
    if arguments.threads < 1 or arguments.repeats < 1:
        refuse("--threads and --repeats must be at least 1")
    return arguments


def refuse(message: str) -> NoReturn:
    """End with one line and exit code 2, as the other scripts do."""
    print(f"bench_ops: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    import torch  # after the options: --help needs none of this

    from bench import environment, report
    from bench.plan import all_jobs
    from bench.sections import Settings

    if arguments.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda, but torch finds no CUDA device here; leave it out")
    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.device, arguments.threads, arguments.repeats, arguments.quick)
    wanted = arguments.only or [""]
    jobs = [job for job in all_jobs(settings) if any(word in job.full_name for word in wanted)]
    if not jobs:
        refuse(f"--only {' '.join(wanted)} names no row; --list shows them")
    if arguments.list:
        print("\n".join(job.full_name for job in jobs))
        return

    started = datetime.datetime.now(datetime.UTC)
    result: dict[str, Any] = {
        "benchmark": "bench_ops",
        "date": started.isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/bench_ops", *sys.argv[1:]]),
        "is_quick": arguments.quick,
        "device": arguments.device,
        "threads": arguments.threads,
        "hardware": environment.hardware(arguments.device),
        "versions": environment.versions(),
        "operators": environment.operators(),
        "method": report.METHOD,
        **{section: [] for section in report.SECTIONS},
    }
    for job in jobs:
        start = time.perf_counter()
        result[job.section] += job.run()
        # What goes on is said on stderr; stdout holds the report alone.
        print(f"{job.full_name} took {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if arguments.json:  # after every row: a run that is stopped leaves what it measured
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report.text(result))


if __name__ == "__main__":
    main()
