"""Manifests: which volumes there are, their labels, specimen, split, classes and voxel size.

A manifest is a CSV, Parquet or JSON file, a folder with `manifest.csv` (or .parquet, .json), or a folder of
`NAME/image.tif` + `NAME/labels.tif`. Files are opened for their shape and type only. Every fault is reported at once,
with its row, column, value and mend. A specimen (embryo, brain, animal) is the unit of a split: it is never in two, or
validation would have seen its cells.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from seg3d_monai.data.filters import Column, Filter, Kind, Table, Value
from seg3d_monai.data.manifest_tables import SUFFIXES, Cell, Rows, number_or_text, read_cells, read_table
from seg3d_monai.data.volume import Spacing, Volume, check_spacing, open_volume

SPLITS = ("train", "val", "test")
SPACING_COLUMNS = ("spacing_z_um", "spacing_y_um", "spacing_x_um")
FILE_COLUMNS = ("image", "label", "ignore")
KNOWN_COLUMNS = (*FILE_COLUMNS, "name", "axes", *SPACING_COLUMNS, "specimen", "split", "class", "classes")
VOLUME_SUFFIXES = (".tif", ".tiff", ".ome.tif", ".ome.tiff", ".zarr", ".ome.zarr", ".nii", ".nii.gz")
LAYOUT = "NAME/image.tif with NAME/labels.tif (or .zarr, .nii)"

Location = Path | str
"""A file or folder; a URL or a pattern of file names is a str."""


@dataclass(frozen=True)
class ManifestRow:
    """One volume.

    Attributes:
        name: unique in the manifest.
        image: the image.
        label: the label volume, None where there is none.
        axes: the image's axes as `open_volume` takes them, None where the file says.
        spacing_um: micrometres per voxel (z, y, x) from the manifest or else from the file, None when unknown.
        specimen: what the volume is a part of.
        split: train, val or test; None when not assigned.
        classes: one class for all instances, or a table label id -> class.
        attributes: quality_* (floats) and free columns (int, float or str); empty cells are left out.
        ignore: a volume whose voxels other than 0 are ignored, None where there is none.
    """

    name: str
    image: Location
    label: Location | None
    axes: str | None
    spacing_um: Spacing | None
    specimen: str
    split: str | None
    classes: int | dict[int, int]
    attributes: dict[str, str | float | int] = field(default_factory=dict)
    ignore: Location | None = None

    def open_image(self) -> Volume:
        """Open the image with the manifest's axes and spacing."""
        return open_volume(self.image, axes=self.axes, spacing=self.spacing_um)

    def open_label(self) -> Volume:
        """Open the label volume: one channel, of the image's (z, y, x).

        Raises:
            ValueError: the row has no label.
        """
        if self.label is None:
            raise ValueError(f"{self.name}: has no label; fill the column label")
        return self._open_beside(self.label)

    def open_ignore(self) -> Volume | None:
        """Open the mask of voxels to ignore, None without one: one channel, of the image's (z, y, x)."""
        return None if self.ignore is None else self._open_beside(self.ignore)

    def _open_beside(self, path: Location) -> Volume:
        # The row's axes describe the image, which may have channels; other volumes follow its order of z, y, x.
        spatial = "".join(letter for letter in (self.axes or "").upper() if letter in "ZYX")
        return open_volume(path, axes=spatial if spatial not in ("", "ZYX") else None, spacing=self.spacing_um)


@dataclass(frozen=True)
class Manifest:
    """The volumes of one data set.

    Attributes:
        path: the file or the folder that was read.
        rows: at least one volume, in the order of the file (of the names where a folder was read).
        digest: of the file's bytes, None where a folder was read.
    """

    path: Path
    rows: tuple[ManifestRow, ...]
    digest: str | None = None

    @property
    def file(self) -> Path:
        """The file that was read, or the folder."""
        return _file_of(self.path)


def read_manifest(path: str | os.PathLike[str], *, specimen_pattern: str | None = None) -> Manifest:
    """Read and check a manifest.

    Args:
        path: a CSV, Parquet or JSON file (image, label, ignore, name, axes, spacing_z_um, spacing_y_um, spacing_x_um,
            specimen, split, class or classes, quality_*, anything else; paths relative to the file; JSON is a list of
            objects), a folder that holds manifest.csv, .parquet or .json, or a folder of NAME/image.tif and
            NAME/labels.tif, where an index.csv with a column `volume` may give the spacing and other columns of each
            NAME. Rows count from 1 in Parquet and JSON, lines of the file in CSV.
        specimen_pattern: regular expression searched in the name of a volume without a specimen; its first group (all
            of the match without one) is the specimen. None takes the name itself.

    Returns:
        The volumes, each with readable files and matching shapes.

    Raises:
        FileNotFoundError: there is nothing at path.
        ValueError: the pattern or anything in the manifest is at fault; all faults are listed.
    """
    path = Path(path)
    pattern = None
    if specimen_pattern is not None:
        try:
            pattern = re.compile(specimen_pattern)
        except re.error as error:
            raise ValueError(f"specimen_pattern={specimen_pattern!r} is no regular expression ({error})") from None
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    faults: list[str] = []
    file = _file_of(path)
    digest = file_digest(file)
    if file.is_dir():
        cells, folder = _discover(file, faults), file
    else:
        cells, folder = read_table(file, "image", KNOWN_COLUMNS, faults), file.parent
    rows: list[ManifestRow] = []
    for place, row in cells.items():
        parsed = _parse_row(row, place, folder, pattern, faults)
        if parsed is not None:
            rows.append(parsed)
    faults += conflicts(rows)
    if faults:
        raise ValueError(f"{path}: {len(faults)} fault(s) in the manifest:\n" + "\n".join(f"  {f}" for f in faults))
    if not rows:
        raise ValueError(f"{path}: lists no volume; a row per volume is needed")
    return Manifest(path=path, rows=tuple(rows), digest=digest)


def location(text: str, folder: Path = Path()) -> Location:
    """A path, relative to a folder; a URL or a pattern of file names ("stack/*.tif") as a str."""
    if "://" in text:
        return text
    path = folder / Path(text).expanduser()
    return str(path) if any(letter in path.name for letter in "*?[") and not path.exists() else path


def file_digest(path: Path) -> str | None:
    """Digest of a file's bytes, None for a folder."""
    return None if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def select_rows(rows: Sequence[ManifestRow], where: str | None) -> tuple[ManifestRow, ...]:
    """Rows that match a filter over the columns of the manifest.

    Args:
        rows: of a manifest.
        where: such as ``quality_image >= 2 and split != "test"``; None takes all.

    Raises:
        ValueError: for a filter that makes no sense, and when no row matches.
    """
    if where is None or not where.strip():
        return tuple(rows)
    values: dict[str, list[Value | None]] = {
        name: [_text(getattr(row, name)) for row in rows] for name in ("name", "specimen", "split", *FILE_COLUMNS)
    }
    for axis, name in enumerate(SPACING_COLUMNS):
        values[name] = [None if row.spacing_um is None else row.spacing_um[axis] for row in rows]
    columns = {name: Column("number" if name in SPACING_COLUMNS else "text") for name in values}
    for name in sorted({name for row in rows for name in row.attributes} - set(columns)):
        values[name] = [row.attributes.get(name) for row in rows]
        kinds: set[Kind] = {"text" if isinstance(v, str) else "number" for v in values[name] if v is not None}
        columns[name] = Column(kinds.pop() if len(kinds) == 1 else "any")
    found = Filter(where, columns)(Table(values, {}, [1] * len(rows)))
    if not found.any():
        raise ValueError(f"where={where!r} leaves no volume of {len(rows)}; loosen it")
    return tuple(row for row, is_match in zip(rows, found, strict=True) if is_match)


def leaks(rows: Sequence[ManifestRow]) -> list[str]:
    """Specimens that are in more than one split, each with its volumes by split."""
    members: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        # A volume without labels and without a split is never trained or judged on.
        if row.split is not None or row.label is not None:
            members.setdefault(row.specimen, {}).setdefault(row.split or "no split", []).append(row.name)
    found: list[str] = []
    for specimen, by_split in members.items():
        if len(by_split) > 1:
            where = "; ".join(f"{split}: {', '.join(names)}" for split, names in by_split.items())
            found.append(f"specimen {specimen!r} is in {len(by_split)} splits ({where}); put all of it in one")
    return found


def _file_of(path: Path) -> Path:
    """The table that a folder holds, or the path itself."""
    files = [path / f"manifest{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), path) if path.is_dir() else path


def _discover(folder: Path, faults: list[str]) -> Rows:
    """Cells as if from a table for every NAME/image.* of a folder, joined with its index.csv."""
    index: dict[str, dict[str, Cell]] = {}
    if (folder / "index.csv").is_file():
        index_faults: list[str] = []
        table = read_table(folder / "index.csv", "volume", KNOWN_COLUMNS, index_faults)
        # Another kind of index (without the column volume) has nothing to say here.
        if any("volume" in row for row in table.values()):
            faults += [f"index.csv, {fault}" for fault in index_faults]
            index = {str(row["volume"]): row for row in table.values() if "volume" in row}
    cells: Rows = {}
    for child in sorted(child for child in folder.iterdir() if child.is_dir()):
        found: dict[str, Cell] = {}
        for column, stems in (("image", ("image",)), ("label", ("labels", "label")), ("ignore", ("ignore",))):
            paths = [child / f"{stem}{suffix}" for stem in stems for suffix in VOLUME_SUFFIXES]
            paths = [path for path in paths if path.exists()]
            if len(paths) > 1:
                faults.append(f"{child.name}: two files for the {column}: {', '.join(p.name for p in paths)}; keep one")
            if paths:
                found[column] = str(paths[0].absolute())
        if "image" in found:
            row = {k: v for k, v in index.get(child.name, {}).items() if k not in ("volume", "z", "y", "x")}
            cells[child.name] = {**row, **found, "name": child.name}
    if not cells:
        raise ValueError(f"{folder}: holds neither manifest.csv nor volumes laid out as {LAYOUT}")
    return cells


def _parse_row(
    cells: Mapping[str, Cell], place: str, folder: Path, pattern: re.Pattern[str] | None, faults: list[str]
) -> ManifestRow | None:
    """Turn one row's cells into a `ManifestRow`; None, with its faults appended, when it is not sound."""
    before = len(faults)
    texts = {column: str(cell) for column, cell in cells.items() if not isinstance(cell, Mapping)}
    if "image" not in texts:
        faults.append(f"{place}, image: is empty; give the path of the image")
        return None
    paths = {column: location(texts[column], folder) for column in FILE_COLUMNS if column in texts}
    for column, path in paths.items():
        if isinstance(path, Path) and not path.exists():
            faults.append(f"{place}, {column}: {texts[column]!r} is not there; paths are relative to {folder}")
    name = texts.get("name") or _default_name(paths["image"])
    spacing_um = _parse_spacing(texts, place, faults)
    split = texts.get("split")
    if split is not None and split not in SPLITS:
        close = difflib.get_close_matches(split.casefold(), (*SPLITS, "validation"), n=1)
        mend = f"did you mean {close[0].replace('validation', 'val')!r}?" if close else "use train, val or test"
        faults.append(f"{place}, split: {split!r} is unknown; {mend}")
    attributes: dict[str, str | float | int] = {}
    for column, cell in cells.items():
        if column in KNOWN_COLUMNS or isinstance(cell, Mapping):
            continue
        attributes[column] = cell
        if column.startswith("quality_"):
            if isinstance(cell, str):
                faults.append(f"{place}, {column}: {cell!r} is no number; quality columns hold numbers or nothing")
            else:
                attributes[column] = float(cell)
    row = ManifestRow(
        name=name,
        image=paths["image"],
        label=paths.get("label"),
        axes=texts.get("axes"),
        spacing_um=spacing_um,
        specimen=_parse_specimen(texts, name, place, pattern, faults),
        split=split,
        classes=_parse_classes(cells, place, folder, faults),
        attributes=attributes,
        ignore=paths.get("ignore"),
    )
    if all(path.exists() for path in paths.values() if isinstance(path, Path)):
        row = _with_file_facts(row, place, faults)
    return row if len(faults) == before else None


def _default_name(image: Location) -> str:
    name = str(image).rstrip("/").rsplit("/", 1)[-1]
    for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    if name.lower() not in ("image", "img", "raw"):
        return name
    return image.absolute().parent.name if isinstance(image, Path) else image.rstrip("/").rsplit("/", 2)[-2]


def _parse_spacing(cells: Mapping[str, str], place: str, faults: list[str]) -> Spacing | None:
    given = [cells[column] for column in SPACING_COLUMNS if column in cells]
    if not given:
        return None
    if len(given) < 3:
        missing = [column for column in SPACING_COLUMNS if column not in cells]
        faults.append(f"{place}, {missing[0]}: is empty while others are not; give all three spacings or none")
        return None
    values = []
    for column in SPACING_COLUMNS:
        value = number_or_text(cells[column])
        if isinstance(value, str) or not 0 < value < float("inf"):
            faults.append(f"{place}, {column}: {cells[column]!r} must be a positive number, micrometres per voxel")
        else:
            values.append(value)
    return check_spacing(values) if len(values) == 3 else None


def _parse_specimen(
    cells: Mapping[str, str], name: str, place: str, pattern: re.Pattern[str] | None, faults: list[str]
) -> str:
    if "specimen" in cells:
        return cells["specimen"]
    if pattern is None:
        return name
    match = pattern.search(name)
    specimen = match.group(1 if pattern.groups else 0) if match else None
    if not specimen:
        faults.append(f"{place}, specimen: {pattern.pattern!r} finds none in the name {name!r}; mend the pattern")
        return name
    return specimen


def _parse_classes(cells: Mapping[str, Cell], place: str, folder: Path, faults: list[str]) -> int | dict[int, int]:
    if "class" in cells and "classes" in cells:
        faults.append(f"{place}, class: is given along with classes; keep one of them")
        return 0
    if "class" in cells:
        number = _count(cells["class"])
        if number is None:
            faults.append(f"{place}, class: {str(cells['class'])!r} must be an integer from 0")
        return number or 0
    table = cells.get("classes")
    if table is None:
        return 0
    if isinstance(table, Mapping):
        return _class_table(
            [(f"entry {key!r}", [key, value]) for key, value in table.items()], f"{place}, classes:", faults
        )
    path = folder / Path(str(table)).expanduser()
    where = f"{place}, classes: {str(table)!r}"
    if not path.is_file():
        faults.append(f"{where} is not there; paths are relative to {folder}")
        return 0
    try:
        lines = read_cells(path)
    except ValueError as error:
        faults.append(f"{where} cannot be read ({error})")
        return 0
    if not lines or lines[0][:2] != ["id", "class"]:
        faults.append(f"{where} must start with the columns id,class")
        return 0
    return _class_table([(f"row {number}", line) for number, line in enumerate(lines[1:], start=2)], where, faults)


def _class_table(entries: Sequence[tuple[str, Sequence[object]]], where: str, faults: list[str]) -> dict[int, int]:
    classes: dict[int, int] = {}
    for place, cells in entries:
        numbers = [_count(cell) for cell in cells[:2]]
        if len(numbers) < 2 or numbers[0] is None or numbers[1] is None or numbers[0] == 0:
            faults.append(f"{where} {place}: {list(cells)} must be an id from 1, a class from 0")
        elif numbers[0] in classes:
            faults.append(f"{where} {place}: id {numbers[0]} occurs twice")
        else:
            classes[numbers[0]] = numbers[1]
    return classes


def _count(cell: object) -> int | None:
    """A number from 0, None where it is none; columns of integers with gaps are floats in Parquet."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = str(cell).strip()
    return int(text) if text.isdecimal() and text.isascii() else None


def _with_file_facts(row: ManifestRow, place: str, faults: list[str]) -> ManifestRow:
    """Check the files' shapes and types against each other, and take a missing spacing from the image."""
    try:
        image = row.open_image()
    except (ValueError, TypeError, OSError) as error:
        faults.append(f"{place}, image: {error}")
        return row
    if row.spacing_um is None and image.spacing_um is not None:
        row = replace(row, spacing_um=image.spacing_um)
    for column in ("label", "ignore"):
        try:
            volume = row.open_label() if column == "label" and row.label is not None else None
            volume = row.open_ignore() if column == "ignore" else volume
        except (ValueError, TypeError, OSError) as error:
            faults.append(f"{place}, {column}: {error}")
            continue
        if volume is None:
            continue
        path = getattr(row, column)
        if column == "label":
            faults += [f"{place}, {fault}" for fault in _label_faults(row, volume.dtype)]
        elif volume.dtype.kind not in "biu":
            faults.append(f"{place}, ignore: {path} holds {volume.dtype} voxels; a mask holds integers or truth values")
        if volume.shape[0] != 1:
            kind = "a label volume" if column == "label" else "a mask"
            faults.append(f"{place}, {column}: {path} has {volume.shape[0]} channels; {kind} has one")
        if volume.shape[1:] != image.shape[1:]:
            faults.append(
                f"{place}, {column}: {path} has shape (z, y, x) = {volume.shape[1:]} and the image {row.image} has "
                f"{image.shape[1:]}; they must be equal"
            )
    return row


def _label_faults(row: ManifestRow, dtype: np.dtype) -> list[str]:
    if dtype.kind not in "iu":
        mend = "number the objects" if dtype.kind == "b" else "convert it to uint16 or uint32"
        return [f"label: {row.label} holds {dtype} voxels; labels are integers, {mend}"]
    ignore = int(np.iinfo(dtype).max)
    above = [number for number in row.classes if number >= ignore] if isinstance(row.classes, dict) else []
    if above:
        shown = f"{above[:5]}{' …' if len(above) > 5 else ''}"
        return [
            f"classes: ids {shown} do not fit {row.label}, whose {dtype} holds ids below {ignore}, which is ignore; "
            "write the labels with more bits"
        ]
    return []


def conflicts(rows: Sequence[ManifestRow]) -> list[str]:
    """Faults between rows: names or files used twice, and specimens in more than one split."""
    faults: list[str] = []
    first_by_name: dict[str, ManifestRow] = {}
    first_by_file: dict[object, ManifestRow] = {}
    for row in rows:
        if row.name in first_by_name:
            faults.append(f"name: {row.name!r} is used for {first_by_name[row.name].image} and {row.image}; rename one")
        first_by_name.setdefault(row.name, row)
        for column in ("image", "label"):
            path = getattr(row, column)
            if path is None:
                continue
            first = first_by_file.setdefault((column, _same_file_key(path)), row)
            if first is not row and column == "image":
                faults.append(f"image: {path} is listed twice, as {first.name!r} and {row.name!r}; remove one")
            elif first is not row and first.specimen != row.specimen:
                # Two stains of one specimen may share their labels.
                faults.append(
                    f"label: {path} is listed twice, for {first.name!r} of specimen {first.specimen!r} and for "
                    f"{row.name!r} of {row.specimen!r}; give both the same specimen, or remove one"
                )
    return faults + [f"split: {leak}" for leak in leaks(rows)]


def _same_file_key(path: Location) -> object:
    """Equal for two paths of one file, whatever links lead to it."""
    if isinstance(path, str):
        return path
    found = path.stat()
    return (found.st_dev, found.st_ino) if found.st_ino else path.resolve()


def _text(value: object) -> str | None:
    return None if value is None else str(value)
