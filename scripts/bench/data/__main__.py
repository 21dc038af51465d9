"""Command line of scripts/bench_data: measure the sections, print the tables, write the JSON file.

The exit code is 0 whether bars are met or not: they are for people to read.
"""

import argparse
import importlib.metadata
import tempfile
from pathlib import Path

from bench.data import annotate_options
from bench.data.bars import verdicts
from bench.data.options import Options
from bench.door import measure_sections, new_result, refuse, section_parser

SCRIPT = "bench_data"
SECTIONS = ("build", "crops", "reads", "samples", "loader_memory", "convert", "plan")
OPT_IN = ("annotate",)
"""Sections that take long, and are measured only where they are asked for."""
DESCRIPTION = (
    "Measures the data layer: building a crop index against only reading its labels, an index of ten million crops, "
    "crops read from disk, training samples, the memory of a loader's worker, converting a stack by threads, and a "
    "plan made from data."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = section_parser(SCRIPT, DESCRIPTION, (*SECTIONS, *OPT_IN))
    parser.set_defaults(only=SECTIONS)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch, default 1")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where volumes are written, default a temporary one")
    parser.add_argument(
        "--dataset_dir", metavar="DIR", type=Path, help="data to plan for or to annotate, default a synthetic specimen"
    )
    parser.add_argument(
        "--plan_minutes",
        type=float,
        default=0.0,
        help="also train so long with the plan, and so long with settings by hand, default 0: not at all",
    )
    parser.add_argument(
        "--hand_overlays",
        metavar="NAME",
        nargs="+",
        default=[],
        help="overlays of maskrcnn3d with these settings and the split of the data, default the bundle's own settings",
    )
    annotate_options.add_arguments(parser)
    arguments = parser.parse_args()
    try:
        arguments.annotate = annotate_options.from_arguments(arguments)
    except ValueError as error:
        refuse(SCRIPT, str(error))
    if arguments.plan_minutes < 0:
        refuse(SCRIPT, "--plan_minutes must not be negative")
    if arguments.dataset_dir is not None and not arguments.dataset_dir.exists():
        refuse(SCRIPT, f"--dataset_dir {arguments.dataset_dir} does not exist")
    if arguments.threads < 1:
        refuse(SCRIPT, "--threads must be at least 1")
    if arguments.folder is not None and not arguments.folder.is_dir():
        refuse(SCRIPT, f"--folder {arguments.folder} does not exist; make it first, with 10 GB of room")
    return arguments


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    import torch  # after the options: --help needs none of this

    from bench.data import report

    torch.set_num_threads(arguments.threads)
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "zarr", "numcodecs", "tifffile")}
    sections = (*SECTIONS, *OPT_IN)
    result = new_result(SCRIPT, sections, threads=arguments.threads, is_quick=arguments.quick, versions=versions)
    with tempfile.TemporaryDirectory(prefix="bench_data_", dir=arguments.folder) as temporary:
        options = Options(
            folder=Path(temporary).absolute(),
            threads=arguments.threads,
            is_quick=arguments.quick,
            dataset_dir=arguments.dataset_dir,
            annotate=arguments.annotate,
            plan_minutes=arguments.plan_minutes,
            hand_overlays=tuple(arguments.hand_overlays),
        )
        chosen = [section for section in sections if section in arguments.only]
        measure_sections(result, "bench.data", chosen, options, verdicts, arguments.json)
    print(report.text(result))


if __name__ == "__main__":
    main()
