"""Command line of scripts/compare_starts: train, judge, print the table, write the JSON file."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench.door import new_result, refuse, section_parser
from starts.options import STARTS, Options

SCRIPT = "compare_starts"
DESCRIPTION = (
    "Compares starts of a training on few labelled volumes: nothing, a backbone trained on unlabelled volumes, a "
    "network trained on synthetic volumes, both."
)
METHOD = (
    "Every training on labels takes as many steps over the same volumes and is judged with the thresholds of its "
    "configuration on specimens that serve nothing else. masked: bundle pretrain3d on all other volumes, labels "
    "unread. synthetic: the same detector on crops of a recipe. both: the second, begun with the backbone of the first."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = section_parser(SCRIPT, DESCRIPTION, STARTS)
    parser.add_argument("--dataset_dir", metavar="DATA", type=Path, help="manifest or folder, default a specimen")
    parser.add_argument("--labelled", metavar="NAME", nargs="+", default=[], help="volumes to learn from; default one")
    parser.add_argument("--val_specimens", metavar="NAME", nargs="+", default=[], help="to judge on; default the last")
    parser.add_argument("--specimen_pattern", default="^[^_]+", help="finds the specimen in a volume's name")
    parser.add_argument("--bundle", default="maskrcnn3d", help="the detector's, default maskrcnn3d")
    parser.add_argument("--overlays", metavar="NAME", nargs="+", default=[], help="of its training, names or files")
    parser.add_argument("--recipe", default="randomised", help="of synthetic volumes, default randomised")
    parser.add_argument("--steps", type=int, help="on labels, default 1500")
    parser.add_argument("--pretrain_steps", type=int, help="of each training before, default 4000")
    parser.add_argument("--curve_steps", type=int, help="between states that are judged, default a fifth of --steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings on labels, default 0")
    parser.add_argument("--threads", type=int, default=2, help="of every process, default 2")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="keeps runs and results; default a temporary one")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="picture of the scores to write")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (2 if arguments.quick else 1500)
    arguments.pretrain_steps = arguments.pretrain_steps or (2 if arguments.quick else 4000)
    arguments.curve_steps = arguments.curve_steps or max(1, arguments.steps // 5)
    for name in ("steps", "pretrain_steps", "curve_steps", "threads"):
        if getattr(arguments, name) < 1:
            refuse(SCRIPT, f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    if arguments.dataset_dir is not None and not arguments.dataset_dir.exists():
        refuse(SCRIPT, f"--dataset_dir {arguments.dataset_dir} does not exist")
    for name in ("json", "figure"):
        file = getattr(arguments, name)
        if file is not None and not file.absolute().parent.is_dir():
            refuse(SCRIPT, f"--{name} {file}: its folder does not exist; make it first")
    return arguments


def main() -> int:
    """Compare."""
    arguments = parse_arguments()
    from starts import data, report, runs  # they import torch: --help needs none

    result = new_result(SCRIPT, ("starts",), threads=arguments.threads, is_quick=arguments.quick)
    result["method"] = METHOD
    with tempfile.TemporaryDirectory(prefix="compare_starts_") as temporary:
        options = options_of(arguments, Path(temporary))
        options.folder.mkdir(parents=True, exist_ok=True)
        try:
            division = data.divided(options)
            data.write(options, division)
            result["data"] = {
                "name": "built-in specimen" if options.dataset_dir is None else options.dataset_dir.name,
                "labelled": [row.name for row in division.labelled],
                "num_unlabelled": len(division.unlabelled),
                "num_val": len(division.val),
            }
            trainings = runs.Trainings(options)
            for seed in options.seeds:
                for name in (name for name in STARTS if name in arguments.only):
                    result["starts"].append(trainings.tuned(name, seed))
                    if arguments.json is not None:
                        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except (ValueError, FileNotFoundError) as error:
            refuse(SCRIPT, str(error))
    if arguments.figure is not None:
        report.draw(result["starts"], arguments.figure)
    print(report.text(result))
    return 0


def options_of(arguments: argparse.Namespace, temporary: Path) -> Options:
    """The options that were given."""
    return Options(
        folder=(temporary if arguments.folder is None else arguments.folder).absolute(),
        dataset_dir=None if arguments.dataset_dir is None else arguments.dataset_dir.absolute(),
        labelled=tuple(arguments.labelled),
        val_specimens=tuple(arguments.val_specimens),
        specimen_pattern=arguments.specimen_pattern,
        bundle=arguments.bundle,
        overlays=tuple(str(Path(name).absolute()) if Path(name).is_file() else name for name in arguments.overlays),
        recipe=arguments.recipe,
        steps=arguments.steps,
        pretrain_steps=arguments.pretrain_steps,
        curve_steps=arguments.curve_steps,
        seeds=tuple(arguments.seeds),
        threads=arguments.threads,
        is_quick=arguments.quick,
    )


if __name__ == "__main__":
    sys.exit(main())
