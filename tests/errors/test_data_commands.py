"""Mistakes with synth, match, convert, index and plan: one line, exit code 2, and not a byte is changed.

Elsewhere: what is wrong with files of every format when they are opened (tests/data/test_volume_errors.py), faults of a
manifest (test_manifest.py), filters (test_filters.py), damaged label chunks (test_crop_index_build.py), options of a
conversion, two at once, kills (test_convert.py, test_convert_kill.py), presets (tests/test_cli_synth.py), keys of a
plan (tests/planning/test_plan.py).
"""

import shlex
from pathlib import Path

import pytest
from error_toys import refused_in

from seg3d_monai.cli import main

Capsys = pytest.CaptureFixture[str]
SMALL = "--train_shape [8,16,16] --test_shape [8,16,16]"

SYNTH = [
    ("synth", "synth: missing OUT; see --help"),
    ("synth out --recipe list.json", "list.json is no recipe; give an object of groups: voxels"),
    ("synth out --recipe cut.json", "cut.json is not JSON: Expecting"),
    ("synth out --recipe bytes.json", "bytes.json is not JSON"),
    ("synth out --recipe folder", "preset 'folder' does not exist; choose one of lightsheet_nuclei"),
    ("synth out --recipe folder.json", "Is a directory: folder.json; give a file"),
    ("synth image.tif", "out='image.tif' is a file; give a folder"),
    ("synth folder", "out='folder' holds other files; choose an empty or new folder"),
    ("synth image.tif/out", "Not a directory: image.tif/out; one of the folders in this path is a file"),
    ("synth out --train_shape [8,8]", "train_shape must be three positive integers (z, y, x), got (8, 8)"),
    ("synth out --train_shape [0,8,8]", "train_shape must be three positive integers (z, y, x), got (0, 8, 8)"),
    ("synth out --train_shape 8", "--train_shape = '8' is not a list of integers such as"),
    ("synth out --spacing_um [0,1,1]", "spacing_um must be three positive numbers (z, y, x), got (0, 1, 1)"),
    ("synth out --spacing_um [nan,1,1]", "--spacing_um = '[nan,1,1]' is not a list of numbers"),
    ("synth out --train_volumes -1", "train_volumes must be an integer >= 0, got -1"),
    ("synth out --train_volumes 0 --val_volumes 0 --test_volumes 0", "are all 0; ask for at least one volume"),
    ("synth out --annotated_fraction 0", "annotated_fraction must be above 0 and at most 1, got 0"),
    ("synth out --annotated_fraction 1.5", "annotated_fraction must be above 0 and at most 1, got 1.5"),
    ("synth out --channels 3", "channels must be 1 or 2, got 3"),
    ("synth out --num_classes 3", "num_classes must be 1 or 2, got 3"),
    ("synth out --seed -1", "seed must be an integer >= 0, got -1"),
    ("synth out --seed 1.5", "--seed = '1.5' is not an integer"),
    ("synth out --recipe membrane --num_classes 2", "num_classes is 2; the objects of a recipe are of one class"),
    ("synth out --recipe membrane --spacing_um [2,1,0.5]", "spacing_um is [2.0, 1.0, 0.5]; the voxels of a recipe"),
    ("synth out --train_shpe [8,8,8]", "unknown flag --train_shpe; did you mean --train_shape?"),
]
CUBE = "--spacing [2,1,1] --rounds 1 --num_scenes 12"
MATCH = [
    (f"match no.tif own.json {CUBE}", "no.tif: no such file"),
    (f"match text.tif own.json {CUBE}", "text.tif: not a TIFF file"),
    (f"match cut.tif own.json {CUBE}", "cut.tif: truncated"),
    (f"match plane.tif own.json {CUBE}", "plane.tif: axes YX of shape (9, 66) have no Z"),
    (f"match folder own.json {CUBE}", "folder: a folder that is no Zarr"),
    (f"match lost.zarr own.json {CUBE}", "its metadata file zarr.json cannot be read"),
    (f"match lost.zarr own.json {CUBE}", "write or copy it again"),
    (f"match image.tif own.json {CUBE}", "shape (6, 9, 66); give [Z, Y, X] with eight voxels along each at least"),
    (f"match cube.tif own.json {CUBE} --channel 3", "channels=3 is not there; choose from 0 to 0"),
    ("match cube.tif own.json --spacing [2,1,1] --rounds 0", "rounds=0"),
    ("match cube.tif own.json --spacing [2,1,1] --num_scenes 0", "num_scenes=0"),
    (f"match cube.tif own.json {CUBE} --roi [0,0,0]", "roi=(0, 0, 0) must be (z1, y1, x1, z2, y2, x2)"),
    (f"match cube.tif own.json {CUBE} --roi [0,0,0,99,9,9]", "leaves the volume of shape (z, y, x) = (12, 24, 24)"),
    ("match cube.tif own.json --spacing [2,-1,1]", "spacing=[2, -1, 1] must be three positive numbers"),
    (f"match cube.tif own.json {CUBE} --start list.json", "list.json is no recipe; give an object of groups"),
    (f"match cube.tif own.json {CUBE} --start cut.json", "cut.json is not JSON"),
    (f"match cube.tif cube.tif {CUBE}", "RECIPE is 'cube.tif'; give a name that ends in .json"),
    (f"match cube.tif folder.json {CUBE}", "RECIPE 'folder.json' is a folder; give the name of a file"),
    (f"match cube.tif own.json {CUBE} --seed -1", "seed=-1 is negative; give 0 or more"),
    (f"match cube.tif own.json {CUBE} --sed 1", "unknown flag --sed; did you mean --seed?"),
]
CONVERT = [
    ("convert empty.tif x.zarr", "empty.tif: not a TIFF file"),
    ("convert folder.tif x.zarr", "folder.tif: a folder that is no Zarr"),
    ("convert group.zarr x.zarr", "neither an image nor labels; give the path of an array inside it"),
    ("convert lost.zarr x.zarr", "write or copy it again"),
    ("convert four.tif x.zarr", "nothing says which axis is which"),
    ("convert nothing/*.tif x.zarr", "nothing/*.tif: no file has such a name"),
    ("convert half.zarr x.zarr", "half.zarr: no such file or folder"),
    ("convert half.zarr.partial x.zarr", "half.zarr.partial"),
    ("convert image.tif x.tif", "output is 'x.tif'; its name must end in .zarr"),
    ("convert image.tif no/x.zarr", "output 'no/x.zarr': its folder does not exist; make it first"),
    ("convert image.tif image.tif/x.zarr", "its folder does not exist; make it first"),
    ("convert damaged.zarr damaged.zarr --restart", "is the input or lies around it; choose another"),
    ("convert image.tif out.zarr", "out.zarr: exists and was made otherwise"),
    ("convert image.tif group.zarr --restart", "exists and was not written by seg3d; remove it yourself"),
    ("convert image.tif x.zarr --spacing [1,1]", "spacing=[1, 1] must be three positive numbers"),
    ("convert image.tif x.zarr --axes ZYXX", "letters other than T, C, Z, Y, X, or one of them twice"),
    ("convert image.tif x.zarr --channels []", "channels=[] is not there; choose from 0 to 0"),
    ("convert image.tif x.zarr --time 3", "time=3 is not there; choose 0 to 0"),
    ("convert image.tif x.zarr --time soon", "--time is 'soon'; pass a number, a list"),
    (
        "convert image.tif x.zarr --level 2um",
        "level='2um' asks for a voxel size, and the file gives none; choose a level",
    ),
    ("convert image.tif x.zarr --scene 4", "scene=4 is not there; choose one of: 0"),
    ("convert image.tif x.zarr --roi [3,0,0,2,9,9]", "is inverted or leaves the volume"),
    ("convert real.tif x.zarr --labels", "labels are integers, and its voxels are float32; leave out labels"),
    ("convert image.tif x.zarr --labels maybe", "unexpected argument 'maybe'"),
    ("convert image.tif x.zarr --max_memory -1", "max_memory is '-1'; pass bytes, or text such as"),
    ("convert image.tif x.zarr --chunk_size eight", "--chunk_size = 'eight' is not an integer or a list of integers"),
    ("convert image.tif x.zarr --chnk_size 8", "unknown flag --chnk_size; did you mean --chunk_size?"),
]
INDEX = [
    ("index list.json x.sqlite", 'list.json: must hold a list of objects, [{"image": ...}, ...]'),
    ("index cut.json x.sqlite", "cut.json: is not JSON"),
    ("index bytes.json x.sqlite", "bytes.json: is not JSON"),
    ("index text.tif x.sqlite", "header: column 'image' is missing among ['no picture but words']; add it"),
    ("index folder x.sqlite", "folder: holds neither manifest.csv nor volumes laid out as"),
    ("index data/manifest.csv folder", "folder is a folder; give the SQLite file of a crop index"),
    ("index data/manifest.csv text.sqlite", "text.sqlite is not a crop index; build it again"),
    ("index data/manifest.csv data/manifest.csv", "manifest.csv is not a crop index"),
    ("index data/manifest.csv image.tif", "image.tif is not a crop index"),
    ("index data/manifest.csv image.tif/x.sqlite", "image.tif; choose another name"),
    (
        "index data/manifest.csv x.sqlite --crop_size [0,8,8]",
        "crop_size=[0, 8, 8] is not three voxel counts of at least 1",
    ),
    (
        "index data/manifest.csv x.sqlite --crop_size [8,8]",
        "crop_size=[8, 8] is not three voxel counts; give (z, y, x)",
    ),
    ("index data/manifest.csv x.sqlite --stride [8,8,8] --overlap [1,1,1]", "say the same thing; give one of them"),
    ("index data/manifest.csv x.sqlite --crop_size [6,9,32] --overlap [6,9,32]", "is not smaller than crop_size"),
    ("index data/manifest.csv x.sqlite --min_voxels -1", "min_voxels=-1 is negative; use 0"),
    ("index data/manifest.csv x.sqlite --where 'quality_image > 99'", "leaves no volume of 4; loosen it"),
    ("index data/manifest.csv x.sqlite --where 'quality_imge > 1'", "the nearest is 'quality_image'"),
    ("index data/manifest.csv x.sqlite --specimen_pattern (", "specimen_pattern='(' is no regular expression"),
    ("index data/manifest.csv x.sqlite --num_workers 0", "num_workers=0 is not a number of processes; use 1 or more"),
    ("index data/manifest.csv x.sqlite --crop_sze [6,9,32]", "unknown flag --crop_sze; did you mean --crop_size?"),
]
PLAN = [
    ("plan text.sqlite", "text.sqlite is not a crop index"),
    ("plan folder", "folder is a folder; give the SQLite file of a crop index"),
    ("plan crops.sqlite --output image.tif", "--output 'image.tif' is a file; give a folder"),
    ("plan crops.sqlite --output image.tif/x --bundle maskrcnn3d", "Not a directory: image.tif/x; one of the folders"),
    ("plan crops.sqlite --memory -1", "memory='-1' is no amount of memory; give bytes"),
    ("plan crops.sqlite --target_spacing [1,1]", "target_spacing=[1, 1] must be three positive numbers"),
    ("plan crops.sqlite --overlay model_r5", "overlay 'model_r5.json' does not exist; did you mean model_r50.json?"),
    ("plan crops.sqlite --bundle maskrcnn3d,", "bundle '' "),
    ("plan crops.sqlite --restart=maybe", "--restart = 'maybe' is not true or false"),
]
ROWS = [*SYNTH, *MATCH, *CONVERT, *INDEX, *PLAN]


@pytest.mark.parametrize(("words", "fragment"), ROWS, ids=[f"{words} [{part[:12]}]" for words, part in ROWS])
def test_a_mistake_changes_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, shlex.split(words), fragment)


def test_labels_that_do_not_fit_their_image(place: Path, capsys: Capsys) -> None:
    manifest = place / "data" / "manifest.csv"
    whole = manifest.read_text()
    words = ["index", "data/manifest.csv", "x.sqlite", "--num_workers", "1"]
    for label, fragment in (
        ("short.tif", "(5, 9, 66)"),
        ("real.tif", "float32"),
        ("plane.tif", "no Z"),
        ("no.tif", "no.tif"),
    ):
        manifest.write_text(whole.replace("v0/labels.tif", f"../{label}"))
        line = refused_in(place, capsys, words, fragment)
        assert "v0" in line or label in line


def test_a_damaged_input_leaves_a_conversion_that_goes_on(place: Path, capsys: Capsys) -> None:
    words = ["convert", "damaged.zarr", "x.zarr"]
    partial = ["", "/0", "/0/zarr.json", "/unfinished.json", "/unfinished.log", "/zarr.json"]
    left = [f"x.zarr.partial{name}" for name in partial]
    refused_in(place, capsys, words, "chunk (1, 0, 1) is damaged", "write that chunk again, or delete it", left=left)
    (place / "damaged.zarr/c/1/0/1").unlink()
    refused_in(place, capsys, words, "was begun with another input or other options (input); undo that, choose another")
    assert main([*words, "--restart"]) == 0
    assert (place / "x.zarr").is_dir()
    assert not (place / "x.zarr.partial").exists()


def test_a_synthetic_specimen_of_other_options_is_not_mixed_up(place: Path, capsys: Capsys) -> None:
    words = ["synth", "out", *SMALL.split(), "--train_volumes", "1", "--val_volumes", "0", "--test_volumes", "0"]
    assert main(words) == 0
    refused_in(place, capsys, [*words, "--seed", "2"], "already holds another synthetic specimen (different: seed)")
    (place / "out" / "specimen.json").write_text("[]")
    refused_in(place, capsys, words, "out='out' holds an unreadable specimen.json; choose another folder")


def test_an_edited_plan_is_kept(place: Path, capsys: Capsys) -> None:
    words = ["plan", "crops.sqlite", "--output", "plan", "--bundle", "maskrcnn3d"]
    assert main(words) == 0
    (place / "plan" / "plan.txt").write_text("mine")
    refused_in(
        place, capsys, words, "plan holds another plan (plan.txt would change); choose another folder, or --restart"
    )
