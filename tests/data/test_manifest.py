"""Manifests from CSV and from folders, and the list of faults of a bad one."""

import csv
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

from seg3d_monai.data.manifest import location, read_manifest, select_rows

BBBC050 = Path(__file__).resolve().parents[3] / "shared" / "data" / "bbbc050"
SHAPE = (5, 12, 17)


def write_pair(folder, name, shape=SHAPE, label_shape=None, label_dtype=np.uint16):
    folder.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(folder / f"{name}.tif", np.zeros(shape, dtype=np.uint16), photometric="minisblack")
    label = np.zeros(label_shape or shape, dtype=label_dtype)
    tifffile.imwrite(folder / f"{name}_label.tif", label, photometric="minisblack")


def write_csv(folder, header, *rows, name="manifest.csv", encoding="utf-8"):
    with open(folder / name, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([header, *rows])
    return folder / name


def faults_of(path, **options):
    with pytest.raises(ValueError, match="fault") as caught:
        read_manifest(path, **options)
    return str(caught.value).splitlines()[1:]


def test_every_column(tmp_path):
    write_pair(tmp_path / "data", "a")
    write_pair(tmp_path / "data", "b")
    write_csv(tmp_path, ["id", "class"], [1, 0], [2, 3], name="b_classes.csv")
    header = [" image ", "label", "name", "spacing_z_um", "spacing_y_um", "spacing_x_um", "specimen", "split"]
    header += ["class", "classes", "quality_snr", "stain", "day", "age"]
    path = write_csv(
        tmp_path,
        header,
        ["data/a.tif", "data/a_label.tif", "first", 2, 0.5, 0.4, "E1", "train", 4, "", 12, "DAPI", 7, 1.5],
        ["data/b.tif", "data/b_label.tif", "", "", "", "", "E2", "val", "", "b_classes.csv", "", "1_2", "", "nan"],
        [],
        encoding="utf-8-sig",
    )
    manifest = read_manifest(path)
    assert manifest.path == path
    assert manifest.rows == read_manifest(tmp_path).rows
    first, second = manifest.rows
    assert (first.name, first.specimen, first.split, first.classes) == ("first", "E1", "train", 4)
    assert first.spacing_um == (2.0, 0.5, 0.4)
    assert first.image == tmp_path / "data" / "a.tif"
    assert first.attributes == {"quality_snr": 12.0, "stain": "DAPI", "day": 7, "age": 1.5}
    assert isinstance(first.attributes["quality_snr"], float)
    assert (second.name, second.spacing_um, second.classes) == ("b", None, {1: 0, 2: 3})
    assert second.attributes == {"stain": "1_2", "age": "nan"}
    assert first.open_image().spacing_um == first.open_label().spacing_um == (2.0, 0.5, 0.4)
    assert first.open_label().shape == (1, *SHAPE)


def test_image_alone_is_enough(tmp_path):
    write_pair(tmp_path, "a")
    (row,) = read_manifest(write_csv(tmp_path, ["image"], ["a.tif"])).rows
    assert (row.name, row.label, row.specimen, row.split, row.classes) == ("a", None, "a", None, 0)
    with pytest.raises(ValueError, match="has no label"):
        row.open_label()


def test_axes_describe_the_image_and_spacing_comes_from_the_file(tmp_path, ome_zarr):
    array = np.zeros((5, 12, 17, 2), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "four.tif", array, photometric="minisblack")
    tifffile.imwrite(tmp_path / "four_label.tif", array[..., 0], photometric="minisblack")
    ome_zarr(tmp_path / "z.zarr", array[..., 0], version="0.4", axes="zyx", scale=[3, 2, 1])
    path = write_csv(tmp_path, ["image", "label", "axes"], ["four.tif", "four_label.tif", "ZYXC"], ["z.zarr", "", ""])
    four, other = read_manifest(path).rows
    assert four.open_image().shape == (2, 5, 12, 17)
    assert four.open_label().shape == (1, 5, 12, 17)
    assert (other.name, other.spacing_um) == ("z", (3.0, 2.0, 1.0))


def test_all_faults_are_listed_at_once(tmp_path):
    for name in "abcde":
        write_pair(tmp_path, name)
    write_pair(tmp_path, "f", label_shape=(5, 12, 18))
    write_pair(tmp_path, "g", label_dtype=np.float32)
    write_pair(tmp_path, "h", label_dtype=bool)
    write_csv(tmp_path, ["id", "class"], [0, 1], [1, "x"], [2, 0], [2, 1], name="classes.csv")
    header = [
        "image",
        "label",
        "split",
        "spacing_z_um",
        "spacing_y_um",
        "spacing_x_um",
        "class",
        "classes",
        "quality_a",
    ]
    path = write_csv(
        tmp_path,
        header,
        ["missing.tif", "", "", "", "", "", "", "", ""],
        ["a.tif", "a_label.tif", "training", "", "", "", "", "", ""],
        ["b.tif", "b_label.tif", "", 1, "", 1, "", "", ""],
        ["c.tif", "c_label.tif", "", 1, 0, 1, -1, "", "good"],
        ["d.tif", "d_label.tif", "", "", "", "", 1, "classes.csv", ""],
        ["e.tif", "e_label.tif", "", "", "", "", "", "classes.csv", ""],
        ["f.tif", "f_label.tif", "", "", "", "", "", "", ""],
        ["g.tif", "g_label.tif", "", "", "", "", "", "", ""],
        ["h.tif", "h_label.tif", "", "", "", "", "", "", ""],
        ["", "a_label.tif", "", "", "", "", "", "", ""],
    )
    faults = faults_of(path)
    expected = [
        ("row 2, image", "missing.tif"),
        ("row 3, split", "'training'", "did you mean 'train'"),
        ("row 4, spacing_y_um", "all three"),
        ("row 5, spacing_y_um", "'0'"),
        ("row 5, class", "'-1'"),
        ("row 5, quality_a", "'good'"),
        ("row 6, class", "classes"),
        ("row 7, classes", "row 2"),
        ("row 7, classes", "row 3"),
        ("row 7, classes", "id 2", "twice"),
        ("row 8, label", "(5, 12, 18)", "(5, 12, 17)"),
        ("row 9, label", "float32"),
        ("row 10, label", "bool"),
        ("row 11, image", "empty"),
    ]
    assert len(faults) == len(expected), faults
    for fragments in expected:
        assert any(all(f in fault for f in fragments) for fault in faults), (fragments, faults)


@pytest.mark.parametrize(
    ("header", "fragments"),
    [
        (["imgae", "label"], ["'imgae'", "did you mean 'image'"]),
        (["Image"], ["'Image'", "did you mean 'image'"]),
        (["image", "lable"], ["did you mean 'label'"]),
        (["image", "spacing_z"], ["did you mean 'spacing_z_um'"]),
        (["image", "axis"], ["did you mean 'axes'"]),
        (["image", "stain", "stain"], ["'stain' occurs twice"]),
        (["label"], ["'image' is missing"]),
        (["image", "", "stain"], ["column 2 has no name"]),
    ],
)
def test_headers_at_fault(tmp_path, header, fragments):
    write_pair(tmp_path, "a")
    faults = faults_of(write_csv(tmp_path, header, ["a.tif"]))
    assert len(faults) == 1
    assert all(fragment in faults[0] for fragment in fragments), faults


def test_free_columns_may_resemble_known_ones_that_are_there(tmp_path):
    write_pair(tmp_path, "a")
    path = write_csv(tmp_path, ["image", "image2", "label", "labels", "lab"], ["a.tif", "x", "a_label.tif", "y", "z"])
    assert read_manifest(path).rows[0].attributes == {"image2": "x", "labels": "y", "lab": "z"}


def test_too_many_cells_in_a_row(tmp_path):
    write_pair(tmp_path, "a")
    (fault,) = faults_of(write_csv(tmp_path, ["image", "stain"], ["a.tif", "b", "c"]))
    assert "row 2" in fault
    assert "3 cells for 2 columns" in fault


def test_a_specimen_is_in_one_split(tmp_path):
    for name in "abcd":
        write_pair(tmp_path, name)
    header = ["image", "label", "specimen", "split"]
    rows = [
        [f"{n}.tif", f"{n}_label.tif", s, split]
        for n, s, split in zip("abcd", "EEFF", ["train", "val"] * 2, strict=True)
    ]
    faults = faults_of(write_csv(tmp_path, header, *rows))
    assert len(faults) == 2
    assert "'E'" in faults[0]
    assert "train: a; val: b" in faults[0]
    rows = [[*row[:3], "train" if row[2] == "E" else "val"] for row in rows]
    assert [row.split for row in read_manifest(write_csv(tmp_path, header, *rows)).rows] == [
        "train",
        "train",
        "val",
        "val",
    ]
    rows[3][3] = ""
    assert "no split: d" in faults_of(write_csv(tmp_path, header, *rows))[0]
    rows[3][1] = ""  # an image that is only predicted takes part in no split
    assert len(read_manifest(write_csv(tmp_path, header, *rows)).rows) == 4


def test_names_and_images_are_unique(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path / "other", "a")
    faults = faults_of(write_csv(tmp_path, ["image"], ["a.tif"], ["other/a.tif"], ["./a.tif"]))
    assert sum("name: 'a'" in fault for fault in faults) == 2
    assert sum("listed twice" in fault for fault in faults) == 1


def test_truncated_image_is_a_fault_with_its_row(tmp_path):
    write_pair(tmp_path, "a")
    raw = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(raw[: len(raw) // 2])
    (fault,) = faults_of(write_csv(tmp_path, ["image"], ["a.tif"]))
    assert "row 2, image" in fault
    assert "truncated" in fault


def test_files_that_are_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv"):
        read_manifest(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match=r"laid out as NAME/image\.tif"):
        read_manifest(tmp_path)
    for text, fragment in ((b"", "is empty"), (b"\xff\xfe\x00i", "UTF-8"), (b"image;label\na;b\n", "commas")):
        (tmp_path / "bad.csv").write_bytes(text)
        with pytest.raises(ValueError, match=fragment):
            read_manifest(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("image\n")
    with pytest.raises(ValueError, match="lists no volume"):
        read_manifest(tmp_path / "bad.csv")


def test_discovered_folder(tmp_path):
    for name, suffix in (("fish1_t1", ".tif"), ("fish1_t2", ".zarr"), ("fish2_t1", ".tif")):
        (tmp_path / name).mkdir()
        for stem in ("image", "labels"):
            if suffix == ".zarr":
                zarr.save_array(tmp_path / name / f"{stem}.zarr", np.zeros(SHAPE, dtype=np.uint16))
            else:
                tifffile.imwrite(tmp_path / name / f"{stem}.tif", np.zeros(SHAPE, np.uint16), photometric="minisblack")
    (tmp_path / "notes").mkdir()
    write_csv(
        tmp_path,
        ["volume", "z", "spacing_z_um", "spacing_y_um", "spacing_x_um", "quality_snr"],
        ["fish1_t1", 5, 2, 1, 1, 3.5],
        ["elsewhere", 5, 2, 1, 1, 3.5],
        name="index.csv",
    )
    rows = read_manifest(tmp_path, specimen_pattern=r"^(fish\d+)_").rows
    assert [row.name for row in rows] == ["fish1_t1", "fish1_t2", "fish2_t1"]
    assert [row.specimen for row in rows] == ["fish1", "fish1", "fish2"]
    assert [row.spacing_um for row in rows] == [(2.0, 1.0, 1.0), None, None]
    assert rows[0].attributes == {"quality_snr": 3.5}
    assert rows[1].label == tmp_path / "fish1_t2" / "labels.zarr"
    assert [row.specimen for row in read_manifest(tmp_path).rows] == ["fish1_t1", "fish1_t2", "fish2_t1"]
    assert [row.specimen for row in read_manifest(tmp_path, specimen_pattern=r"fish\d").rows] == [
        "fish1",
        "fish1",
        "fish2",
    ]
    assert len(faults_of(tmp_path, specimen_pattern=r"mouse")) == 3
    with pytest.raises(ValueError, match="no regular expression"):
        read_manifest(tmp_path, specimen_pattern="(")
    (tmp_path / "fish2_t1" / "image.tiff").write_bytes(b"")
    assert "two files for the image" in faults_of(tmp_path)[0]


def test_bbbc050_is_discovered():
    if not BBBC050.is_dir():
        pytest.skip("the BBBC050 volumes are not beside this checkout (../shared/data)")
    start = time.perf_counter()
    rows = read_manifest(BBBC050, specimen_pattern=r"^(Emb\d+)").rows
    assert time.perf_counter() - start < 5
    assert len(rows) == 121
    assert len({row.specimen for row in rows}) == 11
    assert {row.spacing_um for row in rows} == {(1.75, 0.8, 0.8)}
    assert all(row.label is not None for row in rows)
    assert sum(int(row.attributes["instances"]) for row in rows) == 1377


ENTRIES = [
    {"image": "a.tif", "label": "a_label.tif", "name": "first", "specimen": "E1", "split": "train", "class": 4}
    | {"spacing_z_um": 2, "spacing_y_um": 0.5, "spacing_x_um": 0.4, "quality_snr": 12, "stain": "007", "day": 7},
    {"image": "b.tif", "label": None, "specimen": "E2", "split": "val", "quality_snr": None, "stain": " ", "day": 1.5},
]


def check_entries(path):
    first, second = read_manifest(path).rows
    assert (first.name, first.specimen, first.split, first.classes) == ("first", "E1", "train", 4)
    assert first.spacing_um == (2.0, 0.5, 0.4)
    assert first.attributes == {"quality_snr": 12.0, "stain": "007", "day": 7}  # text stays text
    assert (second.name, second.label, second.attributes) == ("b", None, {"day": 1.5})
    return first


@pytest.mark.parametrize("wrap", [lambda entries: entries, lambda entries: {"volumes": entries}])
def test_json(tmp_path, wrap):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(wrap(ENTRIES)))
    assert isinstance(check_entries(path).attributes["day"], int)
    assert read_manifest(tmp_path).rows == read_manifest(path).rows


def test_parquet(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    path = tmp_path / "manifest.parquet"
    # Gaps make floats of integers: the class arrives as 4.0.
    pd.DataFrame(ENTRIES, index=[5, 9]).to_parquet(path)
    check_entries(path)
    assert read_manifest(tmp_path).rows == read_manifest(path).rows


def test_classes_within_json(tmp_path):
    write_pair(tmp_path, "a")
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps([{"image": "a.tif", "label": "a_label.tif", "classes": {"1": 0, "12": 3}}]))
    assert read_manifest(path).rows[0].classes == {1: 0, 12: 3}
    path.write_text(
        json.dumps([{"image": "a.tif", "classes": {"0": 1, "2": "x"}}, {"image": "a_label.tif", "day": [1]}])
    )
    faults = faults_of(path)
    assert len(faults) == 3
    assert "row 1, classes: entry '0'" in faults[0] or "row 1, classes: entry '0'" in faults[1]
    assert any("row 2, day: [1] is neither a number nor text" in fault for fault in faults)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", b"{", "is not JSON"),
        ("m.json", b'{"image": "a.tif"}', "must hold a list of objects"),
        ("m.json", b"[1]", "must hold a list of objects"),
        ("m.json", b"[]", "'image' is missing"),
        ("m.json", b'[{"imgae": "a.tif"}]', "did you mean 'image'"),
        ("m.parquet", b"PAR1 and more", "is not Parquet"),
    ],
)
def test_other_tables_at_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


def test_a_mask_of_what_to_ignore(tmp_path):
    write_pair(tmp_path, "a", label_dtype=np.uint8)
    write_pair(tmp_path, "b", label_shape=(5, 12, 16), label_dtype=bool)
    write_pair(tmp_path, "c", label_dtype=np.float32)
    path = write_csv(tmp_path, ["image", "label", "ignore"], ["a.tif", "", "a_label.tif"])
    (row,) = read_manifest(path).rows
    assert row.ignore == tmp_path / "a_label.tif"
    assert row.open_ignore().shape == (1, *SHAPE)
    rows = [["b.tif", "", "b_label.tif"], ["c.tif", "", "c_label.tif"], ["a.tif", "", "gone.tif"]]
    faults = faults_of(write_csv(tmp_path, ["image", "label", "ignore"], *rows))
    assert len(faults) == 3
    for place, fragment in (("row 2, ignore", "(5, 12, 16)"), ("row 3, ignore", "float32"), ("row 4, ignore", "gone")):
        assert any(place in fault and fragment in fault for fault in faults), faults


def test_ids_above_the_type_of_the_labels(tmp_path):
    write_pair(tmp_path, "a")
    write_csv(tmp_path, ["id", "class"], [65534, 0], [65535, 0], [70000, 1], name="classes.csv")
    path = write_csv(tmp_path, ["image", "label", "classes"], ["a.tif", "a_label.tif", "classes.csv"])
    (fault,) = faults_of(path)
    assert "row 2, classes: ids [65535, 70000] do not fit" in fault
    assert "uint16 holds ids below 65535" in fault


def test_one_file_by_two_names(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    (tmp_path / "link.tif").symlink_to("a.tif")
    (tmp_path / "hard.tif").hardlink_to(tmp_path / "b.tif")
    faults = faults_of(write_csv(tmp_path, ["image"], ["a.tif"], ["link.tif"], ["b.tif"], ["hard.tif"]))
    assert len(faults) == 2
    assert "listed twice, as 'a' and 'link'" in faults[0]
    assert "listed twice, as 'b' and 'hard'" in faults[1]
    header = ["image", "label", "specimen"]
    rows = [["a.tif", "a_label.tif", "E1"], ["b.tif", "a_label.tif", "E1"]]  # two stains, drawn once
    assert len(read_manifest(write_csv(tmp_path, header, *rows)).rows) == 2
    rows[1][2] = "E2"
    (fault,) = faults_of(write_csv(tmp_path, header, *rows))
    assert "'a' of specimen 'E1' and for 'b' of 'E2'" in fault


def test_rows_are_selected_by_a_filter(tmp_path):
    for name in "abc":
        write_pair(tmp_path, name)
    header = ["image", "label", "split", "quality_image", "stain", "spacing_z_um", "spacing_y_um", "spacing_x_um"]
    rows = [["a.tif", "a_label.tif", "train", 1, "H2B", 2, 1, 1], ["b.tif", "", "val", 2, "DAPI", "", "", ""]]
    found = read_manifest(write_csv(tmp_path, header, *rows, ["c.tif", "", "", "", 7, "", "", ""])).rows
    for where, expected in (
        (None, "abc"),
        ("", "abc"),
        ("quality_image >= 2", "b"),
        ('split == "train" or stain == 7', "ac"),
        ("label == None", "bc"),
        ("spacing_z_um > 1", "a"),
        ('not stain == "H2B"', "bc"),
    ):
        assert "".join(row.name for row in select_rows(found, where)) == expected, where
    with pytest.raises(ValueError, match="leaves no volume of 3"):
        select_rows(found, "quality_image > 2")
    with pytest.raises(ValueError, match="the nearest is 'quality_image'"):
        select_rows(found, "quality > 2")


def test_a_pattern_of_files_is_a_volume(tmp_path):
    (tmp_path / "series").mkdir()
    for z in range(5):
        tifffile.imwrite(tmp_path / "series" / f"z{z:02}.tif", np.full((12, 17), z, np.uint16))
    (row,) = read_manifest(write_csv(tmp_path, ["image"], ["series/z*.tif"])).rows
    assert row.open_image().shape == (1, 5, 12, 17)
    assert location(str(row.image)) == row.image
    assert location("https://host/x.zarr") == "https://host/x.zarr"
