"""Cells of a manifest out of a CSV, Parquet or JSON file, and into one.

Whatever the format, a row is a dict of the cells that are not empty, by column. Free columns of a CSV become numbers
where they read as such; in Parquet and JSON they have types already.

Must not know: what columns mean, volumes.
"""

import csv
import difflib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Cell = str | int | float | Mapping[Any, Any]
Rows = dict[str, dict[str, Cell]]
"""A row's cells by what messages call the row."""

SUFFIXES = (".csv", ".parquet", ".json")


def read_table(path: Path, required: str, known: Sequence[str], faults: list[str]) -> Rows:
    """Read a table of volumes.

    Args:
        path: a .parquet or .json file, anything else is read as CSV.
        required: the column that must be there.
        known: columns with a meaning; an unknown one that resembles one of them is a fault.
        faults: what is wrong with the header, or the number of cells, is added.

    Raises:
        ValueError: the file cannot be read as what its name says.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, required, known, faults)
    if path.suffix.lower() == ".json":
        return _read_json(path, required, known, faults)
    return _read_csv(path, required, known, faults)


def write_table(path: Path, rows: Sequence[Mapping[str, Cell]], known: Sequence[str]) -> None:
    """Write rows so that `read_table` gives them back; the file appears, or is replaced, in one step.

    Args:
        path: a .parquet or .json file, anything else is written as CSV.
        rows: cells by column; columns come in the order of their first cell.
        known: columns whose cells are read as text.

    Raises:
        ValueError: a CSV or Parquet file cannot hold a cell as it is.
    """
    header = list(dict.fromkeys(name for row in rows for name in row))
    suffix = path.suffix.lower()
    if suffix == ".json":
        content = (json.dumps([dict(row) for row in rows], indent=1, ensure_ascii=False) + "\n").encode()
    else:
        for row in rows:
            for name, cell in row.items():
                is_other = suffix != ".parquet" and name not in known and number_or_text(str(cell)) != cell
                if isinstance(cell, Mapping) or is_other:
                    raise ValueError(f"{path}: cannot hold {cell!r} of the column {name}; write a .json file")
        if suffix == ".parquet":
            columns = {name: [row.get(name) for row in rows] for name in header}
            try:
                table = pyarrow.table(columns)
            except pyarrow.ArrowException as error:
                raise ValueError(f"{path}: a column holds numbers and text ({error}); write a .json file") from None
            sink = io.BytesIO()
            pyarrow.parquet.write_table(table, sink)
            content = sink.getvalue()
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=header, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            content = text.getvalue().encode()
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_bytes(content)
    os.replace(partial, path)


def read_cells(path: Path) -> list[list[str]]:
    """Lines of a CSV that are not blank, each as its cells without the spaces around them.

    Raises:
        ValueError: the file is no CSV in UTF-8.
    """
    return [line for _, line in _lines(path)]


def number_or_text(cell: str) -> int | float | str:
    """A cell as an int or finite float where it reads as one, else as it is."""
    if "_" in cell:  # Python reads 1_2 as 12; in a table it is a name
        return cell
    for kind in (int, float):
        try:
            value = kind(cell)
        except ValueError:
            continue
        return value if abs(value) < float("inf") else cell
    return cell


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); save it as CSV UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: is not CSV ({error})") from None
    return [(number, line) for number, line in lines if any(line)]


def _read_csv(path: Path, required: str, known: Sequence[str], faults: list[str]) -> Rows:
    lines = _lines(path)
    if not lines:
        raise ValueError(f"{path}: is empty; the first line names the columns, {required} at least")
    header = lines[0][1]
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise ValueError(f"{path}: the header {header[0]!r} has one column; separate columns by commas")
    while header and not header[-1]:
        header.pop()
    if _has_faults(header, required, known, faults):
        return {}
    rows: Rows = {}
    for number, line in lines[1:]:
        if any(line[len(header) :]):
            faults.append(f"row {number}: has {len(line)} cells for {len(header)} columns; quote a cell with a comma")
        rows[f"row {number}"] = {
            name: cell if name in known or name == required else number_or_text(cell)
            for name, cell in zip(header, line, strict=False)
            if cell
        }
    return rows


def _read_parquet(path: Path, required: str, known: Sequence[str], faults: list[str]) -> Rows:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not Parquet ({error})") from None
    # pandas keeps its index as such a column.
    header = [name for name in table.column_names if not name.startswith("__index_level_")]
    if _has_faults(header, required, known, faults):
        return {}
    columns = {name: table[name].to_pylist() for name in header}
    rows: Rows = {}
    for number in range(table.num_rows):
        place = f"row {number + 1}"
        rows[place] = _typed({name: values[number] for name, values in columns.items()}, place, faults)
    return rows


def _read_json(path: Path, required: str, known: Sequence[str], faults: list[str]) -> Rows:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if isinstance(content, Mapping) and isinstance(content.get("volumes"), list):
        content = content["volumes"]
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
        raise ValueError(f'{path}: must hold a list of objects, [{{"image": ...}}, ...], or {{"volumes": [...]}}')
    if _has_faults(list(dict.fromkeys(name for entry in content for name in entry)), required, known, faults):
        return {}
    places = [f"row {number}" for number in range(1, len(content) + 1)]
    return {place: _typed(entry, place, faults) for place, entry in zip(places, content, strict=True)}


def _typed(entry: Mapping[str, Any], place: str, faults: list[str]) -> dict[str, Cell]:
    """The cells that are not empty; truth values become 0 and 1."""
    cells: dict[str, Cell] = {}
    for name, value in entry.items():
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if isinstance(value, str):
            value = value.strip()
            if not value:
                continue
        if isinstance(value, bool):
            value = int(value)
        if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):  # a map, as pyarrow gives it
            value = dict(value)
        if isinstance(value, str | int | float) or (name == "classes" and isinstance(value, Mapping)):
            cells[name] = value
        else:
            faults.append(f"{place}, {name}: {value!r} is neither a number nor text; write one of them")
    return cells


def _has_faults(header: Sequence[str], required: str, known_columns: Sequence[str], faults: list[str]) -> bool:
    """Whether the header is at fault, which would only repeat itself in every row; the faults are added."""
    found = [f"header: column {number} has no name" for number, name in enumerate(header, start=1) if not name]
    found += [
        f"header: column {name!r} occurs twice" for name in sorted(set(header)) if name and header.count(name) > 1
    ]
    missing = [name for name in (required, *known_columns) if name not in header]
    suggested: set[str] = set()
    for name in header:
        if name in known_columns or name == required or name.startswith("quality_") or len(name) < 4:
            continue
        # A free column may resemble a known one that is there as well (label, label_source).
        close = [known for known in missing if known == name.casefold()]
        close = close or difflib.get_close_matches(name.casefold(), missing, n=1, cutoff=0.75)
        if "class" in header or "classes" in header:
            close = [known for known in close if known not in ("class", "classes")]
        if close:
            suggested.add(close[0])
            found.append(f"header: column {name!r} is unknown; did you mean {close[0]!r}? (else name it differently)")
    if required not in header and required not in suggested:
        found.append(f"header: column {required!r} is missing among {list(header)}; add it")
    faults += found
    return bool(found)
