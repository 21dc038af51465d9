"""A disk that is full, for every command that writes: one line that names the file and what to do, exit code 2.

What was there before stays; of what was begun, nothing bears the name of a whole output; after room is made, the same
command gives what it gives on an empty disk.

Elsewhere: a full disk in the middle of a conversion, a prediction and a training, by function
(tests/data/test_convert.py, tests/inference/test_predict_faults.py, tests/engine/test_checkpoint.py,
test_snapshots.py).
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from error_toys import BUNDLE, GRID, PREDICT, SPACING, SUGGEST, TRAIN, TUNE, changed, listing, refusal
from full_disk import FullDisk

from seg3d_monai.cli import main

Capsys = pytest.CaptureFixture[str]
SPECIMEN = ["--train_volumes", "1", "--train_shape", "[8,16,16]", "--val_volumes", "0", "--test_shape", "[8,16,16]"]
CUBE = ["--spacing", "[2,1,1]", "--rounds", "1", "--num_scenes", "12"]
MEND = "make room and give the same command again"
# words; what the line names; the output that there must not be; paths that may be left, of which "x*" is all in x
COMMANDS: dict[str, tuple[list[str], str, str, set[str]]] = {
    "synth": (["synth", "out", *SPECIMEN], "out", "out/manifest.csv", {"out", "out/specimen.json"}),
    "synth a stack": (
        ["synth", "out", "--stream", *SPECIMEN],
        *("out", "out/manifest.csv", {"out", "out/specimen.json", "out/.partial-test_0*"}),
    ),
    "match": (["match", "cube.tif", "own.json", *CUBE], "own.json", "own.json", set()),
    "convert": (["convert", "image.tif", "x.zarr"], "x.zarr", "x.zarr", {"x.zarr.partial*"}),
    "plan": (
        ["plan", "crops.sqlite", "--output", "plan", "--bundle", "maskrcnn3d"],
        *("plan/fingerprint.json", "plan/maskrcnn3d_train.json", {"plan"}),
    ),
    "predict": (
        ["predict", "image.tif", "x.zarr", "--spacing", SPACING, *PREDICT, *GRID, "--table", "csv"],
        *("x.zarr", "x.zarr", {"x.journal.sqlite", "x.zarr.partial*"}),
    ),
    "seam-check": (["seam-check", "image.tif", "s.json", *PREDICT, *GRID], "s.json", "s.json", set()),
    "relabel": (
        ["relabel", "out.zarr", "--score_threshold", "0.95"],
        *("out.zarr", "", {"out.journal.sqlite", "out.zarr.partial*"}),
    ),
    "measure": (["measure", "out.zarr", "image.tif", "--table", "m.csv"], "m.csv", "m.csv", set()),
    "evaluate": (["evaluate", "labels.tif", "out.zarr", "--json", "n.json"], "n.json", "n.json", set()),
    "report": (["report", "out.zarr", "--image", "image.tif"], "out.report.html", "out.report.html", set()),
    "annotate suggest": ([*SUGGEST, "--output", "new"], "new", "new", {"new.partial*"}),
    "annotate import": (
        ["annotate", "import", "regions", "data/manifest.csv", "--accept_unchanged", "--replace_known"],
        *("regions", "regions/manifest.csv", {"regions/labels*"}),
    ),
    "bundle check": (["bundle", "check", "toy", "--json", "c.json"], "c.json", "c.json", set()),
    "bundle pack": (["bundle", "pack", BUNDLE, "x.zip"], "x.zip", "x.zip", set()),
    "train": (TRAIN, "new", "new/model.pt", {"new", "new/crops.sqlite"}),
    "tune": (TUNE, "run", "run/tuned.json", {"run/tuning"}),
}


def is_allowed(path: str, allowed: set[str]) -> bool:
    return any(path == one or (one.endswith("*") and f"{path}/".startswith(f"{one[:-1]}/")) for one in allowed)


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_can_be_written(name: str, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    words, named, output, allowed = COMMANDS[name]
    before = listing(place)
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, place)
        line = refusal(capsys, words, "No space left on device", MEND)
        assert disk.failures > 0
    assert f"No space left on device: {named}; {MEND}" in line
    left = changed(before, listing(place))
    assert {path for path in left if not is_allowed(path, allowed)} == set()
    assert not output or not (place / output).exists()
    assert main(words) == 0
    assert not output or (place / output).exists()
    partial = [path for path in listing(place) if ".partial" in path or path.endswith((".part", ".tmp"))]
    assert [path for path in partial if not path.startswith("half.zarr")] == []


@pytest.mark.parametrize("room", [2_000, 4_500, 9_000])
def test_a_specimen_that_does_not_fit_goes_on(
    room: int, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = COMMANDS["synth a stack"][0]
    assert main(words) == 0
    whole = {path: content for path, content in listing(place).items() if path.startswith("out/")}
    second = [words[0], "again", *words[2:]]
    with monkeypatch.context() as patch:
        FullDisk(patch, place, room=room)
        refusal(capsys, second, "No space left on device: again", MEND)
    assert not (place / "again" / "manifest.csv").exists()
    assert main(second) == 0
    found = {path.replace("again/", "out/", 1): content for path, content in listing(place).items() if "again/" in path}
    assert found == whole


def test_a_plan_that_was_half_written_is_no_other_plan(
    place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = COMMANDS["plan"][0]
    with monkeypatch.context() as patch:
        FullDisk(patch, place, room=3_000)
        refusal(capsys, words, "No space left on device: plan/")
    assert (place / "plan" / "fingerprint.json").exists()
    assert main(words) == 0  # without --restart


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within it no file grows beyond so many bytes, whoever writes it, as where a quota is used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


QUOTA = "the quota may be used up, or the disk fails: mend that and give the same command again"
LARGE = [  # what C code writes: SQLite, Parquet, torch's archives
    ("index data/manifest.csv x.sqlite --num_workers 1", 20_000, f"x.sqlite; {QUOTA}", {"x.sqlite.building"}),
    ("measure out.zarr image.tif", 1_000, f"File too large: out.zarr; {MEND}", set()),
    ("relabel out.zarr --score_threshold 0.95", 3_000, f"in the journal; {QUOTA}", set()),
    (f"bundle pack {BUNDLE} x.zip --checkpoint model.pt", 10_000, f"File too large: x.zip; {MEND}", set()),
]


@pytest.mark.parametrize(("words", "size", "fragment", "left"), LARGE, ids=[words.split()[0] for words, *_ in LARGE])
def test_what_is_written_by_others_is_told_too(
    words: str, size: int, fragment: str, left: set[str], place: Path, capsys: Capsys
) -> None:
    before = listing(place)
    with largest_file(size):
        refusal(capsys, words.split(), fragment)
    assert changed(before, listing(place)) <= left
    assert main(words.split()) == 0


@pytest.mark.parametrize(
    ("size", "left"),
    [
        (100_000, {"new", "new/crops.sqlite.building"}),
        (
            213_500,
            {"new", *(f"new/{name}" for name in ("config.json", "environment.json", "crops.sqlite", "validation.csv"))},
        ),
    ],
    ids=["its index", "its weights"],
)
def test_a_training_whose_quota_is_used_up(size: int, left: set[str], place: Path, capsys: Capsys) -> None:
    before = listing(place)
    with largest_file(size):
        refusal(capsys, TRAIN, "give the same command again")
    assert changed(before, listing(place)) <= left
    assert main(TRAIN) == 0
    assert (place / "new" / "model.pt").is_file()


def test_a_prediction_whose_quota_is_used_up(place: Path, capsys: Capsys) -> None:
    words = COMMANDS["predict"][0]
    before = listing(place)
    with largest_file(20_000):
        refusal(capsys, words, "Input/output error in the journal", QUOTA)
    assert changed(before, listing(place)) == {"x.journal.sqlite"}
    assert main(words) == 0
    assert (place / "x.instances.csv").is_file()
