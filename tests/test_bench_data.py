"""scripts/bench_data: its sections run, its generated index is sound, and its bars are judged rightly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seg3d_monai.data import CropIndex, build_index, open_volume, read_manifest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The folder of the benchmark's modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_the_generated_index_is_what_it_says(tmp_path):
    from bench.data.crops import NUM_INSTANCES, OCCUPIED, PER_CROP, SHAPE, WHERE, write_index

    facts = write_index(tmp_path / "i.sqlite", 2)
    index = CropIndex(tmp_path / "i.sqlite")
    assert len(index) == 2 * 5000
    assert [volume.num_instances for volume in index.volumes()] == [NUM_INSTANCES] * 2
    crops = index.crop_ids()
    assert (crops[:, 2] > 0).mean() == pytest.approx(OCCUPIED, rel=0.1)
    assert crops[:, 2].sum() == facts["num_visible"]
    occupied = crops[crops[:, 2] > 0, 0]
    for crop_id in (occupied[0], occupied[-1], occupied[len(occupied) // 2]):
        inside = index.crop_instances(int(crop_id))
        assert len(inside) == len(set(inside.ids.tolist())) == PER_CROP
        assert inside.ids.max() <= NUM_INSTANCES
    empty = crops[crops[:, 2] == 0, 0]
    assert len(index.crop_instances(int(empty[0]))) == 0
    stains = {volume.id: volume.attributes for volume in index.volumes()}
    expected = [
        row[0]
        for row in crops.tolist()
        if stains[row[1]]["quality_image"] >= 2
        and stains[row[1]]["stain"] == "H2B"
        and row[2] >= 5
        and index.crop(row[0]).foreground_fraction > 0.02
    ]
    assert index.crop_ids(where=WHERE)[:, 0].tolist() == expected
    assert index.crop(len(index)).roi[3:] == SHAPE


def test_the_labels_to_build_from_are_cells_with_ids_of_their_own(tmp_path):
    from bench.data.build import CONFIG, EMPTY, tile_of_cells, write_data

    tile = tile_of_cells((32, 48, 40))
    assert (tile == 0).mean() == pytest.approx(EMPTY, abs=0.15)
    assert write_data(tmp_path / "build", is_quick=True) == 2
    manifest = read_manifest(tmp_path / "build" / "manifest.csv")
    index = build_index(manifest, tmp_path / "i.sqlite", CONFIG, progress=False)
    for record in index.volumes():
        label = index.open_label(record).read((0, 0, 0, *record.shape[1:]))
        assert record.num_instances == len(np.unique(label)) - 1


def test_bars_met_and_missed():
    from bench.data.bars import verdicts
    from bench.data.report import bars_table

    crops = {"num_crops": 10_000_000, "open_ms": 50.0, "record_ms": 0.29, "count_s": 0.9}
    reads = {"gigabytes": 1.07, "format": "Zarr", "bare_over_ours": 0.89, "whole_over_ours": 20.0}
    result = {
        "build": [{"voxels": 2e9, "build_over_read": 0.3, "speed_up": 1.69}],
        "crops": [{**crops, "sampler_s": 1.0, "sampler_peak_mb": None}],
        "reads": [reads],
        "samples": [{"augmentation": "default", "ratio": 5.1}],
        "loader_memory": [{"gigabytes": 4.3, "start": "fork", "peak_mb": 499.0}],
        "plan": [
            {"data": "a", "plan_s": 59.0, "minutes": 10.0, "planned_over_hand": 0.99},
            {"data": "b", "plan_s": 60.0, "minutes": 0.0},
        ],
    }
    rows = list(verdicts(result))
    expected = [True, False, False, True, True, False, None, False, True, True, True, True, False, False]
    assert [row["met"] for row in rows] == expected
    endings = [text.split("  ")[-1].strip() for text in bars_table(rows).splitlines()[2:]]
    assert endings == [{True: "yes", False: "NO", None: "not measured"}[met] for met in expected]


def test_variables_are_put_back(monkeypatch):
    from bench.data.build import environment

    monkeypatch.setenv("BENCH_A", "old")
    with environment({"BENCH_A": "new", "BENCH_B": "1"}):
        assert (os.environ["BENCH_A"], os.environ["BENCH_B"]) == ("new", "1")
    assert os.environ["BENCH_A"] == "old"
    assert "BENCH_B" not in os.environ


def test_conversions_take_turns_and_leave_nothing(tmp_path, monkeypatch):
    from concurrent.futures import Future

    from bench.data import convert, report
    from bench.data.options import Options

    calls = []

    class Here:
        """An executor of this process."""

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, work, stack, output, num_workers):
            calls.append((stack.suffix, num_workers))
            assert not output.exists()
            future = Future()
            future.set_result(work(stack, output, num_workers))
            assert open_volume(output).shape == (1, *convert.QUICK_SHAPE)
            return future

    monkeypatch.setattr(convert, "ProcessPoolExecutor", Here)
    rows = convert.measure(Options(folder=tmp_path, threads=1, is_quick=True))
    assert calls == [(suffix, number) for suffix in (".zarr", ".tif") for number in (1, 2, 2, 1)]
    assert sorted(path.name for path in (tmp_path / "convert").iterdir()) == ["stack.tif", "stack.zarr"]
    assert [row["gigabytes"] for row in rows] == [2 * 32 * 128 * 128 / 1e9] * 2
    known = {"format": "TIFF", "gigabytes": 0.5, "one_s": [4.0, 6.0], "two_s": [2.5, 2.5], "speed_up": 2.0}
    assert report.convert_table([known]).splitlines()[-1].split() == [
        *("TIFF", "0.50", "GB", "4.0", "6.0", "2.5", "2.5", "100", "2.00x")
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what a process shares")
def test_share_of_memory_has_what_a_process_allocates():
    from bench.data.loader_memory import PeakShare

    code = "import sys; held = bytearray(b'1') * (int(sys.argv[1]) << 20); print(len(held), flush=True); input()"
    peaks = []
    for megabytes in (10, 60):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(megabytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with PeakShare(process.pid) as share:
            assert process.stdout.readline()
        process.communicate("")
        peaks.append(share.peak)
    assert 49 * 1024 < peaks[1] - peaks[0] < 52 * 1024


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--folder", "nowhere"], "--folder nowhere does not exist"), (["--threads", "0"], "--threads")],
)
def test_refuses_in_one_line(words, message):
    shown = run_bench(*words, check=False)
    assert shown.returncode == 2
    assert message in shown.stderr
    assert shown.stderr.count("\n") == 1


def run_bench(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / "bench_data"), *words],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=check,
    )


def test_quick_run_writes_what_it_promises(tmp_path):
    file = tmp_path / "deeper" / "quick.json"
    shown = run_bench("--quick", "--only", "crops", "reads", "--folder", str(tmp_path), "--json", str(file)).stdout
    result = json.loads(file.read_text())
    assert result["is_quick"] is True
    assert {"hardware", "versions", "operators", "method", "command"} <= set(result)
    assert result["crops"][0]["num_crops"] == 4 * 5000
    assert [row["format"] for row in result["reads"]] == ["Zarr", "TIFF"]
    assert result["build"] == result["samples"] == result["loader_memory"] == []
    assert len(result["bars"]) == 5 + 4
    assert "An index of many crops" in shown
    assert "QUICK" in shown
