"""scripts/compare_peers: one division for all, post-processing and clocks of the contestants, results that are kept."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SPACING = (2.0, 0.5, 0.8)
SHAPE = (14, 48, 60)


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    """The folder of the modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def dataset(tmp_path):
    """Two volumes of each of four specimens, without splits; two cells in each, and voxels that nobody annotated."""
    shape = (4, 10, 12)
    label = np.zeros(shape, np.uint16)
    label[1:3, 2:5, 2:6], label[1:3, 6:9, 7:11], label[3] = 30, 70, 65535
    names = [f"{specimen}_{time}" for specimen in "ABCD" for time in (0, 1)]
    for number, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        image = np.random.default_rng(number).integers(0, 999, shape).astype(np.uint16)
        tifffile.imwrite(tmp_path / "data" / name / "image.tif", image, metadata={"axes": "ZYX"})
        tifffile.imwrite(tmp_path / "data" / name / "labels.tif", label, metadata={"axes": "ZYX"})
    lines = ["volume,spacing_z_um,spacing_y_um,spacing_x_um", *(f"{name},2.0,0.5,0.8" for name in names)]
    (tmp_path / "data" / "index.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def options_of(dataset, **changes):
    """Options of a race whose specimens are A and B to train, C to tune, D to judge."""
    from peers.options import Options

    (dataset.parent / "race").mkdir(exist_ok=True)
    options = Options(
        folder=dataset.parent / "race",
        dataset_dir=dataset,
        minutes=0.01,
        seeds=(0,),
        threads=1,
        specimen_pattern="^[^_]+",
        val_specimens=("D",),
        tune_specimens=("C",),
        train_on_tuned=False,
        bundle="maskrcnn3d",
        overlays=(),
        tune=False,
        curve_steps=None,
        stardist_python=None,
        is_quick=True,
        restart=False,
    )
    return replace(options, **changes)


def request_of(folder, **changes):
    """A request over volumes in `folder`."""
    from peers.exchange import Request

    values = {"volumes": str(folder), "train": [], "tune": [], "val": [], "minutes": 0.01, "seed": 0, "threads": 1}
    return Request(folder=str(folder), is_quick=True, settings={}, **(values | changes))


def test_clock_leaves_out_the_start_and_pauses():
    from peers.clock import TrainingClock

    times = iter([100.0, 103.0, 105.0, 900.0, 904.0, 906.0])
    clock = TrainingClock(10.0, now=lambda: next(times))
    clock.go_on()  # before the first step there is nothing to go on with
    assert clock.step_s is None
    for _ in range(3):
        clock.step()
    assert (clock.steps, clock.elapsed, clock.is_over) == (3, 5.0, False)
    clock.pause()
    clock.go_on()
    clock.step()
    assert (clock.elapsed, clock.is_over, clock.step_s) == (9.0, False, 3.0)
    clock.step()
    assert (clock.steps, clock.elapsed, clock.is_over) == (5, 11.0, True)


def test_stardists_patches_turn_with_their_labels():
    from peers.stardist_augmentation import augmented

    np.random.seed(0)  # noqa: NPY002
    labels = np.arange(2 * 5 * 5).reshape(2, 5, 5)
    ways, contrasts = set(), []
    for _ in range(80):
        image, turned = augmented(labels.astype(np.float64), labels)
        contrast = (image.max() - image.min()) / 49
        np.testing.assert_allclose(image, turned * contrast + image.min(), atol=1e-9)
        assert [set(plane.ravel()) for plane in turned] == [set(plane.ravel()) for plane in labels]
        ways.add(turned.tobytes())
        contrasts.append(contrast)
    assert len(ways) == 8
    assert 0.6 <= min(contrasts) < 0.8 < 1.8 < max(contrasts) <= 2.0
    oblong = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    turned = [augmented(oblong, oblong)[1] for _ in range(40)]
    assert {array.shape for array in turned} == {(2, 3, 5)}
    assert len({array.tobytes() for array in turned}) == 4


def test_volumes_are_divided_by_specimen(dataset):
    from peers.volumes import divided

    division = divided(options_of(dataset))
    assert [row.name for row in division.train] == ["A_0", "A_1", "B_0", "B_1"]
    assert [row.name for row in division.tune] == ["C_0", "C_1"]
    assert [row.name for row in division.val] == ["D_0", "D_1"]
    splits = {row.name[0]: row.split for row in division.split_rows()}
    assert splits == {"A": "train", "B": "train", "C": "val", "D": "test"}
    both = divided(options_of(dataset, train_on_tuned=True))
    assert [row.specimen for row in both.train] == ["A", "A", "B", "B", "C", "C"]
    assert both.tune == division.tune
    assert [row.name for row in both.rows()] == [row.name for row in division.rows()]
    assert {row.name[0]: row.split for row in both.split_rows()} == {**splits, "C": "train"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_specimens": ("D", "E")}, "--val_specimens E: choose among A, B, C, D"),
        ({"tune_specimens": ("Z",)}, "--tune_specimens Z: choose among A, B, C, D"),
        ({"tune_specimens": ("D",)}, "D: in --val_specimens and --tune_specimens"),
        ({"tune_specimens": ("A", "B", "C")}, "no labelled volume is left for train"),
    ],
)
def test_divisions_that_leave_nothing_are_refused(dataset, changes, message):
    from peers.volumes import divided

    with pytest.raises(ValueError, match=message):
        divided(options_of(dataset, **changes))


def test_all_get_the_same_arrays_and_ours_the_same_splits(dataset):
    from peers.exchange import read_volume
    from peers.volumes import divided, write_race
    from seg3d_monai.data import read_manifest

    options = options_of(dataset)
    write_race(divided(options), options.folder)
    volume = read_volume(options.folder / "volumes", "C_1")
    np.testing.assert_array_equal(volume.image, tifffile.imread(dataset / "C_1" / "image.tif"))
    expected = np.zeros((4, 10, 12), np.int16)
    expected[1:3, 2:5, 2:6], expected[1:3, 6:9, 7:11], expected[3] = 1, 2, -1
    np.testing.assert_array_equal(volume.labels, expected)
    assert volume.labels.dtype == np.int16
    assert volume.spacing_um == (2.0, 0.5, 0.8)
    rows = read_manifest(options.folder / "manifest.json").rows
    assert {row.specimen: row.split for row in rows} == {"A": "train", "B": "train", "C": "val", "D": "test"}
    assert len(rows) == len(list((options.folder / "volumes").iterdir())) == 8


def test_predictions_are_timed_warm_and_judged_by_the_packages_metrics(tmp_path):
    from peers.exchange import RaceVolume, predict_all, write_volume
    from peers.race import judged

    truth = np.zeros((2, 6, 8), np.int16)
    truth[:, 1:3, 1:3], truth[:, 4:6, 4:8], truth[:, 0] = 1, 2, -1
    for name, image in (("a", truth), ("b", 0 * truth)):
        write_volume(tmp_path, RaceVolume(name, image.astype(np.uint16), truth, SPACING))
    calls = []

    def predict(image, spacing_um):
        calls.append(spacing_um)
        return np.where(image == 2, 5, 0) if image.any() else image

    request = request_of(tmp_path, val=["a", "b"])
    rows = predict_all(request, predict)
    assert calls == [SPACING] * 3  # the first volume once more
    assert [(row["name"], row["voxels"]) for row in rows] == [("a", 96), ("b", 96)]
    assert min(row["seconds"] for row in rows) > 0
    found = judged(request)
    # Of four true objects one is found, whole.
    assert (found["tp"], found["fp"], found["fn"]) == (1, 0, 3)
    assert (found["f1_50"], found["f1_70"], found["seg"], found["precision"]) == (0.4, 0.4, 0.25, 1.0)
    assert (found["num_truth"], found["num_volumes"]) == (4, 2)


def test_results_are_kept_and_those_of_another_race_refused(dataset):
    from peers.race import race
    from peers.volumes import divided

    options = options_of(dataset)
    division = divided(options)
    (first,) = race(options, division, ["otsu"], None)
    assert first["contestant"] == "otsu"
    assert first["seed"] is first["minutes"] is first["steps"] is None
    assert first["num_truth"] == 4
    log = options.folder / "runs" / "otsu_0" / "log.txt"
    log.write_text("untouched")
    assert list(race(options, division, ["otsu"], None)) == [first]
    assert log.read_text() == "untouched"
    other = replace(options, tune_specimens=("B",))
    with pytest.raises(ValueError, match=r"otsu_0.json is of another race \(train, tune differ\); give --restart"):
        list(race(other, divided(other), ["otsu"], None))
    (anew,) = race(replace(other, restart=True), divided(other), ["otsu"], None)
    assert anew["f1_50"] == first["f1_50"]
    assert log.read_text() != "untouched"


def test_a_contestant_that_fails_does_not_end_the_race(dataset, tmp_path, capsys):
    from peers.race import race
    from peers.volumes import divided

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no tensorflow here\nexit 3\n")
    python.chmod(0o755)
    options = options_of(dataset)
    failed, otsu = race(options, divided(options), ["stardist", "otsu"], python)
    assert failed["contestant"] == "stardist"
    assert "exit code 3" in failed["error"]
    assert "no tensorflow here" in failed["error"]
    assert "no tensorflow here" in capsys.readouterr().err
    assert otsu["contestant"] == "otsu"
    assert [path.name for path in (options.folder / "results").iterdir()] == ["otsu_0.json"]


def test_ours_runs_the_commands_that_users_run(tmp_path, monkeypatch):
    from peers import ours

    calls = []
    monkeypatch.setattr(ours, "run_process", lambda words, **_: calls.append(words))
    settings = {"bundle": "maskrcnn3d", "overlays": ["a", "b"], "tune": True, "manifest": "m.json", "curve_steps": None}
    request = replace(request_of(tmp_path, minutes=2.5, seed=7, train=["x", "y"], tune=["z"]), settings=settings)
    ours.train_and_tune(replace(request, is_quick=False), tmp_path / "log.txt")
    train, tune = calls
    assert train[:4] == ["-m", "seg3d_monai", "train", "maskrcnn3d"]
    pairs = dict(zip(train[4::2], train[5::2], strict=True))
    assert pairs["--overlay"] == "a,b"
    assert (pairs["--dataset_dir"], pairs["--max_minutes"], pairs["--seed"]) == ("m.json", "2.5", "7")
    assert pairs["--index#val_specimens"] == "[]"
    assert pairs["--resume"] == "true"
    assert not {name for name in pairs if "snapshot" in name or "keep" in name}
    assert tune[:4] == ["-m", "seg3d_monai", "tune", "maskrcnn3d"]
    pairs = dict(zip(tune[4::2], tune[5::2], strict=True))
    assert pairs["--tune_where"] == "name in ('z',)"
    assert pairs["--out"] == str(tmp_path / "tuned.json")
    calls.clear()
    assert ours.train_and_tune(replace(request, settings={**settings, "tune": False}), tmp_path / "log.txt") is None
    assert len(calls) == 1
    ours.train_and_tune(replace(request, settings={**settings, "curve_steps": 50}), tmp_path / "log.txt")
    pairs = dict(zip(calls[1][4::2], calls[1][5::2], strict=True))
    assert pairs["--snapshot_steps"] == "50"
    (keep,) = (name for name in pairs if name.endswith("#keep"))
    assert int(pairs[keep]) > 1000


def test_ours_goes_on_where_it_was_stopped_if_nothing_has_changed(dataset):
    from peers.race import request_for
    from peers.volumes import divided

    options = options_of(dataset)
    division = divided(options)
    request = request_for(options, division, "ours", 3)
    request.write()
    last = Path(request.folder) / "run" / "last.pt"

    def is_kept(chosen=options, name="ours"):
        last.parent.mkdir(parents=True, exist_ok=True)
        last.write_text("a checkpoint")
        request_for(chosen, division, name, 3)
        kept = last.exists()
        Path(request.folder).mkdir(exist_ok=True)
        request.write()
        return kept

    assert is_kept()
    assert not is_kept(replace(options, minutes=options.minutes + 1))
    assert not is_kept(replace(options, restart=True))
    last.unlink(missing_ok=True)
    request_for(options, division, "ours", 3)
    assert not request.path.exists(), "nothing was trained: it begins anew"


def row_of(contestant, seed, f1):
    """A result with one number."""
    from peers.race import SCORES

    scores = dict.fromkeys(SCORES, 0.5) | {"f1_50": f1, "tp": 7, "fp": 2, "fn": 3, "mvoxel_per_s": 1.25}
    return {"contestant": contestant, "seed": seed, "minutes": 40.0, "steps": 1200, "step_s": 2.0, **scores}


def test_report_has_a_line_for_each_run_and_a_mean_over_seeds(tmp_path):
    from peers.figure import draw
    from peers.race import summary
    from peers.report import curve_table, race_table, summary_table

    failed = {"contestant": "stardist", "seed": 0, "minutes": 40.0, "error": "killed"}
    otsu = row_of("otsu", None, 0.7) | {"minutes": None, "steps": None, "step_s": None}
    rows = [row_of("ours", 0, 0.8), failed, row_of("ours", 1, 0.9), otsu]
    lines = race_table(rows).splitlines()[2:]
    assert lines[0].split() == [
        *("ours", "seed", "0", "40", "1,200", "2.00", "0.800"),
        *(["0.500"] * 6),
        *("7", "/", "2", "/", "3", "1.25"),
    ]
    assert lines[1].split() == ["stardist", "seed", "0", "40", "failed"]
    assert lines[3].split()[:2] == ["otsu", "0.700"]
    states = [{**row_of("ours", 0, f1), "minutes": minutes, "steps": 50} for minutes, f1 in ((9.87, 0.6), (20.1, 0.7))]
    lines = curve_table({**rows[0], "curve": states}).splitlines()
    assert lines[0].startswith("ours, seed 0: minutes")
    assert [line.split()[:3] for line in lines[2:]] == [["9.9", "50", "0.600"], ["20.1", "50", "0.700"]]
    draw([{**rows[0], "curve": states}, *rows[1:]], tmp_path / "race.svg")
    drawn = (tmp_path / "race.svg").read_text()
    draw([{**rows[0], "curve": states}, *rows[1:]], tmp_path / "again.svg")
    assert drawn == (tmp_path / "again.svg").read_text()
    assert "F1@0.7" in drawn
    (mean,) = summary(rows)
    assert mean["contestant"] == "ours"
    assert mean["f1_50"]["mean"] == pytest.approx(0.85)
    assert mean["f1_50"]["sd"] == pytest.approx(0.0707107)
    assert "0.850 ± 0.071" in summary_table([mean])
    assert summary([failed, otsu]) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes is 0; it must be more than 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--threads", "5000"], "--threads is 5000, but there are"),
        (["--curve_steps", "0"], "--curve_steps is 0"),
        (["--figure", "nowhere/race.svg"], "its folder does not exist"),
        (["--seeds", "1", "1"], "--seeds 1 1: give different numbers"),
        (["--dataset_dir", "nowhere"], "--dataset_dir nowhere does not exist"),
        (["--only", "stardist", "--stardist_python", "nowhere"], "--stardist_python nowhere is no file"),
    ],
)
def test_mistakes_are_refused_in_one_line(words, message):
    environment = {**os.environ, "PYTHON": sys.executable}
    shown = subprocess.run(
        [str(SCRIPTS / "compare_peers"), "--quick", *words], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert message in shown.stderr
    assert shown.stderr.startswith("compare_peers: error: ")


def test_quick_run_writes_what_it_promises(tmp_path):
    file = tmp_path / "deeper" / "quick.json"
    words = ["--quick", "--only", "unet", "otsu", "--threads", "1", "--folder", str(tmp_path / "race")]
    shown = subprocess.run(
        [str(SCRIPTS / "compare_peers"), *words, "--json", str(file)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    result = json.loads(file.read_text())
    assert result["is_quick"] is True
    assert {"hardware", "versions", "operators", "method", "command"} <= set(result)
    assert result["data"]["train"]["num_volumes"] == 2
    unet, otsu = result["contestants"]
    assert (unet["contestant"], unet["seed"], otsu["contestant"], otsu["seed"]) == ("unet", 0, "otsu", None)
    assert unet["steps"] >= 1
    assert unet["train_s"] >= 60 * unet["minutes"]
    assert unet["step_s"] == pytest.approx(unet["train_s"] / unet["steps"])
    assert unet["tuned"]["num_truth"] > 0
    for row in (unet, otsu):
        assert row["num_truth"] == row["tp"] + row["fn"] > 0
        assert row["mvoxel_per_s"] > 0
        assert [one["voxels"] for one in row["predicted"]] == [24 * 64 * 64]
    assert otsu["f1_50"] > 0
    assert "QUICK" in shown
    assert [line.split()[0] for line in shown.splitlines()[-2:]] == ["unet", "otsu"]
