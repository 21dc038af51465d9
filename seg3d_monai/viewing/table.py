"""The object table as a viewer shows it: read and checked, its objects as points, a column as colours.

It must not know volumes or napari.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CENTROID = ["centroid_z", "centroid_y", "centroid_x"]
GREY = (0.5, 0.5, 0.5, 1.0)
"""Of objects without a value."""
MOST_KINDS = 20
"""Integers of so few values are kinds, each with a colour of its own."""
_STEPS = 250  # colours of a scale: napari takes few colours faster than many


@dataclass(frozen=True)
class Colors:
    """Objects' colours.

    rgba: [N, 4], 0 to 1.
    text: what they mean, for instance "score 0.31 to 0.99".
    """

    rgba: np.ndarray
    text: str


def read_table(path: Path, beside: Path | None = None) -> pd.DataFrame:
    """Read an object table, one row an object.

    Args:
        path: .parquet or .csv with `id` and the centroids, as `seg3d predict` writes it; or with `id` and any other
            columns, such as measurements, where `beside` has the centroids.
        beside: the prediction's own table, None without one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or columns are missing.
    """
    table = _read(path)
    if "id" not in table:
        raise ValueError(f"{path}: the table has no column id; it has {', '.join(map(str, table.columns)) or 'none'}")
    if not set(CENTROID) <= set(table) and beside is not None and path.absolute() != beside.absolute():
        own = _read(beside)
        if {"id", *CENTROID} <= set(own):
            new = [name for name in table if name == "id" or name not in own]
            table = own.merge(table[new], on="id", how="left")
    return check_table(table, str(path))


def check_table(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """See that a table has whole numbers as `id` and finite centroids, and give it back.

    Args:
        table: of objects.
        name: what to call it in messages.

    Raises:
        ValueError: it has not.
    """
    needed = ["id", *CENTROID]
    missing = [column for column in needed if column not in table]
    if missing:
        raise ValueError(
            f"{name}: the table has no column {' and no '.join(missing)}; give one with {', '.join(needed)} (voxels), "
            "as seg3d predict writes it"
        )
    for column in needed:
        numbers = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
        if not np.isfinite(numbers).all() or (column == "id" and (numbers != np.floor(numbers)).any()):
            raise ValueError(f"{name}: column {column} of the table holds something else than numbers")
    return table


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"table {str(path)!r} does not exist; check the path")
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"table {str(path)!r} is neither .parquet nor .csv")
    try:
        found: pd.DataFrame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError) as error:  # of pyarrow and of pandas' parser
        raise ValueError(f"table {str(path)!r} cannot be read: {error}") from error
    return found


def check_column(table: pd.DataFrame, column: str) -> None:
    """See that a table has a column.

    Raises:
        ValueError: it has not; the nearest one is named.
    """
    if column in table:
        return
    names = [str(name) for name in table]
    close = difflib.get_close_matches(column, names, n=1)
    mend = f"did you mean {close[0]}?" if close else f"choose from: {', '.join(names)}"
    raise ValueError(f"--color_by {column}: the table has no such column; {mend}")


def column_colors(values: pd.Series) -> Colors:
    """Colours of a column's values: a scale for numbers, dark is low; one colour a kind for anything else.

    Args:
        values: [N], truth values, text, integers of few values, or numbers.
    """
    from matplotlib import colormaps

    is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    rgba = np.tile(np.array(GREY), (len(values), 1))
    if is_number and not (pd.api.types.is_integer_dtype(values) and values.nunique() <= MOST_KINDS):
        numbers = values.to_numpy(float, na_value=np.nan)
        known = np.isfinite(numbers)
        if not known.any():
            return Colors(rgba, f"{values.name}, no value")
        low, high = float(numbers[known].min()), float(numbers[known].max())
        share = (numbers[known] - low) / ((high - low) or 1.0)
        rgba[known] = colormaps["viridis"](np.rint(share * _STEPS) / _STEPS)
        return Colors(rgba, f"{values.name} {low:.4g} to {high:.4g}")
    codes, kinds = pd.factorize(values, sort=True)
    rgba[codes >= 0] = colormaps["tab20"](codes[codes >= 0] % 20)
    shown = ", ".join(str(kind) for kind in kinds[:5]) + (" …" if len(kinds) > 5 else "")
    return Colors(rgba, f"{values.name} {shown}".strip())


def median_diameter(table: pd.DataFrame, spacing: Sequence[float]) -> float | None:
    """Median diameter of balls of the objects' volumes, in voxels along x; None where volumes are unknown.

    Args:
        table: of objects.
        spacing: (z, y, x) of a voxel.
    """
    if "volume_voxels" not in table or not len(table):
        return None
    volume = float(table["volume_voxels"].median()) * float(np.prod(spacing))
    return float(np.cbrt(6 * volume / np.pi) / spacing[2]) if volume > 0 else None


def read_seams(path: Path) -> pd.DataFrame:
    """The places where the two answers of `seg3d seam-check` disagree.

    Args:
        path: its report, X.json.

    Returns:
        kind, at_face, iou, shift, first_ids, second_ids (text) and `CENTROID`, voxels; one row a place.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such report.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--seam_report {str(path)!r} does not exist; check the path")
    try:
        cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["disagreements"]
        rows = [
            {name: cell[name] for name in ("kind", "at_face", "iou", "shift")}
            | {name: " ".join(map(str, cell[name])) for name in ("first_ids", "second_ids")}
            | dict(zip(CENTROID, map(float, cell["centroid"]), strict=True))
            for cell in cells
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--seam_report {str(path)!r} is no report of seg3d seam-check ({error!r}); give its X.json"
        ) from error
    names = ["kind", "at_face", "iou", "shift", "first_ids", "second_ids", *CENTROID]
    return pd.DataFrame(rows, columns=names)
