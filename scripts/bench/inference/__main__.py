"""Command line of scripts/bench_inference: measure the sections, print the tables, write the JSON file.

The exit code is 0 whether bars are met or not: they are for people to read.
"""

import argparse
import tempfile
from pathlib import Path

from bench.door import measure_sections, new_result, refuse, section_parser
from bench.inference.bars import verdicts
from bench.inference.options import Options

SCRIPT = "bench_inference"
SECTIONS = ("seams", "exact", "whole", "memory", "workers", "records", "kills")
NEED_WEIGHTS = ("whole", "workers")
DESCRIPTION = (
    "Measures whole-stack inference: errors at the seams between blocks, time against the bare network, peak memory, "
    "workers, ten million instances, and runs that are killed."
)


def parse_arguments() -> argparse.Namespace:
    """The options, all of them optional."""
    parser = section_parser(SCRIPT, DESCRIPTION, SECTIONS)
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="weights of bundles/maskrcnn3d; without it they are trained"
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="how long they are trained, default 4")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, default 2; workers have 1 each")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where stacks are written, default a temporary one")
    arguments = parser.parse_args()
    if arguments.threads < 1 or not arguments.minutes > 0:
        refuse(SCRIPT, "--threads must be at least 1, --minutes more than 0")
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        refuse(SCRIPT, f"--checkpoint {arguments.checkpoint} does not exist; leave it out to train the weights")
    if arguments.folder is not None and not arguments.folder.is_dir():
        refuse(SCRIPT, f"--folder {arguments.folder} does not exist; make it first, with 10 GB of room")
    return arguments


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    import torch  # after the options: --help needs none of this

    from bench.inference import report

    torch.set_num_threads(arguments.threads)
    result = new_result(SCRIPT, SECTIONS, threads=arguments.threads, is_quick=arguments.quick)
    result["weights"] = None
    with tempfile.TemporaryDirectory(prefix="bench_inference_", dir=arguments.folder) as temporary:
        folder, checkpoint = Path(temporary).absolute(), arguments.checkpoint
        if checkpoint is not None:
            result["weights"] = f"given: {checkpoint.name}"
        elif not arguments.quick and set(NEED_WEIGHTS) & set(arguments.only):
            from bench.inference.model import train

            checkpoint = train(folder / "training", arguments.minutes)
            result["weights"] = f"trained for {arguments.minutes:g} minutes"
        options = Options(folder=folder, checkpoint=checkpoint, threads=arguments.threads, is_quick=arguments.quick)
        chosen = [section for section in SECTIONS if section in arguments.only]
        measure_sections(result, "bench.inference", chosen, options, verdicts, arguments.json)
    print(report.text(result))


if __name__ == "__main__":
    main()
