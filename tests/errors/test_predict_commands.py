"""Mistakes with predict, seam-check and relabel: one line, exit code 2, nothing left that a run would go on from.

Elsewhere: resuming, kills and other plans (tests/inference/test_predict_resume.py), damaged chunks, NaN, a full journal
and SIGTERM without the command line (test_predict_faults.py), regions and memory (test_predict_options.py), settings of
a predictor (test_predictor.py), what relabel may change (test_relabel.py), limits of a seam check (test_seam_check.py).
"""

import shlex
from pathlib import Path

import pytest
from error_toys import BUNDLE, GRID, PREDICT, SPACING, refused_in

from seg3d_monai.cli import main

Capsys = pytest.CaptureFixture[str]

PREDICTS = [
    ("no.tif x.zarr", "input 'no.tif' does not exist; check the path"),
    ("text.tif x.zarr", "text.tif: not a TIFF file"),
    ("cut.tif x.zarr", "cut.tif: truncated"),
    ("folder x.zarr", "folder: a folder that is no Zarr"),
    ("lost.zarr x.zarr", "its metadata file zarr.json cannot be read"),
    ("nan.tif x.zarr", "voxel (channel 0, z 2, y 4, x 4) is nan; replace NaN"),
    ("plane.tif x.zarr", "axes YX of shape (9, 66) have no Z; a stack of planes is needed"),
    ("four.tif x.zarr", "nothing says which axis is which"),
    (
        "colours.ome.tif x.zarr",
        "the input has 2 channels and the model takes 1; choose some with channels (--channels)",
    ),
    ("image.tif x.tif", "output is 'x.tif'; give a name that ends with .zarr"),
    ("image.tif no/x.zarr", "the folder of output no/x.zarr does not exist; make no first"),
    (
        "image.tif group.zarr",
        "group.zarr exists without the journal of its run; choose another OUTPUT or pass --restart",
    ),
    ("image.tif group.zarr --restart", "exists and was not written by seg3d predict; choose another OUTPUT"),
    ("damaged.zarr damaged.zarr --restart", "overlap; choose another OUTPUT"),
    ("image.tif out.zarr --block_size [6,9,16] --halo [0,0,8]", "pass --restart to start anew"),
    ("image.tif x.zarr --spacing [0,1,1]", "spacing=[0, 1, 1] must be three positive numbers"),
    ("image.tif x.zarr --axes YX", "axes='YX' has 2 letters for 3 axes"),
    ("image.tif x.zarr --channels 4", "channels=4 is not there; choose from 0 to 0"),
    ("image.tif x.zarr --time 3", "time=3 is not there; choose 0 to 0"),
    ("image.tif x.zarr --time soon", "--time is 'soon'; pass a number, a list"),
    ("image.tif x.zarr --level 9", "level=9 is not there; it has 1 level(s)"),
    ("image.tif x.zarr --roi [0,0,0]", "roi has 3 values: [0, 0, 0]; pass six integers"),
    ("image.tif x.zarr --foreground no.tif", "no.tif: no such file or folder"),
    ("image.tif x.zarr --foreground text.tif", "text.tif: not a TIFF file"),
    ("image.tif x.zarr --block_size 0", "block_size is [0, 0, 0]; every value must be at least 1"),
    ("image.tif x.zarr --block_size [8,8]", "block_size has 2 values: [8, 8]; pass one integer or three"),
    ("image.tif x.zarr --halo -1", "halo is [-1, -1, -1]; every value must be at least 0"),
    ("image.tif x.zarr --halo [0,0,0]", "pass a halo of at least 1"),
    ("image.tif x.zarr --num_workers 0", "num_workers is 0; pass an integer of at least 1"),
    ("image.tif x.zarr --max_memory much", "max_memory is 'much'; pass bytes, or text such as"),
    ("image.tif x.zarr --score_threshold 2", "score_threshold is 2; give a score in 0 to 1"),
    ("image.tif x.zarr --score_threshold high", "--score_threshold = 'high' is not a number"),
    ("image.tif x.zarr --min_volume -1", "min_volume is -1; pass an integer of at least 0"),
    ("image.tif x.zarr --device gpu", "device: 'gpu' is no device; give cpu, cuda or cuda:1"),
    ("image.tif x.zarr --table xlsx", "table is 'xlsx'; choose parquet or csv"),
    ("image.tif x.zarr --output_dtype int8", "dtype is 'int8'; choose uint32 or uint16"),
    ("image.tif x.zarr --ome_zarr_version 0.3", "ome_zarr_version is '0.3'; choose 0.4 or 0.5"),
    (
        "image.tif x.zarr --ome_zarr_version 0.4 --shards True",
        "0.4 has none; pass ome_zarr_version 0.5, or shards False",
    ),
    ("image.tif x.zarr --batch_size 0", "batch_size is 0; pass an integer of at least 1"),
    ("image.tif x.zarr --flips [q]", "flips is ['q']; name some of the axes z, y and x"),
    ("image.tif x.zarr --amp half", "amp='half' on cpu; choose one of auto, off, bf16"),
    ("image.tif x.zarr --model_spacing [1,1]", "model_spacing=[1, 1] must be three positive numbers"),
    ("image.tif x.zarr --skip_below dark", "skip_below is 'dark'; pass a grey value, or one per channel"),
    ("image.tif x.zarr --in_channels 2", "use the configuration it was trained with"),
    ("image.tif x.zarr --inferer#percentiles [5,1]", "percentiles=(5, 1) must be two numbers in 0 to 100"),
    ("image.tif x.zarr --inferer#prcentiles [0,1]", "the nearest valid key is 'percentiles'"),
    ("image.tif x.zarr --seed x", "unknown flag --seed; "),
    ("image.tif x.zarr --scor_threshold 0.2", "unknown flag --scor_threshold; did you mean --score_threshold?"),
    ("image.tif x.zarr --config_file cut.json", "config file cut.json is not valid JSON"),
    (
        "image.tif x.zarr --overlay list.json",
        "config file list.json holds no JSON object; a configuration is {key: value}",
    ),
    ("image.tif x.zarr --overlay bytes.json", "config file bytes.json is not valid JSON"),
    ("image.tif x.zarr --overlay folder.json", "overlay 'folder.json' does not exist; "),
    ("image.tif x.zarr --checkpoint no.pt", "'no.pt' does not exist; train first or give another checkpoint"),
    (
        "image.tif x.zarr --checkpoint text.pt",
        "'text.pt' is damaged or no checkpoint (File is not a zip file); give another",
    ),
    ("image.tif x.zarr --checkpoint cut.pt", "'cut.pt' is damaged or no checkpoint"),
    ("image.tif x.zarr --checkpoint other.pt", "'other.pt' does not fit the network"),
    (
        "image.tif x.zarr --checkpoint folder",
        "'folder' is a folder; give the checkpoint in it, such as 'folder/model.pt'",
    ),
    ("image.tif x.zarr --bundle folder", "bundle 'folder' has no folder configs; name a MONAI bundle's own folder"),
    ("image.tif x.zarr --bundle maskrcn3d", "bundle 'maskrcn3d' does not exist; did you mean maskrcnn3d?"),
]
SEAMS = [
    ("text.tif s.json", "text.tif: not a TIFF file"),
    ("plane.tif s.json", "have no Z"),
    ("nan.tif s.json", "is nan; replace NaN"),
    ("image.tif image.tif", "REPORT is 'image.tif'; give a name that ends in .json"),
    ("image.tif s.txt", "REPORT is 's.txt'; give a name that ends in .json"),
    ("image.tif folder.json", "REPORT 'folder.json' is a folder; give the name of a file"),
    ("image.tif no/s.json", "REPORT 'no/s.json': its folder does not exist; make it first"),
    ("image.tif s.json --block_size [6,9,66]", "there is no seam; pass a smaller block_size or a larger roi"),
    ("image.tif s.json --halo -1", "halo is [-1, -1, -1]; every value must be at least 0"),
    ("image.tif s.json --roi [0,0,0]", "pass six integers (z1, y1, x1, z2, y2, x2)"),
    ("image.tif s.json --channels 2", "channels=2 is not there"),
    ("image.tif s.json --checkpoint no.pt", "'no.pt' does not exist; train first"),
    ("image.tif s.json --device cuda:99", "device: 'cuda:99' is "),
    ("image.tif s.json --blok_size 3", "unknown flag --blok_size; did you mean --block_size?"),
]
RELABELS = [
    ("relabel no.zarr", "neither output no.zarr nor its journal exists; give what seg3d predict wrote"),
    ("relabel group.zarr", "the journal of group.zarr is gone; predict again"),
    ("relabel image.tif", "the journal of image.tif is gone; predict again"),
    ("relabel out.zarr --score_threshold 2", "score_threshold is 2; give a score in 0 to 1"),
    ("relabel out.zarr --score_threshold 0.1", "were not kept when out.zarr was predicted; give at least 0.7"),
    ("relabel out.zarr --min_volume -1", "min_volume is -1; pass an integer of at least 0"),
    ("relabel out.zarr --min_volume 1.5", "--min_volume = '1.5' is not an integer"),
    ("relabel out.zarr --num_workers 0", "num_workers is 0; pass an integer of at least 1"),
    ("relabel out.zarr --score_treshold 0.9", "unknown flag --score_treshold; did you mean --score_threshold?"),
]


def with_defaults(command: str, words: str) -> list[str]:
    """The row's words, and those of a whole command that it does not give itself."""
    own = shlex.split(words)
    rest = [*PREDICT, *GRID, "--spacing", SPACING]
    pairs = [(name, value) for name, value in zip(rest[::2], rest[1::2], strict=True) if name not in own]
    return [command, *own, *(word for pair in pairs for word in pair)]


@pytest.mark.parametrize(("words", "fragment"), PREDICTS, ids=[words for words, _ in PREDICTS])
def test_a_mistake_with_predict_leaves_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, with_defaults("predict", words), fragment)


@pytest.mark.parametrize(("words", "fragment"), SEAMS, ids=[words for words, _ in SEAMS])
def test_a_mistake_with_seam_check_leaves_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, with_defaults("seam-check", words), fragment)


@pytest.mark.parametrize(("words", "fragment"), RELABELS, ids=[words for words, _ in RELABELS])
def test_a_mistake_with_relabel_changes_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, words.split(), fragment)


def test_missing_words(place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, ["predict", "image.tif"], "predict: missing OUTPUT; see --help")
    refused_in(place, capsys, ["seam-check", "image.tif"], "seam-check: missing REPORT; see --help")
    refused_in(place, capsys, ["annotate", "suggest", "x.sqlite"], "suggest: missing --checkpoint and --output; see")
    refused_in(place, capsys, ["relabel"], "relabel: missing OUTPUT; see --help")


def test_the_other_device_is_checked_where_there_is_no_gpu(
    place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = with_defaults("predict", "image.tif x.zarr --device cuda")
    refused_in(place, capsys, words, "device: 'cuda' is asked for, and torch finds no GPU; give cpu")


def test_an_input_that_is_damaged_in_the_middle_goes_on_when_it_is_repaired(place: Path, capsys: Capsys) -> None:
    words = with_defaults("predict", "damaged.zarr x.zarr")
    line = refused_in(
        place, capsys, words, "chunk (1, 0, 1) is damaged", "or leave a hole there with --skip_bad", left=JOURNAL
    )
    assert "repair it and run the same command again, finished blocks are kept" in line
    refused_in(
        place, capsys, ["relabel", "x.zarr"], "x.zarr is not predicted yet; run `seg3d predict` to the end first"
    )
    (place / "x.journal.sqlite").unlink()
    assert main([*words, "--skip_bad"]) == 0
    assert "could not be read" in capsys.readouterr().out


JOURNAL = ["x.journal.sqlite"]


def test_more_memory_than_allowed_stops_after_a_block_that_is_kept(place: Path, capsys: Capsys) -> None:
    words = with_defaults("predict", "image.tif x.zarr")
    fragments = ["more than max_memory, 0.0 GB; pass a smaller block_size"]
    refused_in(place, capsys, [*words, "--max_memory", "1KB"], *fragments, left=JOURNAL)
    capsys.readouterr()
    assert main(words) == 0
    assert "of 3 blocks predicted now" in capsys.readouterr().out


def test_a_journal_that_is_none_is_named(place: Path, capsys: Capsys) -> None:
    (place / "x.journal.sqlite").write_text("no database but words\n" * 40)
    refused_in(
        place, capsys, with_defaults("predict", "image.tif x.zarr"), "x.journal.sqlite cannot be used as a journal"
    )
    (place / "out.journal.sqlite").write_bytes(b"\0" * 30)
    refused_in(place, capsys, ["relabel", "out.zarr"], "out.journal.sqlite")


def test_the_bundle_is_named_where_it_lacks_its_configuration(place: Path, capsys: Capsys) -> None:
    (place / "bare" / "configs").mkdir(parents=True)
    words = ["predict", "image.tif", "x.zarr", "--bundle", "bare"]
    refused_in(place, capsys, words, "config file 'inference.json' does not exist; choose from: (none)")
    assert Path(BUNDLE, "configs", "inference.json").is_file()
