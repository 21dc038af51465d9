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
    """

    folder: Path
    threads: int
    is_quick: bool
