"""Command line of scripts/bench_models: measure the models, print the tables, write the JSON file.

The exit code is 0 whether bars are met or not: they are for people to read.
"""

import argparse
import datetime
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bench.models.bars import STEP_BARS, Row, verdicts

SECTIONS = ("steps", "loop", "memory")
DESCRIPTION = (
    "Measures the training step of each tiny model, as its bundle ships it, against the step's convolutions, linear "
    "layers and attention alone; how long its training waits for batches; and the peak memory at the papers' sizes."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    models = list(STEP_BARS)
    parser = argparse.ArgumentParser(prog="scripts/bench_models", description=DESCRIPTION)
    parser.add_argument(
        "--models", metavar="NAME", nargs="+", choices=models, default=models, help=f"some of {', '.join(models)}"
    )
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS, help="some of the three")
    parser.add_argument("--overlays", metavar="NAME", nargs="+", default=[], help="of steps and loop, names or files")
    parser.add_argument("--dataset_dir", metavar="DATA", type=Path, help="of steps and loop, default the specimen")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="of the loop's loader, default 0 and 1")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, default 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--repeats", type=int, default=9, help="turns of step and floor, default 9")
    parser.add_argument(
        "--json", "--output", metavar="FILE", type=Path, help="write every number, and where it is from, to FILE"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its numbers mean nothing")
    arguments = parser.parse_args()
    if arguments.dataset_dir is not None and not arguments.dataset_dir.exists():
        refuse(f"--dataset_dir {arguments.dataset_dir} does not exist")
    if min(arguments.workers) < 0:
        refuse(f"--workers {' '.join(map(str, arguments.workers))}: give numbers from 0")
    if arguments.threads < 1 or arguments.repeats < 1:
        refuse("--threads and --repeats must be at least 1")
    return arguments


def refuse(message: str) -> NoReturn:
    """End with one line and exit code 2, as the other scripts do."""
    print(f"bench_models: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    import torch  # after the options: --help needs none of this

    from bench import environment
    from bench.models import report
    from bench.models.loop import measure_loop
    from bench.models.memory import measure_memory
    from bench.models.steps import measure_steps

    if arguments.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda, but torch finds no CUDA device here; leave it out")
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "benchmark": "bench_models",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/bench_models", *sys.argv[1:]]),
        "is_quick": arguments.quick,
        "device": arguments.device,
        "threads": arguments.threads,
        "hardware": environment.hardware(arguments.device),
        "versions": environment.versions(),
        "operators": environment.operators(),
        "method": report.METHOD,
        **{section: [] for section in (*SECTIONS, "bars")},
    }
    device, is_quick = arguments.device, arguments.quick
    with tempfile.TemporaryDirectory(prefix="bench_models_") as folder:
        # Memory first: this process is still small.
        data = (arguments.overlays, arguments.dataset_dir, device)
        jobs: dict[str, Callable[[str], list[Row]]] = {
            "memory": lambda model: [measure_memory(model, device, arguments.threads, is_quick)],
            "steps": lambda model: [measure_steps(model, *data, arguments.repeats, is_quick, Path(folder))],
            "loop": lambda model: [measure_loop(model, *data, n, is_quick, Path(folder)) for n in arguments.workers],
        }
        for section, job in jobs.items():
            for model in arguments.models if section in arguments.only else ():
                start = time.perf_counter()
                result[section] += job(model)
                result["bars"] = list(verdicts(result))
                # What goes on is said on stderr; stdout holds the report alone.
                print(f"{section} of {model} took {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
                if arguments.json:  # after every row: a run that is stopped leaves what it measured
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report.text(result))


if __name__ == "__main__":
    main()
