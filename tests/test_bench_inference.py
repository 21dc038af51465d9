"""scripts/bench_inference: its cheap sections run, and its definitions and instruments are right on toys."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from seg3d_monai.inference import Instances

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The folder of the benchmark's modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def line(text: str) -> np.ndarray:
    """A label volume [1, 1, X] drawn as text: a letter an id, a dot for background."""
    return np.array([0 if c == "." else ord(c) - ord("a") + 1 for c in text], dtype=np.int32).reshape(1, 1, -1)


def described(truth: str, result: str, size: int) -> dict[str, str]:
    """Which cells have which error, as letters; blocks of some size along x."""
    from bench.inference.errors import cell_errors

    errors = cell_errors(line(truth), line(result), (1, 1, size))
    kinds = ("split", "merged", "lost", "wrong", "is_seam")
    return {
        kind: "".join(chr(ord("a") + i - 1) for i, has in zip(errors.ids, getattr(errors, kind), strict=True) if has)
        for kind in kinds
    }


NONE = {"split": "", "merged": "", "lost": "", "wrong": ""}


@pytest.mark.parametrize(
    ("truth", "result", "expected"),
    [
        ("aaaabbbb", "bbbbaaaa", {}),
        ("aaaabbbb", "aaabbbbb", {}),  # a border that moved is no error
        ("aaaabbbb", "aaaaaaaa", {"merged": "ab", "wrong": "ab"}),
        ("aaaabbbb", "aabbcccc", {"split": "a", "wrong": "a"}),  # halves: split, not lost
        ("aaaabbbb", "aaabcccc", {"split": "a", "wrong": "a"}),  # a fragment of one voxel
        ("aaaabbbb", "....bbbb", {"lost": "a", "wrong": "a"}),
        ("aaaabbbb", "aa..bbbb", {"lost": "a", "wrong": "a"}),  # half is not more than half
        # The large object covers both cells; 4 of its 7 voxels are a's, as is the whole of the small one.
        ("aaaaabbb", "bbbbabbb", {"split": "a", "merged": "ab", "wrong": "ab"}),
        ("........", "aaaabbbb", {}),
        ("........", "........", {}),
        ("aaaa....", "aaaaaaaa", {}),
    ],
)
def test_errors_of_cells_counted_by_hand(truth, result, expected):
    found = described(truth, result, 8)
    assert found.pop("is_seam") == ""
    assert found == NONE | expected


def test_seam_cells_have_voxels_on_both_sides_of_a_face():
    assert described("aaabbbccc", "aaabbbccc", 4)["is_seam"] == "bc"  # faces before voxels 4 and 8
    assert described("aaabbbccc", "aaabbbccc", 3)["is_seam"] == ""  # faces between the cells
    assert described("a.......a", "a.......a", 8)["is_seam"] == "a"
    from bench.inference.errors import cell_errors

    truth = np.zeros((4, 6, 8), dtype=np.int32)
    truth[0:2, 0:2, 0:2], truth[1:3, 4:6, 5:7], truth[3, 3, 0:8] = 1, 2, 3
    errors = cell_errors(truth, truth, (2, 3, 4))
    assert errors.is_seam.tolist() == [False, True, True]
    assert errors.counts()["seam"] == {"cells": 2, "split": 0, "merged": 0, "lost": 0, "wrong": 0}
    assert errors.counts()["away"]["cells"] == 1


def test_inexact_things_are_cells_and_objects_without_a_twin():
    from bench.inference.errors import num_inexact

    assert num_inexact(line("aabb.c"), line("ccaa.b")) == 0
    assert num_inexact(line("aabb.c"), line("aabbb.")) == 3  # b, its object, and c
    assert num_inexact(line("......"), line("a.....")) == 1
    assert num_inexact(line("......"), line("......")) == 0


@pytest.mark.parametrize("num_seeds", [1, 2, 40])
def test_voronoi_cells_are_those_of_a_tree_asked_for_every_voxel(num_seeds):
    from bench.inference.tissue import voronoi

    seeds = np.random.default_rng(num_seeds).uniform(0, 1, (num_seeds, 3)) * (20, 35, 50)
    roi = (3, 5, 2, 20, 34, 47)
    axes = (np.arange(roi[a], roi[a + 3]) + 0.5 for a in range(3))
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    assert np.array_equal(voronoi(seeds, roi), cKDTree(seeds).query(voxels)[1] + 1)


def test_tissue_has_the_density_of_its_diameter_and_displacement_is_the_blocks_own():
    from bench.inference.tissue import DisplacedTissue, tissue_seeds

    shape = (60, 90, 120)
    seeds = tissue_seeds(shape, 10, seed=0)
    assert len(seeds) == pytest.approx(60 * 90 * 120 / 10**3, rel=0.1)
    assert ((seeds >= 0) & (seeds < shape)).all()
    assert not np.array_equal(seeds[:5], tissue_seeds(shape, 10, seed=1)[:5])
    predictor, block = DisplacedTissue(seeds, 1.0), torch.zeros(1, 20, 25, 30)
    rois = [(0, 0, 0, 20, 25, 30), (0, 0, 0, 20, 25, 30), (10, 0, 0, 30, 25, 30)]
    first, again, other = (predictor(block, roi) for roi in rois)
    assert np.array_equal(first.boxes, again.boxes)
    assert np.array_equal(first.scores, again.scores)
    assert not np.array_equal(first.boxes[:3], other.boxes[:3])
    assert sum(int(mask.sum()) for mask in first.masks) == 20 * 25 * 30


def test_stack_of_tiles_and_the_objects_in_it(tmp_path):
    from bench.inference.stacks import ThresholdPredictor, blob_tile, write_tiled
    from seg3d_monai.data import open_volume

    tile = blob_tile((16, 48, 36), (16, 24, 12))
    volume = open_volume(write_tiled(tmp_path / "stack.zarr", tile, (32, 48, 60), (8, 24, 12)))
    assert volume.shape == (1, 32, 48, 60)
    voxels = volume.read((0, 0, 0, 32, 48, 60))[0]
    assert np.array_equal(voxels, np.tile(tile, (2, 1, 2))[:, :, :60])
    found = ThresholdPredictor()(torch.from_numpy(voxels.astype(np.float32))[None], (0, 0, 0, 32, 48, 60))
    assert len(found) == 2 * 2 * 5


def test_repeated_blocks_are_those_that_were_not_in_flight():
    from bench.inference.kills import Progress, num_repeated

    killed = Progress(frozenset({0, 1}), {0: 1, 1: 1, 2: 1})  # 2 was in flight, 3 waited
    good = {0: 1, 1: 1, 2: 2, 3: 1}
    assert num_repeated(killed, Progress(frozenset(good), good)) == 0
    assert num_repeated(killed, Progress(frozenset(good), good | {1: 2})) == 1
    assert num_repeated(killed, Progress(frozenset(good), good | {2: 3, 3: 2})) == 2


def test_halts_are_measured_and_taken_off():
    from bench.inference.whole import HaltingPredictor
    from seg3d_monai.data.volume import ArrayVolume

    class Slow(torch.nn.Module):
        def forward(self, images):
            time.sleep(0.05)
            return [{"boxes": torch.zeros(0, 6)} for _ in images]

    class Predictor:
        def __init__(self):
            self.network, self.amp, self.intensity = Slow(), None, None

        def for_volume(self, volume):
            from seg3d_monai.data.intensity import Intensity

            self.intensity = Intensity((0.0,), (1.0,))
            return self

        def __call__(self, block, roi):
            self.network(block[None])
            return Instances.empty()

    volume = ArrayVolume(np.zeros((6, 4, 5), np.uint8))
    halting = HaltingPredictor(Predictor(), 2).for_volume(volume)
    start = time.perf_counter()
    for z in range(5):
        halting(torch.zeros(1, 1, 4, 5), (z, 0, 0, z + 1, 4, 5))
    whole = time.perf_counter() - start - halting.halted_s
    assert len(halting.forward_s) == len(halting.read_s) == 4
    halting.halt()
    assert len(halting.forward_s) == len(halting.num_found) == 5
    assert min(halting.forward_s) >= 0.05
    assert 5 * 0.05 <= halting.predictor_s <= whole


def test_bars_met_and_missed():
    from bench.inference.bars import verdicts
    from bench.inference.report import bars_table

    clean = {"wrong": 0}
    seams = [
        {"diameter": 12, "sigma": 0.0, "seam": clean, "away": {"wrong": 1}, "excess": 0.0},
        {"diameter": 12, "sigma": 1.0, "seam": clean, "away": clean, "excess": 0.0049},
        {"diameter": 12, "sigma": 2.0, "seam": clean, "away": clean, "excess": 0.02},
    ]
    result = {
        "seams": seams,
        "exact": [{"cells": "rods", "halo": (1, 2, 3), "errors": 0}],
        "whole": [{"model": "m", "times_bare": 1.101}],
        "memory": [{"small": "0.5 GiB", "large": "4 GiB", "ratio": None}],
        "workers": [{"speed_up": 1.75}],
        "records": [{"num_instances": 10_000_000, "seconds": 299.0, "peak_gb": 2.0}],
        "kills": [{"num_kills": 2, "num_workers": 1, "num_different": 0, "num_repeated": 1}],
    }
    rows = list(verdicts(result))
    assert [row["met"] for row in rows] == [False, True, False, True, False, None, True, True, False, False]
    endings = [text.split("  ")[-1].strip() for text in bars_table(rows).splitlines()[2:]]
    assert endings == ["NO", "yes", "NO", "yes", "NO", "not measured", "yes", "yes", "NO", "NO"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--checkpoint", "nowhere.pt"], "--checkpoint nowhere.pt does not exist"), (["--threads", "0"], "--threads")],
)
def test_refuses_in_one_line(words, message):
    shown = run_bench(*words, check=False)
    assert shown.returncode == 2
    assert message in shown.stderr
    assert shown.stderr.count("\n") == 1


def run_bench(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / "bench_inference"), *words],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=check,
    )


def test_quick_run_writes_what_it_promises(tmp_path):
    file = tmp_path / "deeper" / "quick.json"
    words = ["--quick", "--only", "seams", "exact", "kills", "--threads", "1", "--json", str(file)]
    shown = run_bench(*words).stdout
    result = json.loads(file.read_text())
    assert result["is_quick"] is True
    assert {"hardware", "versions", "operators", "method", "command"} <= set(result)
    assert [(row["diameter"], row["sigma"]) for row in result["seams"]] == [(9, 0.0), (9, 1.0)]
    for row in result["seams"]:
        assert row["seam"]["cells"] > 50
        assert row["away"]["cells"] > 50
    still = result["seams"][0]
    assert still["seam"]["wrong"] == still["away"]["wrong"] == 0
    assert still["objects"] == still["seam"]["cells"] + still["away"]["cells"]
    assert [row["errors"] for row in result["exact"]] == [0] * 6
    (killed,) = result["kills"]
    assert killed["num_kills"] == sum(killed["phases"].values()) == 1
    assert killed["num_different"] == killed["num_repeated"] == 0
    assert result["whole"] == result["memory"] == result["workers"] == []
    assert len(result["bars"]) == 2 + 6 + 1
    assert "Dense tissue" in shown
    assert "QUICK" in shown
