"""Command line of scripts/bench_engine: measure the sections, print the tables, write the JSON file.

The exit code is 0 whether bars are met or not: they are for people to read.
"""

import argparse
import importlib.metadata
import tempfile
from pathlib import Path

from bench.door import measure_sections, new_result, refuse, section_parser
from bench.engine.bars import verdicts

SCRIPT = "bench_engine"
SECTIONS = ("engine", "zero0", "workers", "gradients", "bytes", "start")
DESCRIPTION = (
    "Measures the training engine on the shipped Mask R-CNN with group norms: its time against a plain loop, "
    "DeepSpeed's ZeRO 0 against doing without, two workers against one, gradients of the same step taken in different "
    "ways, bytes of weights, gradients and optimizer state under ZeRO 3, and how long two workers take to start."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = section_parser(SCRIPT, DESCRIPTION, SECTIONS)
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads of the engine and zero0 sections, default 2; others have 1"
    )
    arguments = parser.parse_args()
    if arguments.threads < 1:
        refuse(SCRIPT, "--threads must be at least 1")
    return arguments


def installed(*names: str) -> dict[str, str]:
    """Versions of packages, those that are not there left out."""
    there = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in names if name in there}


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    from bench.engine import report
    from bench.engine.bundle import Options
    from bench.models.training import specimen_for

    versions = installed("deepspeed", "ray", "pytorch-ignite")
    result = new_result(SCRIPT, SECTIONS, threads=arguments.threads, is_quick=arguments.quick, versions=versions)
    with tempfile.TemporaryDirectory(prefix="bench_engine_") as temporary:
        folder = Path(temporary).absolute()
        data = specimen_for(folder, arguments.quick)
        options = Options(folder=folder, data=data, threads=arguments.threads, is_quick=arguments.quick)
        chosen = [section for section in SECTIONS if section in arguments.only]
        measure_sections(result, "bench.engine", chosen, options, verdicts, arguments.json)
    print(report.text(result))


if __name__ == "__main__":
    main()
