"""What the section `annotate` is told; it takes the data of --dataset_dir."""

import argparse
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class AnnotateOptions:
    """How to measure what annotating suggested regions gains.

    Attributes:
        start_specimens: training specimens whose labels are there from the beginning.
        start_volumes: volumes of each of them whose labels are there, drawn; 0 for all.
        start_minutes: minutes of the training on these.
        annotate_minutes: minutes that each training goes on.
        num_regions: regions to annotate.
        candidates: regions to choose from.
        repeats: seeds, each with its own draws and trainings.
        seed: the first of them.
        specimen_pattern: regular expression that finds the specimen in a volume's name, where the manifest has none.
        val_specimens: specimens to judge on, where the manifest has no splits.
        train_overlays: overlays of the trainings.
        predict_overlays: those of them that inference takes too.
    """

    start_specimens: int = 1
    start_volumes: int = 0
    start_minutes: float = 5.0
    annotate_minutes: float = 5.0
    num_regions: int = 10
    candidates: int = 100
    repeats: int = 1
    seed: int = 0
    specimen_pattern: str | None = None
    val_specimens: tuple[str, ...] = ()
    train_overlays: tuple[str, ...] = ()
    predict_overlays: tuple[str, ...] = ()


HELP = {
    "start_specimens": "training specimens with labels from the beginning, default 1",
    "start_volumes": "volumes of each of these specimens with labels, default all",
    "start_minutes": "minutes of the training on these, default 5",
    "annotate_minutes": "minutes that each training goes on, default 5",
    "num_regions": "regions to annotate, default 10",
    "candidates": "regions to choose from, default 100",
    "repeats": "seeds, each with its own draws and trainings, default 1",
    "seed": "the first seed, default 0",
    "specimen_pattern": "finds the specimen in a volume's name, where the manifest has none",
    "val_specimens": "specimens to judge on, where the manifest has no splits",
    "train_overlays": "overlays of maskrcnn3d for training",
    "predict_overlays": "those of them that inference takes too",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a group with an option for each attribute."""
    group = parser.add_argument_group("section annotate")
    for field in fields(AnnotateOptions):
        kinds = {"int": int, "float": float}
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "str")
        many = {"nargs": "+"} if isinstance(field.default, tuple) else {}
        group.add_argument(
            f"--{field.name}", type=kinds.get(kind, str), default=field.default, help=HELP[field.name], **many
        )


def from_arguments(arguments: argparse.Namespace) -> AnnotateOptions:
    """The options that were given.

    Raises:
        ValueError: a number is out of its range.
    """
    values = {field.name: getattr(arguments, field.name) for field in fields(AnnotateOptions)}
    for name in ("start_specimens", "start_minutes", "annotate_minutes", "num_regions", "candidates", "repeats"):
        if not values[name] > 0:
            raise ValueError(f"--{name} is {values[name]}; it must be more than 0")
    return AnnotateOptions(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
