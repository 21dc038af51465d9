"""Rows written as a manifest come back, from every format and wherever their files lie."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from seg3d_monai.data import read_manifest, write_manifest
from seg3d_monai.data.manifest import ManifestRow
from seg3d_monai.data.manifest_tables import write_table


def volumes(folder: Path, *, classes: bool = False) -> list[ManifestRow]:
    """A labelled volume with a mask, one without labels, and a series of files by a pattern."""
    rng = np.random.default_rng(0)
    (folder / "series").mkdir(parents=True)
    image = rng.integers(1, 999, (3, 5, 4)).astype(np.uint16)
    label = np.zeros((3, 5, 4), np.uint16)
    label[1:, :3, 1:] = 4
    tifffile.imwrite(folder / "a.tif", image, photometric="minisblack")
    tifffile.imwrite(folder / "a_labels.tif", label, photometric="minisblack")
    tifffile.imwrite(folder / "a_mask.tif", (label == 0).astype(np.uint8), photometric="minisblack")
    tifffile.imwrite(folder / "b.tif", np.stack([image, image]), photometric="minisblack")
    for number, plane in enumerate(image):
        tifffile.imwrite(folder / "series" / f"z{number}.tif", plane + 1)
    (folder / "t.csv").write_text("id,class\n4,1\n")
    header = "name,image,label,ignore,axes,spacing_z_um,spacing_y_um,spacing_x_um,specimen,split,classes,class,stain"
    kind = "t.csv," if classes else ",2"
    text = f"""{header},quality_image,note
a,a.tif,a_labels.tif,a_mask.tif,ZYX,2,0.5,0.4,fish 1,val,{kind},H2B,2.5,
b,b.tif,,,CZYX,,,,fish 2,train,,,,,"bright, dim"
c,series/z*.tif,,,,1,1,1,fish 3,,,,DAPI,,
"""
    (folder / "m.csv").write_text(text)
    return list(read_manifest(folder / "m.csv").rows)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
@pytest.mark.parametrize("place", ["data", ".", "data/below", "elsewhere"])
def test_rows_come_back_wherever_the_manifest_is(tmp_path: Path, suffix: str, place: str) -> None:
    rows = volumes(tmp_path / "data")
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    path = write_manifest(folder / f"own{suffix}", rows)
    assert list(read_manifest(path).rows) == rows
    # As few absolute paths as can be: the folder may be moved with its data.
    if suffix == ".csv":
        assert (str(tmp_path) in path.read_text()) == (place in ("data/below", "elsewhere"))
    write_manifest(path, rows[:2])
    assert list(read_manifest(path).rows) == rows[:2]
    assert sorted(entry.name for entry in folder.iterdir() if "own" in entry.name) == [path.name]


def test_tables_of_classes_need_json(tmp_path: Path) -> None:
    rows = volumes(tmp_path, classes=True)
    assert rows[0].classes == {4: 1}
    path = write_manifest(tmp_path / "w.json", rows)
    assert list(read_manifest(path).rows) == rows
    for suffix in (".csv", ".parquet"):
        with pytest.raises(ValueError, match=r"cannot hold \{'4': 1\} of the column classes; write a .json file"):
            write_manifest(tmp_path / f"w{suffix}", rows)
        assert not (tmp_path / f"w{suffix}").exists()


def test_words_that_read_as_numbers_are_not_changed_in_silence(tmp_path: Path) -> None:
    rows = [replace(row, attributes={"plate": "007"}) for row in volumes(tmp_path)]
    with pytest.raises(ValueError, match="cannot hold '007' of the column plate"):
        write_manifest(tmp_path / "w.csv", rows)
    for suffix in (".json", ".parquet"):
        assert list(read_manifest(write_manifest(tmp_path / f"w{suffix}", rows)).rows) == rows
    mixed = [replace(rows[0], attributes={"plate": 7}), *rows[1:]]
    with pytest.raises(ValueError, match="a column holds numbers and text"):
        write_manifest(tmp_path / "mixed.parquet", mixed)
    with pytest.raises(ValueError, match="cannot hold '007'"):
        write_manifest(tmp_path / "mixed.csv", mixed)


def test_rows_that_contradict_each_other_are_refused_together(tmp_path: Path) -> None:
    first, second, third = volumes(tmp_path)
    wrong = [first, replace(second, name="a"), replace(third, specimen="fish 1", split="train")]
    with pytest.raises(
        ValueError, match=r"2 fault\(s\) in the rows:\n  name: 'a' is used.*\n  split: specimen 'fish 1'"
    ):
        write_manifest(tmp_path / "w.csv", wrong)
    with pytest.raises(ValueError, match="give a row per volume"):
        write_manifest(tmp_path / "w.csv", [])
    assert not (tmp_path / "w.csv").exists()


def test_cells_of_tables(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"image": "a.tif", "n": 3}, {"image": "b.tif", "q": 0.5, "n": -1}], ["image"])
    assert (tmp_path / "t.csv").read_text() == "image,n,q\na.tif,3,\nb.tif,-1,0.5\n"
