"""Command line of scripts/compare_peers: race, print the table, write the JSON file.

The exit code is 0 when every contestant came to its end, 1 when one failed: the others' results are there.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.door import new_result, refuse, section_parser
from peers.options import CONTESTANTS, Options

SCRIPT = "compare_peers"
DESCRIPTION = (
    "Races this package's training against a U-Net with watershed, StarDist and Otsu's threshold, with equal minutes "
    "and threads, judged on specimens that none has seen."
)
MINUTES, QUICK_MINUTES = 40.0, 0.03


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional; the defaults of specimens are those of BBBC050."""
    parser = section_parser(SCRIPT, DESCRIPTION, CONTESTANTS)
    parser.add_argument(
        "--dataset_dir", metavar="DATA", type=Path, help="manifest or folder, default a synthetic specimen"
    )
    parser.add_argument("--minutes", type=float, help=f"of each training loop, default {MINUTES:g}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a training each, default 0")
    parser.add_argument("--threads", type=int, default=2, help="processors of every contestant, default 2")
    parser.add_argument(
        "--specimen_pattern",
        default="^[^_]+",
        help="finds the specimen in a volume's name, where the manifest has none; default what is before the first _",
    )
    parser.add_argument(
        "--val_specimens",
        metavar="NAME",
        nargs="+",
        default=["Emb10", "Emb11"],
        help="to judge on; default Emb10 Emb11",
    )
    parser.add_argument(
        "--tune_specimens", metavar="NAME", nargs="+", default=["Emb09"], help="to tune thresholds on; default Emb09"
    )
    parser.add_argument("--train_on_tuned", action="store_true", help="all train on the specimens to tune on, too")
    parser.add_argument("--bundle", default="maskrcnn3d", help="ours, default maskrcnn3d")
    parser.add_argument("--overlays", metavar="NAME", nargs="+", default=[], help="of our training, names or files")
    parser.add_argument("--no_tune", action="store_true", help="ours keeps the thresholds of its bundle and overlays")
    parser.add_argument(
        "--curve_steps", metavar="N", type=int, help="ours is judged every N steps, too, after its end; default not"
    )
    parser.add_argument(
        "--stardist_python", metavar="FILE", type=Path, help="interpreter of an environment that has it"
    )
    parser.add_argument(
        "--folder", metavar="DIR", type=Path, help="keeps volumes, runs and finished results; default a temporary one"
    )
    parser.add_argument("--figure", metavar="FILE", type=Path, help="picture of the scores to write, such as race.svg")
    parser.add_argument("--restart", action="store_true", help="race anew what --folder holds results of")
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = QUICK_MINUTES if arguments.quick else MINUTES
    if not arguments.minutes > 0:
        refuse(SCRIPT, f"--minutes is {arguments.minutes:g}; it must be more than 0")
    if arguments.curve_steps is not None and arguments.curve_steps < 1:
        refuse(SCRIPT, f"--curve_steps is {arguments.curve_steps}; it must be at least 1")
    if arguments.threads < 1:
        refuse(SCRIPT, f"--threads is {arguments.threads}; it must be at least 1")
    if min(arguments.seeds) < 0 or len(set(arguments.seeds)) < len(arguments.seeds):
        refuse(SCRIPT, f"--seeds {' '.join(map(str, arguments.seeds))}: give different numbers from 0")
    if arguments.figure is not None and not arguments.figure.absolute().parent.is_dir():
        refuse(SCRIPT, f"--figure {arguments.figure}: its folder does not exist; make it first")
    if arguments.dataset_dir is not None and not arguments.dataset_dir.exists():
        refuse(SCRIPT, f"--dataset_dir {arguments.dataset_dir} does not exist")
    return arguments


def main() -> int:
    """Race."""
    arguments = parse_arguments()
    chosen = [name for name in CONTESTANTS if name in arguments.only]
    from peers import processes, race, report, stardist_environment, volumes  # they import torch: --help needs none
    from seg3d_monai.cli import COMMANDS

    versions = {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "scikit-image")}
    sections = ("contestants", "summary")
    result = new_result(SCRIPT, sections, threads=arguments.threads, is_quick=arguments.quick, versions=versions)
    result["method"] = race.METHOD
    if result["hardware"]["cores"] < arguments.threads:
        refuse(SCRIPT, f"--threads is {arguments.threads}, but there are {result['hardware']['cores']} processors")
    processes.keep_to(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="compare_peers_") as temporary:
        options = options_of(arguments, Path(temporary))
        options.folder.mkdir(parents=True, exist_ok=True)
        if "ours" in chosen and options.tune and "tune" not in COMMANDS:
            refuse(SCRIPT, "this version of the package has no `seg3d tune`; give --no_tune")
        try:
            stardist = None
            if "stardist" in chosen:
                may_make = not arguments.quick
                stardist = stardist_environment.interpreter(options.stardist_python, may_make=may_make)
                if stardist is None:
                    print("stardist is left out: --quick makes no environment for it", file=sys.stderr)
                    chosen.remove("stardist")
            division = volumes.divided(options)
            result["data"] = described(options, division)
            for row in race.race(options, division, chosen, stardist):
                result["contestants"].append(row)
                result["summary"] = race.summary(result["contestants"])
                if arguments.json is not None:
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except (ValueError, FileNotFoundError) as error:
            refuse(SCRIPT, str(error))
    if not result["contestants"]:
        refuse(SCRIPT, "no contestant is left; choose another with --only")
    if arguments.figure is not None:
        from peers import figure

        figure.draw(result["contestants"], arguments.figure)
    print(report.text(result))
    return int(any("error" in row for row in result["contestants"]))


def options_of(arguments: argparse.Namespace, temporary: Path) -> Options:
    """The options that were given."""
    return Options(
        folder=(temporary if arguments.folder is None else arguments.folder).absolute(),
        dataset_dir=None if arguments.dataset_dir is None else arguments.dataset_dir.absolute(),
        minutes=arguments.minutes,
        seeds=tuple(arguments.seeds),
        threads=arguments.threads,
        specimen_pattern=arguments.specimen_pattern,
        val_specimens=tuple(arguments.val_specimens),
        tune_specimens=tuple(arguments.tune_specimens),
        train_on_tuned=arguments.train_on_tuned,
        bundle=arguments.bundle,
        overlays=tuple(str(Path(name).absolute()) if Path(name).is_file() else name for name in arguments.overlays),
        tune=not arguments.no_tune,
        curve_steps=arguments.curve_steps,
        stardist_python=arguments.stardist_python,
        is_quick=arguments.quick,
        restart=arguments.restart,
    )


def described(options: Options, division: Any) -> dict[str, Any]:
    """The data of the race."""
    parts = {
        part: {
            "num_volumes": len(getattr(division, part)),
            "specimens": sorted({row.specimen for row in getattr(division, part)}),
        }
        for part in ("train", "tune", "val")
    }
    return {"name": "built-in specimen" if options.dataset_dir is None else options.dataset_dir.name, **parts}


if __name__ == "__main__":
    sys.exit(main())
