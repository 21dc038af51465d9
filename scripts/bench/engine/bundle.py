"""The shipped Mask R-CNN, its data, and what every section is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from bench.models.training import read_config
from seg3d_monai.engine import rank

MODEL = "maskrcnn3d"
LONG_MINUTES = 1e6
"""max_minutes of a run whose schedule is to follow its steps, not the clock: so two runs have the same losses."""


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        folder: for the files of runs, an absolute path.
        data: manifest of the built-in synthetic specimen.
        threads: CPU threads of torch, where a section does not say otherwise.
        is_quick: tiny sizes, whose numbers mean nothing.
    """

    folder: Path
    data: Path
    threads: int
    is_quick: bool


def read_bundle(
    options: Options, run: str, *, overlays: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> ConfigParser:
    """train.json of the bundle without its validation and with group norms, overlays over it, then changed ids.

    BatchNorm takes the moments of the crops of a process: how crops are divided would change gradients.

    Args:
        options: of the benchmark.
        run: name of the run's folder, which each process has for itself: there is no launcher to let them wait.
        overlays: names of files in configs/overlays.
        changes: values by id.
    """
    fixed = {"dataset_dir": str(options.data), "output_dir": str(options.folder / run / str(rank())), "device": "cpu"}
    fixed |= {"backbone#norm": "group", "network_def#norm": "group"}
    parser = read_config(MODEL, overlays, fixed | dict(changes or {}), options.is_quick)
    handlers = parser["train#handlers"]
    parser["train#handlers"] = [x for x in handlers if x["_target_"] != "seg3d_monai.engine.Validation"]
    parser.parse(True)
    return parser
