"""What every section is told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        folder: for volumes and indices, an absolute path.
        threads: CPU threads of torch, where a section does not set its own.
        is_quick: tiny sizes, whose numbers mean nothing.
        dataset_dir: data to plan for, None for a specimen.
        plan_minutes: minutes of each training that compares a plan with settings by hand; 0 for none.
        hand_overlays: overlays that hold those settings, and the data's split.
    """

    folder: Path
    threads: int
    is_quick: bool
    dataset_dir: Path | None = None
    plan_minutes: float = 0.0
    hand_overlays: tuple[str, ...] = ()
