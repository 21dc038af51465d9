"""scripts/bench_stress: its volumes are what they are called, its commands those of users, and what is done is kept."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
NUCLEUS_UM = 12


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The folder of the benchmark's modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def options_of(folder, **changes):
    """Options of a stress of two ratios."""
    from bench.stress.options import Options

    options = Options(
        folder=folder,
        ratios=(1.0, 3.0),
        steps=7,
        threads=1,
        bundle="maskrcnn3d",
        overlays=(),
        seed=5,
        is_quick=True,
        restart=False,
    )
    return replace(options, **changes)


def row_of(way, f1, caps=()):
    """A prediction with few numbers."""
    scores = {"f1_50": f1, "f1_70": 0.5, "precision": 0.75, "recall": 0.25, "caps": list(caps)}
    truth = {"num_objects": 380, "shape": [16, 119, 148], "labelled_share": 0.478, "touching_share": 0.994}
    truth |= {"cut_share": 0.576, "median_planes": 2.5}
    return {"ratio": 6.0, "volume": "packed_400", "way": way, "num_blocks": 4, "num_predicted": 371, **truth, **scores}


def training_of(ratio, caps=()):
    """A training with few numbers."""
    settings = {"crop_size": [8, 48, 64], "batch_size": 2, "block_size": [8, 64, 64], "halo": [4, 20, 24]}
    facts = {"num_volumes": 11, "num_objects": 540, "steps": 1500, "step_s": 0.5, "settings": settings}
    return {"ratio": ratio, **facts, "caps": list(caps)}


def test_crowding_of_a_toy_is_as_counted_by_hand():
    from bench.stress.volumes import crowding

    labels = np.zeros((3, 6, 8), np.uint32)
    labels[:2, :2, :2] = 1
    labels[:2, :2, 2:4] = 2  # a face in common with 1
    labels[1, 2, 4] = 3  # an edge in common with 2
    labels[2, 4:, 6:] = 4  # alone
    assert crowding(labels) == {
        "num_objects": 4,
        "labelled_share": 21 / 144,
        "touching_share": 2 / 4,
        "cut_share": 3 / 4,
        "median_planes": 1.5,
    }
    labels[1, 2, 3] = 3
    assert crowding(labels)["touching_share"] == 3 / 4
    assert crowding(0 * labels)["num_objects"] == crowding(0 * labels)["touching_share"] == 0
    assert crowding(np.ones_like(labels))["touching_share"] == 0


@pytest.mark.parametrize("ratio", [1.0, 3.0, 6.0])
def test_volumes_have_room_for_the_objects_that_are_asked_for(ratio):
    from bench.stress.volumes import NUCLEI, TESTS, TRAIN_UM, shape_for, shape_of, spacing_of

    spacing = spacing_of(ratio)
    assert spacing == pytest.approx((0.7 * ratio, 0.7, 0.7))
    assert [name for name, _ in TESTS] == ["sparse", "crowded", "packed", "packed"]
    for name, num_objects in TESTS:
        shape = shape_for(num_objects, NUCLEI[name].density, spacing)
        lengths = np.array(shape) * spacing
        assert NUCLEI[name].density * lengths.prod() == pytest.approx(num_objects, rel=0.05)
        assert lengths.min() > 2.5 * NUCLEUS_UM
        assert lengths[0] < 0.9 * lengths[1] < 0.8 * lengths[2]  # no cube
        assert len(set(shape)) == 3
    assert np.array(shape_of(TRAIN_UM, spacing)) * spacing == pytest.approx(TRAIN_UM, rel=0.05)


def test_packed_volumes_are_packed_and_sparse_ones_sparse():
    from bench.stress.volumes import NUCLEI, crowding, shape_for, spacing_of
    from seg3d_monai.data.synthetic import make_volume

    found = {}
    for name, num_objects in (("sparse", 10), ("crowded", 40), ("packed", 80)):
        shape = shape_for(num_objects, NUCLEI[name].density, spacing_of(6))
        found[name] = crowding(make_volume(shape, seed=3, spacing_um=spacing_of(6), nuclei=NUCLEI[name])[1])
        assert 0.85 * num_objects <= found[name]["num_objects"] <= num_objects
        assert found[name]["median_planes"] >= 2
    sparse, crowded, packed = found.values()
    assert sparse["touching_share"] <= 0.2
    assert 0.5 < crowded["touching_share"] < packed["touching_share"]
    assert packed["touching_share"] > 0.9
    assert sparse["labelled_share"] < 0.05 < crowded["labelled_share"] < 0.25 < 0.4 < packed["labelled_share"]


def test_densities_share_one_manifest_and_the_seed_decides_all(tmp_path):
    from bench.stress.volumes import write_tests, write_training
    from seg3d_monai.data import read_manifest

    def images(folder, seed):
        manifest = write_training(folder, 3.0, seed, is_quick=True)
        return {row.name: row.open_image().read((0, 0, 0, 10, 48, 64)) for row in read_manifest(manifest).rows}

    first = images(tmp_path / "a", 0)
    rows = read_manifest(tmp_path / "a" / "manifest.csv").rows
    assert [(row.name, row.specimen, row.split) for row in rows] == [
        (f"{density}_{split}_0", f"{density}_specimen_{split}_0", split)
        for density in ("sparse", "crowded", "packed")
        for split in ("train", "val")
    ]
    assert all(row.spacing_um == pytest.approx((2.1, 0.7, 0.7)) for row in rows)
    again, other = images(tmp_path / "b", 0), images(tmp_path / "c", 1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    (volume,) = write_tests(tmp_path / "tests", 3.0, 0, is_quick=True)
    assert volume.described() == next(write_tests(tmp_path / "tests", 3.0, 0, is_quick=True)).described()
    assert (volume.name, volume.described()["num_asked"]) == ("packed_12", 12)
    assert list(volume.shape) == volume.described()["shape"]


def test_logs_are_searched_for_limits_to_raise():
    from bench.stress.bars import CAPS, caps_in

    said = "- WARNING - 7 objects are as many as one image may have: raise max_detections = 7\n"
    assert caps_in(said) == ["max_detections"]
    assert caps_in(f"raise num_queries or use smaller blocks\n{said}{said}") == ["max_detections", "num_queries"]
    assert caps_in("> network_def#max_detections: 9\nraise max_detections_of_others") == []
    # The words of the warnings themselves.
    sources = ("models/mask_rcnn.py", "losses/set_criterion.py", "inference/crowding.py")
    found = [caps_in((ROOT / "seg3d_monai" / source).read_text(encoding="utf-8")) for source in sources]
    assert found == [["max_detections", "post_nms_top_n"], ["num_queries"], ["num_queries"]]
    assert set(CAPS) == {name for names in found for name in names}


def test_bars_are_met_or_missed_and_the_report_says_so():
    from bench.stress.bars import verdicts
    from bench.stress.report import bars_lines, training_table, volumes_table

    training = [training_of(6.0), training_of(3.0, ["post_nms_top_n"]), {"ratio": 1.0, "error": "killed"}]
    volumes = [row_of("whole", 0.9), row_of("blocks", 0.899, ["max_detections"])]
    bars = list(verdicts({"training": training, "volumes": volumes}))
    assert [(bar["quantity"], bar["met"]) for bar in bars] == [
        ("cap warnings", True),
        ("cap warnings", False),
        ("end", False),
        ("F1@0.5", True),
        ("cap warnings", True),
        ("F1@0.5", False),
        ("cap warnings", False),
    ]
    assert bars[5]["work"] == "6:1 packed_400 blocks"
    assert bars_lines(bars).splitlines() == ["cap warnings 0: 2 of 4", "end reached: 0 of 1", "F1@0.5 >= 0.9: 1 of 2"]
    whole, blocks = (line.split() for line in volumes_table(volumes).splitlines()[2:])
    assert whole[:5] == ["6:1", "packed_400", "whole", "16x119x148", "4"]
    assert whole[5:] == [
        *("48%", "99%", "58%", "2.5", "380", "371"),
        *("0.900", "0.750", "0.250", "0.500", "yes", "none"),
    ]
    assert blocks[-2:] == ["NO", "max_detections"]
    lines = [line.split() for line in training_table(training).splitlines()[2:]]
    assert lines[0][1:] == [
        *("11", "volumes,", "540", "objects", "1,500", "0.50", "2"),
        *("8x48x64", "8x64x64", "4x20x24", "none"),
    ]
    assert lines[2] == ["1:1", "failed"]


def test_finished_ratios_are_kept_and_one_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    from bench.stress import run

    calls, can_fail = [], [True]

    def measure(options, ratio, folder):
        calls.append(ratio)
        (folder / "trained").touch()
        if can_fail[0] and ratio == 1:
            raise RuntimeError("train ended with exit code 3")
        return {"training": training_of(ratio), "volumes": [row_of("whole", 0.95)]}

    monkeypatch.setattr(run, "measure", measure)
    options = options_of(tmp_path / "kept")
    failed, done = run.stress(options)
    assert failed == {"training": {"ratio": 1.0, "error": "train ended with exit code 3"}, "volumes": []}
    assert "1:1: train ended with exit code 3" in capsys.readouterr().err
    can_fail[0] = False
    first, second = run.stress(options)
    assert second == done
    assert first["training"]["ratio"] == 1.0
    assert calls == [1.0, 3.0, 1.0]  # what is finished is not done again, and what failed goes on in its folder
    with pytest.raises(
        ValueError, match=r"ratio_1 was begun with other settings \(seed, steps differ\); give --restart"
    ):
        list(run.stress(replace(options, steps=8, seed=6)))
    assert len(list(run.stress(replace(options, steps=8, restart=True)))) == 2
    assert calls[3:] == [1.0, 3.0]
    other = tmp_path / "other.json"
    other.write_text('{"score_threshold": 0.5}')
    with pytest.raises(ValueError, match=r"\(overlays differ\)"):
        list(run.stress(replace(options, steps=8, overlays=(str(other),))))


def test_training_takes_the_steps_that_are_asked_for_and_the_prediction_what_it_knows_of_overlays(
    tmp_path, monkeypatch
):
    from bench.stress import run
    from bench.stress.volumes import write_training
    from seg3d_monai.cli_bundle import find_bundle
    from seg3d_monai.planning.bundle_config import BundleConfig

    overlay, plan = tmp_path / "mine.json", tmp_path / "plan" / "maskrcnn3d_train.json"
    keys = {"network_def#semantic": True, "score_threshold": 0.7}
    of_training = {"train#trainer#accumulation_steps": 3, "batch_size": 4, "learning_rate": 0.002}
    overlay.write_text(json.dumps(keys | of_training))
    plan.parent.mkdir()
    plan.write_text('{"batch_size": 5, "crop_size": [16, 32, 40]}')
    options = options_of(tmp_path, overlays=(str(overlay),))
    config = BundleConfig(find_bundle(options.bundle), [*options.overlay_paths, str(plan)])
    inference = run.inference_overlays(options, tmp_path, config)
    assert [Path(path).name for path in inference] == ["inference.json", "maskrcnn3d_inference.json"]
    assert json.loads(Path(inference[0]).read_text()) == keys

    calls = []
    monkeypatch.setattr(run, "run_process", lambda words, log, **_: [calls.append(words), log.write_text("quiet")])
    monkeypatch.setattr(run, "trained_steps", lambda folder: {"train_s": 14.0})
    (tmp_path / "logs").mkdir()
    row = run.trained(options, tmp_path, write_training(tmp_path / "training", 3.0, 0, is_quick=True), config)
    (words,) = calls
    assert words[:4] == ["-m", "seg3d_monai", "train", "maskrcnn3d"]
    pairs = dict(zip(words[4::2], words[5::2], strict=True))
    assert pairs["--overlay"] == f"{overlay},{plan}"
    assert pairs["--train#dataset#num_samples"] == str(7 * 5 * 3)
    assert (pairs["--train#trainer#max_epochs"], pairs["--seed"], pairs["--resume"]) == ("1", "5", "True")
    assert (row["steps"], row["step_s"], row["num_volumes"], row["caps"]) == (7, 2.0, 3, [])
    assert row["settings"]["crop_size"] == [16, 32, 40]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratios", "1", "0"], "--ratios 1 0: give numbers above 0"),
        (["--ratios", "-3"], "--ratios -3: give numbers above 0"),
        (["--ratios", "nan"], "--ratios nan: give numbers above 0"),
        (["--ratios", "3", "3.0"], "--ratios 3 3: give different numbers"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["--threads", "5000"], "--threads is 5000, but there are"),
        (["--threads", "1", "--overlays", "nowhere"], "overlay 'nowhere.json' does not exist"),
    ],
)
def test_mistakes_are_refused_in_one_line(words, message):
    environment = {**os.environ, "PYTHON": sys.executable}
    shown = subprocess.run(
        [str(SCRIPTS / "bench_stress"), "--quick", *words], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert message in shown.stderr
    assert shown.stderr.startswith("bench_stress: error: ")
    assert len(shown.stderr.splitlines()) == 1


def test_quick_run_writes_what_it_promises(tmp_path):
    file, folder = tmp_path / "deeper" / "quick.json", tmp_path / "kept"
    words = ["--quick", "--threads", "1", "--folder", str(folder), "--json", str(file)]
    shown = subprocess.run(
        [str(SCRIPTS / "bench_stress"), *words],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    result = json.loads(file.read_text())
    assert result["is_quick"] is True
    assert {"hardware", "versions", "operators", "method", "command"} <= set(result)
    (training,) = result["training"]
    assert (training["ratio"], training["steps"], training["num_volumes"], training["caps"]) == (3.0, 2, 3, [])
    assert training["spacing_um"] == pytest.approx([2.1, 0.7, 0.7])
    assert training["settings"]["crop_size"] == [16, 32, 40]
    whole, blocks = result["volumes"]
    assert (whole["way"], whole["num_blocks"], blocks["way"]) == ("whole", 1, "blocks")
    assert blocks["num_blocks"] > 1
    said = [(folder / "ratio_3" / "logs" / f"predict_packed_12_{way}.txt").read_text() for way in ("whole", "blocks")]
    assert ["1 of 1 blocks" in said[0], f"of {blocks['num_blocks']} blocks" in said[1]] == [True, True]
    for row in (whole, blocks):
        assert row["num_objects"] == row["tp"] + row["fn"] > 5
        assert row["num_predicted"] == row["tp"] + row["fp"]
        assert row["touching_share"] > 0.8
        assert len(set(row["shape"])) == 3
    assert len(result["bars"]) == 5
    assert "QUICK" in shown
    assert "F1@0.5 >= 0.9: " in shown.splitlines()[-1]
