"""Section `annotate` of scripts/bench_data: what is hidden, the simulated annotator, options and report."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from seg3d_monai.annotation.task import AnnotationTask, Region, labels_digest, write_task
from seg3d_monai.data import read_manifest

SHAPE = (4, 10, 12)


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The folder of the benchmark's modules, importable."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))


@pytest.fixture
def dataset(tmp_path):
    """Two volumes of each of three specimens, without splits; two cells in each, and voxels that nobody annotated."""
    label = np.zeros(SHAPE, np.uint16)
    label[1:3, 2:5, 2:6], label[1:3, 6:9, 7:11], label[3] = 30, 70, 65535
    for number, name in enumerate(f"{specimen}_{time}" for specimen in "ABC" for time in (0, 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        image = np.random.default_rng(number).integers(0, 999, SHAPE).astype(np.uint16)
        tifffile.imwrite(tmp_path / "data" / name / "image.tif", image, metadata={"axes": "ZYX"})
        tifffile.imwrite(tmp_path / "data" / name / "labels.tif", label, metadata={"axes": "ZYX"})
    return tmp_path / "data"


def options_of(dataset, **changes):
    from bench.data.annotate_options import AnnotateOptions
    from bench.data.options import Options

    annotate = AnnotateOptions(**{"specimen_pattern": "^(.)_", "val_specimens": ("C",)} | changes)
    return Options(folder=dataset.parent, threads=1, is_quick=True, dataset_dir=dataset, annotate=annotate)


def test_labels_of_all_training_specimens_but_a_few_are_hidden(dataset):
    from bench.data.annotate import divided, hidden
    from bench.data.annotate_options import AnnotateOptions

    rows = divided(options_of(dataset), dataset.parent)
    assert [(row.specimen, row.split) for row in rows[::2]] == [("A", "train"), ("B", "train"), ("C", "val")]
    seen = {tuple(row.specimen for row in hidden(rows, AnnotateOptions(seed=seed)) if row.label) for seed in range(9)}
    assert seen == {("A", "A", "C", "C"), ("B", "B", "C", "C")}
    one_volume = {
        tuple(row.name for row in hidden(rows, AnnotateOptions(seed=seed, start_volumes=1)) if row.label)
        for seed in range(30)
    }
    assert one_volume == {(name, "C_0", "C_1") for name in ("A_0", "A_1", "B_0", "B_1")}
    with pytest.raises(ValueError, match="--start_specimens 2: choose 1 to 1 of 2"):
        hidden(rows, AnnotateOptions(start_specimens=2))
    with pytest.raises(ValueError, match=r"--val_specimens \['D'\]: choose among \['A', 'B', 'C'\]"):
        divided(options_of(dataset, val_specimens=("D",)), dataset.parent)


def test_the_annotator_draws_what_was_hidden(dataset):
    from bench.data.annotate import annotate

    truth = {row.name: row for row in read_manifest(dataset).rows}
    window, roi = (0, 0, 0, 4, 10, 9), (0, 0, 0, 4, 6, 9)
    folder = dataset.parent / "regions"
    (folder / "001").mkdir(parents=True)
    region = Region(number=1, volume="A_0", shape=SHAPE, roi=roi, window=window, labels_sha256="")
    task = AnnotationTask(
        index="", config={}, split="train", splits={}, specimens={}, num_classes=1, regions=(region,), training={}
    )
    write_task(folder, task)
    assert annotate(folder, truth) == 1  # the second cell has no voxel in the region
    expected = np.zeros((4, 10, 9), np.uint32)
    expected[1:3, 2:5, 2:6], expected[1:3, 6:9, 7:9], expected[3] = 1, 2, 2**32 - 1
    drawn = tifffile.imread(folder / "001" / "labels.tif")
    np.testing.assert_array_equal(drawn, expected)
    assert labels_digest(drawn) == labels_digest(expected)


def test_it_is_measured_on_request_alone(monkeypatch, dataset):
    from bench.data.__main__ import OPT_IN, SECTIONS, parse_arguments

    assert not set(OPT_IN) & set(SECTIONS)
    monkeypatch.setattr(sys, "argv", ["bench_data"])
    assert tuple(parse_arguments().only) == SECTIONS
    words = ["--only", "annotate", "--dataset_dir", str(dataset), "--val_specimens", "B", "C", "--num_regions", "3"]
    monkeypatch.setattr(sys, "argv", ["bench_data", *words, "--annotate_minutes", "2.5"])
    arguments = parse_arguments()
    assert arguments.only == ["annotate"]
    found = arguments.annotate
    assert (found.val_specimens, found.num_regions, found.annotate_minutes) == (("B", "C"), 3, 2.5)
    assert (found.start_minutes, found.train_overlays, found.specimen_pattern) == (5.0, (), None)
    monkeypatch.setattr(sys, "argv", ["bench_data", "--annotate_minutes", "0"])
    with pytest.raises(SystemExit) as caught:
        parse_arguments()
    assert caught.value.code == 2


def test_the_report_has_a_row_for_each_way():
    from bench.data.report import annotate_table

    scores = {"f1_50": 0.5, "f1_70": 0.25, "seg": 0.4, "map": 0.2, "tp": 5, "fp": 4, "fn": 6}
    start = {"arm": "start", "seed": None, "minutes": 5.0, "num_labelled": 11, **scores}
    facts = {"num_regions": 10, "num_objects": 42, "num_specimens": 8, "suggest_s": 61.4, "import_s": 2.0}
    lines = annotate_table([start, {**start, "arm": "suggested", "seed": 0, **facts, "f1_50": 0.625}]).splitlines()
    assert lines[-2].split() == ["start", "11", "5", "0.500", "0.250", "0.400", "0.200", "5", "/", "4", "/", "6"]
    assert lines[-1].split()[:8] == ["suggested", "seed", "0", "11", "5", "10", "42", "0.625"]
    assert lines[-1].split()[-1] == "61"
