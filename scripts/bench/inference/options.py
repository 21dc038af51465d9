"""What every section is told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        folder: for stacks and outputs, an absolute path.
        checkpoint: weights of bundles/maskrcnn3d; None leaves the network as it is made.
        threads: CPU threads of torch.
        is_quick: tiny sizes, whose numbers mean nothing.
    """

    folder: Path
    checkpoint: Path | None
    threads: int
    is_quick: bool
