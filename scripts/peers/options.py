"""What the race is told."""

from dataclasses import dataclass
from pathlib import Path

CONTESTANTS = ("ours", "unet", "stardist", "otsu")
UNTRAINED = ("otsu",)
"""Contestants that learn nothing, and run once whatever the seeds."""


@dataclass(frozen=True)
class Options:
    """How to race.

    Attributes:
        folder: for volumes, runs and finished results; an absolute path.
        dataset_dir: a manifest or a folder that `read_manifest` takes; None for a synthetic specimen.
        minutes: of each training loop.
        seeds: a training of each contestant that learns, each.
        threads: CPU threads of every process.
        specimen_pattern: finds the specimen in a volume's name, where the manifest has none.
        val_specimens: specimens to judge on, where the manifest has no splits.
        tune_specimens: specimens to tune thresholds on, the same.
        train_on_tuned: whether all train on these too.
        bundle: ours.
        overlays: of its training, names or files.
        tune: whether `seg3d tune` is run.
        curve_steps: steps between states of our training that are judged, too, afterwards; None judges the end alone.
        stardist_python: interpreter that has StarDist; None for the environment that the race makes.
        is_quick: toy sizes, whose numbers mean nothing.
        restart: whether finished results are thrown away.
    """

    folder: Path
    dataset_dir: Path | None
    minutes: float
    seeds: tuple[int, ...]
    threads: int
    specimen_pattern: str
    val_specimens: tuple[str, ...]
    tune_specimens: tuple[str, ...]
    train_on_tuned: bool
    bundle: str
    overlays: tuple[str, ...]
    tune: bool
    curve_steps: int | None
    stardist_python: Path | None
    is_quick: bool
    restart: bool
