"""What the tests of conversions share."""

import hashlib
from pathlib import Path

SMALL = {"chunk_size": [4, 64, 64], "shard_size": [8, 128, 192]}
"""Chunks and files of which even a small stack has several."""


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
