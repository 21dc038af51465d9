"""What the comparison is told."""

from dataclasses import dataclass
from pathlib import Path

STARTS = ("scratch", "masked", "synthetic", "both")


@dataclass(frozen=True)
class Options:
    """How to compare.

    Attributes:
        folder: for manifests, runs and finished results; an absolute path.
        dataset_dir: a manifest or a folder that `read_manifest` takes; None for a synthetic specimen.
        labelled: names of the volumes whose labels are learned from.
        val_specimens: specimens to judge on; all other volumes are pre-trained on, without their labels.
        specimen_pattern: finds the specimen in a volume's name, where the manifest has none.
        bundle: the detector's.
        overlays: of its training, names or files; those that start with `data_` do not concern synthetic volumes.
        recipe: of these.
        steps: of each training on labels.
        pretrain_steps: of each training before it.
        curve_steps: between states that are judged.
        seeds: of the trainings on labels; what comes before has the first of them.
        threads: CPU threads of every process.
        is_quick: toy sizes, whose numbers mean nothing.
    """

    folder: Path
    dataset_dir: Path | None
    labelled: tuple[str, ...]
    val_specimens: tuple[str, ...]
    specimen_pattern: str
    bundle: str
    overlays: tuple[str, ...]
    recipe: str
    steps: int
    pretrain_steps: int
    curve_steps: int
    seeds: tuple[int, ...]
    threads: int
    is_quick: bool
