"""Command line of scripts/bench_stress: train, predict and count, print the tables, write the JSON file.

The exit code is 0 whether bars are met or not, 1 when a ratio failed: the others' results are there.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench.door import new_result, refuse
from bench.stress.bars import verdicts

SCRIPT = "bench_stress"
SECTIONS = ("training", "volumes")
DESCRIPTION = (
    "Trains a bundle on sparse, crowded and packed synthetic nuclei with the plan for them, and counts what it finds "
    "in volumes of known truth, whole and in blocks, for voxels of several ratios of depth to width."
)
RATIOS, QUICK_RATIOS = (1.0, 3.0, 6.0), (3.0,)
STEPS, QUICK_STEPS = 1500, 2


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = argparse.ArgumentParser(prog=f"scripts/{SCRIPT}", description=DESCRIPTION)
    parser.add_argument(
        "--ratios", metavar="N", type=float, nargs="+", help="of a voxel's depth to its width, default 1 3 6"
    )
    parser.add_argument("--steps", type=int, help=f"of each training, default {STEPS}")
    parser.add_argument("--threads", type=int, default=2, help="processors of every process, default 2")
    parser.add_argument("--bundle", metavar="NAME", default="maskrcnn3d", help="name or folder, default maskrcnn3d")
    parser.add_argument("--overlays", metavar="NAME", nargs="+", default=[], help="of the training, names or files")
    parser.add_argument("--seed", type=int, default=0, help="of data and training, default 0")
    parser.add_argument(
        "--folder", metavar="DIR", type=Path, help="keeps data, runs and finished rows; default a temporary one"
    )
    parser.add_argument("--restart", action="store_true", help="throw away what --folder holds of these ratios")
    parser.add_argument(
        "--json", "--output", metavar="FILE", type=Path, help="write every number, and where it is from, to FILE"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its numbers mean nothing")
    arguments = parser.parse_args()
    if arguments.ratios is None:
        arguments.ratios = QUICK_RATIOS if arguments.quick else RATIOS
    if arguments.steps is None:
        arguments.steps = QUICK_STEPS if arguments.quick else STEPS
    shown = " ".join(f"{ratio:g}" for ratio in arguments.ratios)
    if not 0 < min(arguments.ratios) <= max(arguments.ratios) < float("inf"):
        refuse(SCRIPT, f"--ratios {shown}: give numbers above 0, such as 1 3 6")
    if len(set(shown.split())) < len(arguments.ratios):
        refuse(SCRIPT, f"--ratios {shown}: give different numbers")
    for name, least in (("steps", 1), ("threads", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            refuse(SCRIPT, f"--{name} is {getattr(arguments, name)}; it must be at least {least}")
    return arguments


def main() -> int:
    """Stress."""
    arguments = parse_arguments()
    from bench.stress import report, run  # they import torch: --help needs none
    from bench.stress.options import Options
    from peers.processes import keep_to

    result = new_result(SCRIPT, SECTIONS, threads=arguments.threads, is_quick=arguments.quick)
    result["method"] = run.METHOD
    if result["hardware"]["cores"] < arguments.threads:
        refuse(SCRIPT, f"--threads is {arguments.threads}, but there are {result['hardware']['cores']} processors")
    keep_to(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="bench_stress_") as temporary:
        options = Options(
            folder=Path(temporary if arguments.folder is None else arguments.folder).absolute(),
            ratios=tuple(arguments.ratios),
            steps=arguments.steps,
            threads=arguments.threads,
            bundle=arguments.bundle,
            overlays=tuple(arguments.overlays),
            seed=arguments.seed,
            is_quick=arguments.quick,
            restart=arguments.restart,
        )
        try:
            for found in run.stress(options):
                result["training"].append(found["training"])
                result["volumes"] += found["volumes"]
                result["bars"] = list(verdicts(result))
                if arguments.json is not None:  # after every ratio: a run that is stopped leaves what it measured
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except (ValueError, FileNotFoundError) as error:
            refuse(SCRIPT, str(error))
    print(report.text(result))
    return int(any("error" in row for row in result["training"]))


if __name__ == "__main__":
    sys.exit(main())
