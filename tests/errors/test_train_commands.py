"""Mistakes with train and tune: one line, exit code 2, before anything is computed.

What is found once the data are indexed leaves the folder of the run with its configuration and index, which the right
command takes over; nothing that looks like weights or a result.

Elsewhere: unknown keys, sections and overlays (tests/test_cli.py, tests/bundles/test_bundles.py), checkpoints that are
damaged or of another network (tests/engine/test_checkpoint.py), arguments of the trainer (test_trainer.py), metrics,
candidates and existing overlays of a search (tests/bundles/test_tune.py), signals under Ray (test_ray_launch.py).
"""

import shlex
from pathlib import Path

import pytest
from error_toys import TRAIN, TUNE, refused_in, with_changes

from seg3d_monai.cli import main

Capsys = pytest.CaptureFixture[str]

AT_ONCE = [
    ("--dataset_dir no", "no: no such file or folder"),
    ("--dataset_dir text.tif", "header: column 'image' is missing"),
    ("--dataset_dir folder", "holds neither manifest.csv nor volumes laid out as NAME/image.tif"),
    ("--dataset_dir list.json", "list.json: must hold a list of objects"),
    ("--output_dir image.tif", "image.tif; choose another name"),
    ("--output_dir image.tif/x", "Not a directory: "),
    ("--device gpu", "device: 'gpu' is no device; give cpu, cuda or cuda:1"),
    ("--seed x", "seed: 'x' is no seed; give an integer >= 0"),
    ("--seed -1", "seed: -1 is no seed; give an integer >= 0"),
    ("--crop_size [0,1,1]", "crop_size=[0, 1, 1] is not three voxel counts of at least 1; give (z, y, x)"),
    ("--crop_size 16", "crop_size=16 is not three voxel counts; give (z, y, x)"),
    ("--initial_weights no.pt", "'no.pt' does not exist; train first or give another checkpoint"),
    ("--initial_weights text.pt", "'text.pt' is damaged or no checkpoint"),
    ("--initial_weights other.pt", "'other.pt' does not fit the network"),
    ("--backbone_weights folder", "'folder' is a folder; give the checkpoint in it"),
    ("--train_workers 0", "train_workers=0 cannot be used; give an integer >= 1"),
    ("--index#val_fraction 2", "val_fraction=2 is outside [0, 1); give the fraction"),
    ("--index#val_specimens [sx]", "the manifest has a column 'split'; remove it, or give no specimens"),
    ("--index#where 'qualty > 2'", "there is no column 'qualty', the nearest is 'quality_image'"),
    ("--backbone#depth 11", "depth is 11; choose one of 10, 18, 34, 50, 101"),
    ("--backbone#widht 3", "the nearest valid key is 'width'"),
    ("--network_def#mask_roi_size [1,1]", "output_size is [1, 1]; give three positive integers (z, y, x)"),
    ('--loss#weights {"bx":1}', "weights ['bx'] are not losses; choose from"),
    ("--train#traner#amp off", "unknown flag --train#traner#amp; did you mean --train#trainer?"),
    ("--paradigm seg3d_monai.engine.InstanceTrener", "the nearest valid name is 'seg3d_monai.engine.InstanceTrainer'"),
    ("--learning-rte 3", "unknown flag --learning_rte; did you mean --learning_rate?"),
    ("--overlay list.json", "config file list.json holds no JSON object"),
    ("--overlay folder.json", "overlay 'folder.json' does not exist"),
    ("--config_file cut.json", "config file cut.json is not valid JSON"),
]
ONCE_INDEXED = [
    ("--in_channels 2", "in_channels=2, and the volumes have 1; give that many"),
    ("--num_classes 0", "num_classes=0 is no number of classes; give an integer >= 1"),
    ("--batch_size 0", "batch_size=0 cannot be used; give an integer >= 1"),
    ("--batch_size two", "batch_size='two' cannot be used; give an integer >= 1"),
    ("--num_workers -1", "num_workers=-1 cannot be used; give an integer >= 0"),
    ("--learning_rate -1", "learning_rate=-1 cannot be used; give a number > 0"),
    ("--learning_rate fast", "learning_rate='fast' cannot be used; give a number > 0"),
    ("--max_minutes -1", "max_minutes=-1 cannot be used; give a number > 0, or None"),
    ("--amp half", "amp='half' on cpu; choose one of auto, off, bf16"),
    ("--target_spacing_um [1,1]", "target_spacing_um=[1, 1] is not three positive numbers"),
    ("--val_interval 0", "interval=0, minutes=None: validation needs positive numbers"),
    ("--patience 0", "patience=0"),
    ("--snapshot_steps 0", "snapshot_steps=0 is not positive; give a number > 0, or null"),
    ("--score_threshold 2", "score_threshold is 2; give a score in 0 to 1"),
    ("--block_size 0", "block_size is [0, 0, 0]; every value must be at least 1"),
    ("--halo -1", "halo is [-1, -1, -1]; every value must be at least 0"),
    ("--flips [q]", "flips is ['q']; name some of the axes z, y and x"),
    ("--train#dataset#split trian", "split='trian' is unknown; use one of train, val, test"),
    ("--train#dataset#num_samples 0", "num_samples=0 leaves nothing to draw; use 1 or more"),
    ("--train#dataset#balance fair", "balance='fair' is unknown; use one of volume, specimen, crop, instance"),
    ("--train#trainer#max_epochs 0", "max_epochs=0 cannot be used; give an integer > 0"),
]
BEGUN = ["new", "new/config.json", "new/crops.sqlite", "new/environment.json"]
SEARCH_AT_ONCE = [
    ("--output_dir image.tif", "output_dir='image.tif/tuning' cannot be written"),
    ("--checkpoint no.pt", "checkpoint='no.pt' does not exist; train first or give another one"),
    ("--checkpoint folder", "checkpoint='folder' does not exist"),
    ("--out x.txt", "out='x.txt' does not end in .json, as the name of an overlay must; give another one"),
    ("--out list.json", "list.json exists; choose another file with --out, or write over it with --restart"),
    ("--out folder.json", "folder.json exists; choose another file"),
    ("--device gpu", "device: 'gpu' is no device"),
    ("--flips x", "--flips = 'x' is not a list of names such as"),
    ("--block_size 16", "--block_size = '16' is not a list of integers"),
    ("--metrc seg", "unknown flag --metrc; did you mean --metric?"),
]
SEARCH_ONCE_INDEXED = [
    ("--checkpoint text.pt", "'text.pt' is damaged or no checkpoint"),
    ("--checkpoint other.pt", "'other.pt' does not fit the network"),
    ("--tune_split trian", "split='trian' is unknown; use one of train, val, test"),
    ("--tune_where 'qualty > 2'", "the nearest is 'quality_image'"),
    ("--metric f1_50+", "metric='f1_50+' holds '', which is no metric; choose from f1_10"),
    ("--metric __import__('os')", "which is no metric; choose from f1_10"),
    ("--flips [q]", "flips is ['q']; name some of the axes z, y and x"),
    ("--block_size [0,1,1]", "block_size is [0, 1, 1]; every value must be at least 1"),
    ("--halo [-1,0,0]", "halo is [-1, 0, 0]; every value must be at least 0"),
    ("--least_score 2", "least_score is 2; give a score in 0 to 1"),
]
SEARCH_BEGUN = ["run/crops.sqlite", "run/tuning", "run/tuning/config.json", "run/tuning/environment.json"]


@pytest.mark.parametrize(("words", "fragment"), AT_ONCE, ids=[words for words, _ in AT_ONCE])
def test_a_mistake_with_train_changes_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, with_changes(TRAIN, *shlex.split(words, posix="'" in words)), fragment)


@pytest.mark.parametrize(("words", "fragment"), ONCE_INDEXED, ids=[words for words, _ in ONCE_INDEXED])
def test_a_mistake_with_train_is_found_before_the_first_step(
    words: str, fragment: str, place: Path, capsys: Capsys
) -> None:
    refused_in(place, capsys, with_changes(TRAIN, *words.split()), fragment, left=BEGUN)


@pytest.mark.parametrize(("words", "fragment"), SEARCH_AT_ONCE, ids=[words for words, _ in SEARCH_AT_ONCE])
def test_a_mistake_with_tune_changes_nothing(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, with_changes(TUNE, *words.split()), fragment)


@pytest.mark.parametrize(("words", "fragment"), SEARCH_ONCE_INDEXED, ids=[words for words, _ in SEARCH_ONCE_INDEXED])
def test_a_mistake_with_tune_is_found_before_the_search(words: str, fragment: str, place: Path, capsys: Capsys) -> None:
    own = shlex.split(words) if "tune_where" in words else words.split()
    refused_in(place, capsys, with_changes(TUNE, *own), fragment, left=SEARCH_BEGUN)


@pytest.mark.parametrize("bundle", ["maskrcnn3d", "maskdino3d", "mask2former3d"])
def test_classes_that_the_network_does_not_know(bundle: str, place: Path, capsys: Capsys) -> None:
    manifest = place / "data" / "manifest.csv"
    first, *rows = manifest.read_text().splitlines()
    manifest.write_text("\n".join([f"{first},class", *(f"{row},2" for row in rows)]) + "\n")
    words = [str(Path(TRAIN[1]).parent / bundle) if word == TRAIN[1] else word for word in TRAIN]
    words = [*words[:6], "--crop_size", "[6,9,32]", "--device", "cpu"]
    message = "num_classes=1, and v0 has objects of class 2; classes count from 0, so give 3 or more"
    refused_in(place, capsys, words, message, left=BEGUN)


def test_a_training_takes_over_what_a_mistake_has_left(place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, with_changes(TRAIN, "--batch_size", "0"), "batch_size=0 cannot be used", left=BEGUN)
    assert main([*TRAIN, "--resume", "True"]) == 0  # there is nothing to resume
    assert (place / "new" / "model.pt").is_file()
    assert main(["report", "new", "--score_threshold", "0.05"]) == 0
    fragment = "the checkpoint's epochs have 1 batches, now 2; start again in another output_dir"
    left = {f"new/{name}" for name in ("config.json", "environment.json")}
    words = with_changes(TRAIN, "--train#dataset#num_samples", "4")
    before = (place / "new" / "last.pt").read_bytes()
    refused_in(place, capsys, [*words, "--resume", "True"], fragment, left=sorted(left - {"new/environment.json"}))
    assert (place / "new" / "last.pt").read_bytes() == before


def test_missing_words(place: Path, capsys: Capsys) -> None:
    refused_in(place, capsys, ["train"], "train: missing BUNDLE; see --help")
    refused_in(place, capsys, ["train", "maskdin3d"], "bundle 'maskdin3d' does not exist; did you mean maskdino3d?")
    refused_in(place, capsys, ["tune", TRAIN[1]], "tune: missing --output_dir; see --help")
