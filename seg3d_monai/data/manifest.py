"""Manifests: which volumes there are, their labels, specimen, split, classes and voxel size.

A manifest is a CSV file, a folder with `manifest.csv`, or a folder of `NAME/image.tif` + `NAME/labels.tif`. Files are
opened for their shape and type only. Every fault is reported at once, with its row, column, value and mend.
A specimen (embryo, brain, animal) is the unit of a split: it is never in two, or validation would have seen its cells.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from seg3d_monai.data.volume import Spacing, Volume, check_spacing, open_volume

SPLITS = ("train", "val", "test")
SPACING_COLUMNS = ("spacing_z_um", "spacing_y_um", "spacing_x_um")
KNOWN_COLUMNS = ("image", "label", "name", "axes", *SPACING_COLUMNS, "specimen", "split", "class", "classes")
VOLUME_SUFFIXES = (".tif", ".tiff", ".ome.tif", ".ome.tiff", ".zarr", ".ome.zarr", ".nii", ".nii.gz")
LAYOUT = "NAME/image.tif with NAME/labels.tif (or .zarr, .nii)"


@dataclass(frozen=True)
class ManifestRow:
    """One volume.

    Attributes:
        name: unique in the manifest.
        image: path of the image.
        label: path of the label volume, None where there is none.
        axes: the image's axes as `open_volume` takes them, None where the file says.
        spacing_um: micrometres per voxel (z, y, x) from the manifest or else from the file, None when unknown.
        specimen: what the volume is a part of.
        split: train, val or test; None when not assigned.
        classes: one class for all instances, or a table label id -> class.
        attributes: quality_* (floats) and free columns (int, float or str); empty cells are left out.
    """

    name: str
    image: Path
    label: Path | None
    axes: str | None
    spacing_um: Spacing | None
    specimen: str
    split: str | None
    classes: int | dict[int, int]
    attributes: dict[str, str | float | int] = field(default_factory=dict)

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
        return _open_label(self.label, self.axes, self.spacing_um)


@dataclass(frozen=True)
class Manifest:
    """The volumes of one data set.

    Attributes:
        path: the CSV file or the folder that was read.
        rows: at least one volume, in the order of the file (of the names where a folder was read).
    """

    path: Path
    rows: tuple[ManifestRow, ...]


def read_manifest(path: str | os.PathLike[str], *, specimen_pattern: str | None = None) -> Manifest:
    """Read and check a manifest.

    Args:
        path: a CSV file (image, label, name, axes, spacing_z_um, spacing_y_um, spacing_x_um, specimen, split, class or
            classes, quality_*, anything else; paths relative to the file), a folder that holds manifest.csv, or a
            folder of NAME/image.tif and NAME/labels.tif, where an index.csv with a column `volume` may give the spacing
            and other columns of each NAME.
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
    if path.is_dir() and not (path / "manifest.csv").is_file():
        cells, folder = _discover(path, faults), path
    else:
        file = path / "manifest.csv" if path.is_dir() else path
        cells, folder = _read_csv(file, "image", faults), file.parent
    rows: list[ManifestRow] = []
    # A header at fault would only repeat itself in every row.
    for place, row in {} if faults else cells.items():
        parsed = _parse_row(row, place, folder, pattern, faults)
        if parsed is not None:
            rows.append(parsed)
    faults += _conflicts(rows)
    if faults:
        raise ValueError(f"{path}: {len(faults)} fault(s) in the manifest:\n" + "\n".join(f"  {f}" for f in faults))
    if not rows:
        raise ValueError(f"{path}: lists no volume; a line per volume below the header is needed")
    return Manifest(path=path, rows=tuple(rows))


def _read_csv(path: Path, required: str, faults: list[str]) -> dict[str, dict[str, str]]:
    """The cells of every row that is not blank, by a name of the row for messages; empty cells are left out."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); save it as CSV UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: is not CSV ({error})") from None
    lines = [(number, line) for number, line in lines if any(line)]
    if not lines:
        raise ValueError(f"{path}: is empty; the first line names the columns, {required} at least")
    header = lines[0][1]
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise ValueError(f"{path}: the header {header[0]!r} has one column; separate columns by commas")
    while header and not header[-1]:
        header.pop()
    faults.extend(_header_faults(header, required))
    rows: dict[str, dict[str, str]] = {}
    for number, line in lines[1:]:
        if any(line[len(header) :]):
            faults.append(f"row {number}: has {len(line)} cells for {len(header)} columns; quote a cell with a comma")
        rows[f"row {number}"] = {name: cell for name, cell in zip(header, line, strict=False) if cell}
    return rows


def _header_faults(header: list[str], required: str) -> list[str]:
    faults = [f"header: column {number} has no name" for number, name in enumerate(header, start=1) if not name]
    faults += [
        f"header: column {name!r} occurs twice" for name in sorted(set(header)) if name and header.count(name) > 1
    ]
    missing = [name for name in (required, *KNOWN_COLUMNS) if name not in header]
    suggested: set[str] = set()
    for name in header:
        if name in KNOWN_COLUMNS or name == required or name.startswith("quality_") or len(name) < 4:
            continue
        # A free column may resemble a known one that is there as well (label, label_source).
        close = [known for known in missing if known == name.casefold()]
        close = close or difflib.get_close_matches(name.casefold(), missing, n=1, cutoff=0.75)
        if "class" in header or "classes" in header:
            close = [known for known in close if known not in ("class", "classes")]
        if close:
            suggested.add(close[0])
            faults.append(f"header: column {name!r} is unknown; did you mean {close[0]!r}? (else name it differently)")
    if required not in header and required not in suggested:
        faults.append(f"header: column {required!r} is missing among {header}; add it")
    return faults


def _discover(folder: Path, faults: list[str]) -> dict[str, dict[str, str]]:
    """Cells as if from a CSV for every NAME/image.* of a folder, joined with its index.csv."""
    index: dict[str, dict[str, str]] = {}
    if (folder / "index.csv").is_file():
        index_faults: list[str] = []
        table = _read_csv(folder / "index.csv", "volume", index_faults)
        # Another kind of index (without the column volume) has nothing to say here.
        if any("volume" in row for row in table.values()):
            faults += [f"index.csv, {fault}" for fault in index_faults]
            index = {row["volume"]: row for row in table.values() if "volume" in row}
    cells: dict[str, dict[str, str]] = {}
    for child in sorted(child for child in folder.iterdir() if child.is_dir()):
        found: dict[str, str] = {}
        for column, stems in (("image", ("image",)), ("label", ("labels", "label"))):
            paths = [child / f"{stem}{suffix}" for stem in stems for suffix in VOLUME_SUFFIXES]
            paths = [path for path in paths if path.exists()]
            if len(paths) > 1:
                faults.append(f"{child.name}: two files for the {column}: {', '.join(p.name for p in paths)}; keep one")
            if paths:
                found[column] = str(paths[0])
        if "image" in found:
            row = {k: v for k, v in index.get(child.name, {}).items() if k not in ("volume", "z", "y", "x")}
            cells[child.name] = {**row, **found, "name": child.name}
    if not cells:
        raise ValueError(f"{folder}: holds neither manifest.csv nor volumes laid out as {LAYOUT}")
    return cells


def _parse_row(
    cells: Mapping[str, str], place: str, folder: Path, pattern: re.Pattern[str] | None, faults: list[str]
) -> ManifestRow | None:
    """Turn one row's cells into a `ManifestRow`; None, with its faults appended, when it is not sound."""
    before = len(faults)
    if "image" not in cells:
        faults.append(f"{place}, image: is empty; give the path of the image")
        return None
    paths: dict[str, Path] = {}
    for column in ("image", "label"):
        if column in cells:
            paths[column] = folder / Path(cells[column]).expanduser()
            if not paths[column].exists():
                faults.append(f"{place}, {column}: {cells[column]!r} is not there; paths are relative to {folder}")
    name = cells.get("name") or _default_name(paths["image"])
    spacing_um = _parse_spacing(cells, place, faults)
    split = cells.get("split")
    if split is not None and split not in SPLITS:
        close = difflib.get_close_matches(split.casefold(), (*SPLITS, "validation"), n=1)
        mend = f"did you mean {close[0].replace('validation', 'val')!r}?" if close else "use train, val or test"
        faults.append(f"{place}, split: {split!r} is unknown; {mend}")
    attributes: dict[str, str | float | int] = {}
    for column, cell in cells.items():
        if column in KNOWN_COLUMNS:
            continue
        attributes[column] = _number(cell)
        if column.startswith("quality_"):
            if isinstance(attributes[column], str):
                faults.append(f"{place}, {column}: {cell!r} is no number; quality columns hold numbers or nothing")
            else:
                attributes[column] = float(attributes[column])
    row = ManifestRow(
        name=name,
        image=paths["image"],
        label=paths.get("label"),
        axes=cells.get("axes"),
        spacing_um=spacing_um,
        specimen=_parse_specimen(cells, name, place, pattern, faults),
        split=split,
        classes=_parse_classes(cells, place, folder, faults),
        attributes=attributes,
    )
    if all(path.exists() for path in paths.values()):
        row = _with_file_facts(row, place, faults)
    return row if len(faults) == before else None


def _default_name(image: Path) -> str:
    name = image.name
    for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return image.absolute().parent.name if name.lower() in ("image", "img", "raw") else name


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
        value = _number(cells[column])
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


def _parse_classes(cells: Mapping[str, str], place: str, folder: Path, faults: list[str]) -> int | dict[int, int]:
    if "class" in cells and "classes" in cells:
        faults.append(f"{place}, class: is given along with classes; keep one of them")
        return 0
    if "class" in cells:
        if not cells["class"].isdecimal():
            faults.append(f"{place}, class: {cells['class']!r} must be an integer from 0")
            return 0
        return int(cells["class"])
    if "classes" not in cells:
        return 0
    path = folder / Path(cells["classes"]).expanduser()
    if not path.is_file():
        faults.append(f"{place}, classes: {cells['classes']!r} is not there; paths are relative to {folder}")
        return 0
    classes: dict[int, int] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file) if any(line)]
    except (UnicodeDecodeError, csv.Error) as error:
        lines = []
        faults.append(f"{place}, classes: {cells['classes']!r} cannot be read ({error})")
    else:
        if not lines or lines[0][:2] != ["id", "class"]:
            faults.append(f"{place}, classes: {cells['classes']!r} must start with the columns id,class")
            return 0
    for number, line in enumerate(lines[1:], start=2):
        if len(line) < 2 or not all(cell.isdecimal() for cell in line[:2]) or int(line[0]) == 0:
            faults.append(
                f"{place}, classes: {cells['classes']!r} row {number}: {line} must be an id from 1, a class from 0"
            )
        elif int(line[0]) in classes:
            faults.append(f"{place}, classes: {cells['classes']!r} row {number}: id {line[0]} occurs twice")
        else:
            classes[int(line[0])] = int(line[1])
    return classes


def _with_file_facts(row: ManifestRow, place: str, faults: list[str]) -> ManifestRow:
    """Check the files' shapes and types against each other, and take a missing spacing from the image."""
    try:
        image = row.open_image()
    except (ValueError, TypeError, OSError) as error:
        faults.append(f"{place}, image: {error}")
        return row
    if row.spacing_um is None and image.spacing_um is not None:
        row = ManifestRow(**{**row.__dict__, "spacing_um": image.spacing_um})
    if row.label is None:
        return row
    try:
        label = row.open_label()
    except (ValueError, TypeError, OSError) as error:
        faults.append(f"{place}, label: {error}")
        return row
    if label.dtype.kind not in "iu":
        mend = "number the objects" if label.dtype.kind == "b" else "convert it to uint16 or uint32"
        faults.append(f"{place}, label: {row.label} holds {label.dtype} voxels; labels are integers, {mend}")
    if label.shape[0] != 1:
        faults.append(f"{place}, label: {row.label} has {label.shape[0]} channels; a label volume has one")
    if label.shape[1:] != image.shape[1:]:
        faults.append(
            f"{place}, label: {row.label} has shape (z, y, x) = {label.shape[1:]} and the image {row.image} has "
            f"{image.shape[1:]}; they must be equal"
        )
    return row


def _number(cell: str) -> int | float | str:
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


def _open_label(path: Path, axes: str | None, spacing_um: Spacing | None) -> Volume:
    # The row's axes describe the image, which may have channels; the label follows its order of z, y, x.
    spatial = "".join(letter for letter in (axes or "").upper() if letter in "ZYX")
    return open_volume(path, axes=spatial if spatial not in ("", "ZYX") else None, spacing=spacing_um)


def _conflicts(rows: list[ManifestRow]) -> list[str]:
    """Faults between rows: names or images used twice, and specimens in more than one split."""
    faults: list[str] = []
    first_by_name: dict[str, ManifestRow] = {}
    first_by_image: dict[Path, ManifestRow] = {}
    for row in rows:
        if row.name in first_by_name:
            faults.append(f"name: {row.name!r} is used for {first_by_name[row.name].image} and {row.image}; rename one")
        first_by_name.setdefault(row.name, row)
        image = row.image.resolve()
        if image in first_by_image:
            faults.append(f"image: {row.image} is listed twice, as {first_by_image[image].name!r} and {row.name!r}")
        first_by_image.setdefault(image, row)
    members: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        # A volume without labels and without a split is never trained or judged on.
        if row.split is not None or row.label is not None:
            members.setdefault(row.specimen, {}).setdefault(row.split or "no split", []).append(row.name)
    for specimen, by_split in members.items():
        if len(by_split) > 1:
            where = "; ".join(f"{split}: {', '.join(names)}" for split, names in by_split.items())
            faults.append(f"split: specimen {specimen!r} is in {len(by_split)} splits ({where}); put all of it in one")
    return faults
