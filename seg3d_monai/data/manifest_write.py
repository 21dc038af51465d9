"""Rows of manifests back into a file: one's own volumes, synthetic and unlabelled ones as one data set.

Must not know: SQLite, how volumes are stored.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from seg3d_monai.data.manifest import FILE_COLUMNS, KNOWN_COLUMNS, SPACING_COLUMNS, Location, ManifestRow, conflicts
from seg3d_monai.data.manifest_tables import Cell, write_table


def write_manifest(path: str | os.PathLike[str], rows: Sequence[ManifestRow]) -> Path:
    """Write rows, from one manifest or several, as a manifest; `read_manifest` gives them back.

    Args:
        path: a .csv, .parquet or .json file; replaced if it is there. Files in its folder or below are written relative
            to it, others with their whole path.
        rows: at least one; names are unique over all of them, and no specimen is in two splits.

    Returns:
        The path.

    Raises:
        ValueError: rows contradict each other (all faults are listed), or the format cannot hold a cell: a CSV or
            Parquet file no table of classes, a CSV no word that reads as a number.
    """
    path = Path(path)
    faults = conflicts(rows) if rows else ["there is none; give a row per volume"]
    if faults:
        raise ValueError(f"{path}: {len(faults)} fault(s) in the rows:\n" + "\n".join(f"  {f}" for f in faults))
    write_table(path, [_cells(row, path.absolute().parent) for row in rows], KNOWN_COLUMNS)
    return path


def _cells(row: ManifestRow, folder: Path) -> dict[str, Cell]:
    cells: dict[str, Cell | None] = {"name": row.name}
    cells |= {column: _written(getattr(row, column), folder) for column in FILE_COLUMNS}
    cells |= {"axes": row.axes}
    cells |= dict(zip(SPACING_COLUMNS, row.spacing_um or (None, None, None), strict=True))
    cells |= {"specimen": row.specimen, "split": row.split}
    if isinstance(row.classes, Mapping):
        cells["classes"] = {str(number): kind for number, kind in row.classes.items()}
    elif row.label is not None:
        cells["class"] = row.classes
    cells |= row.attributes
    return {column: cell for column, cell in cells.items() if cell is not None}


def _written(place: Location | None, folder: Path) -> str | None:
    """A path as a manifest in a folder gives it."""
    if place is None or (isinstance(place, str) and "://" in place):
        return place
    path = Path(place).absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
