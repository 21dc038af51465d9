"""What every section is told."""

from dataclasses import dataclass, field
from pathlib import Path

from bench.data.annotate_options import AnnotateOptions


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        folder: for volumes and indices, an absolute path.
        threads: CPU threads of torch, where a section does not set its own.
        is_quick: tiny sizes, whose numbers mean nothing.
        dataset_dir: data to plan for or to annotate, None for a specimen.
        annotate: how to measure a gain by annotation.
        plan_minutes: minutes of each training that compares a plan with settings by hand; 0 for none.
        hand_overlays: overlays that hold those settings, and the data's split.
    """

    folder: Path
    threads: int
    is_quick: bool
    dataset_dir: Path | None = None
    annotate: AnnotateOptions = field(default_factory=AnnotateOptions)
    plan_minutes: float = 0.0
    hand_overlays: tuple[str, ...] = ()
