"""`seg3d report` on a training and on a prediction of its weights, and on what is neither."""

import hashlib
from pathlib import Path

import pytest
from small_networks import SMALL_NETWORK
from test_bundles import CONFIGS, SMALL, overrides, run_bundle, write_dataset

from seg3d_monai.cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    dataset = write_dataset(folder / "data")
    run_bundle(
        *("training", "--config_file", str(CONFIGS["maskrcnn3d"] / "train.json"), "--dataset_dir", str(dataset)),
        *("--output_dir", str(folder / "run"), *overrides(SMALL | SMALL_NETWORK["maskrcnn3d"])),
        cwd=folder,
    ).check_returncode()
    return folder


def test_a_training_and_a_prediction_get_a_page(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "run"
    assert main(["report", str(run), "--score_threshold", "0.05", "--min_voxels", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {run / 'report.html'}"
    page = (run / "report.html").read_text()
    assert "Training run" in page
    assert hashlib.sha256((run / "model.pt").read_bytes()).hexdigest() in page
    assert "1 volume that the training has not seen" in page
    image, output = trained / "data" / "v3" / "image.tif", trained / "out.zarr"
    words = ["predict", str(image), str(output), "--bundle", str(CONFIGS["maskrcnn3d"].parent)]
    words += ["--checkpoint", str(run / "model.pt"), "--spacing", "[2,0.8,0.8]", "--score_threshold", "0.05"]
    words += overrides(SMALL_NETWORK["maskrcnn3d"] | {"backbone#width": 8, "amp": "off"})
    assert main(words) == 0
    assert main(["report", str(output), "--image", str(image)]) == 0
    page = (trained / "out.report.html").read_text()
    assert "Without annotated truth" in page
    assert hashlib.sha256((run / "model.pt").read_bytes()).hexdigest() in page
    assert "maskrcnn3d, 0.1.0" in page
    truth = trained / "data" / "v3" / "labels.tif"
    page_of_part = trained / "part.html"
    words = ["report", str(output), str(page_of_part), "--image", str(image), "--truth", str(truth)]
    assert main([*words, "--seams", str(trained / "none.json")]) == 2
    assert "give the JSON that seg3d seam-check wrote" in capsys.readouterr().err
    (trained / "other.json").write_text("[]")
    assert main([*words, "--seams", str(trained / "other.json")]) == 2
    assert "is not what seg3d seam-check writes" in capsys.readouterr().err
    assert main([*words, "--roi", "[0,0,0,18,30,44]"]) == 0
    assert "F1 at IoU 0.5" in page_of_part.read_text()
    assert "of the region [0, 0, 0, 18, 30, 44]" in page_of_part.read_text()


def test_mistakes_are_one_line_and_write_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "empty").mkdir(exist_ok=True)
    (trained / "none.zarr").mkdir(exist_ok=True)
    before = sorted(trained.rglob("*"))
    for words, message in (
        (["nowhere"], "does not exist"),
        ([str(trained / "empty")], "holds no config.json"),
        ([str(trained / "none.zarr")], "--image is missing"),
        ([str(trained / "none.zarr"), "--image", "a.tif"], "holds no labels/instances"),
        ([str(trained / "none.zarr"), "--image", "a.tif", "--seed", "3"], "unknown flag --seed"),
        ([str(trained / "run"), "--image", "a.tif"], "are for predictions"),
        ([str(trained / "run"), "--seams", "seams.json"], "are for predictions"),
        ([str(trained / "run"), "no/report.html"], "its folder does not exist"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert sorted(trained.rglob("*")) == before
