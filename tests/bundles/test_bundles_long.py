"""The bare command of each bundle, as a user runs it: it learns, in time, and its blocks leave no seams."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from seg3d_monai.data import open_volume
from seg3d_monai.engine import load_weights
from seg3d_monai.inference import InstancePredictor, predict_labels
from seg3d_monai.metrics import InstanceMetrics

ROOT = Path(__file__).parents[2]
LEAST_F1 = {"maskrcnn3d": 0.75, "maskdino3d": 0.7, "mask2former3d": 0.45}
GRIDS = [((32, 80, 80), (8, 24, 24)), ((27, 61, 96), (8, 24, 24))]


@pytest.mark.long
@pytest.mark.parametrize("bundle", LEAST_F1)
def test_the_bare_command_learns_and_its_blocks_leave_no_seams(tmp_path: Path, bundle: str) -> None:
    config = f"bundles/{bundle}/configs/train.json"
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", config]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 600
    assert float(done.stdout.splitlines()[-1].removeprefix("F1@0.5 = ")) >= LEAST_F1[bundle]

    parser = ConfigParser()
    parser.read_config(str(ROOT / config))
    network = load_weights(parser.get_parsed_content("network_def"), tmp_path / "run" / "model.pt")
    threshold = parser["score_threshold"]
    folder = tmp_path / "run" / "sample" / "test_0"
    image, label = open_volume(folder / "image.zarr"), open_volume(folder / "labels.zarr")
    truth = label.read((0, 0, 0, *label.shape[1:]))[0]
    f1 = []
    for block_size, halo in [(None, None), *GRIDS]:
        predictor = InstancePredictor(network=network, score_threshold=threshold, min_voxels=20, min_visible=0.7)
        metrics = InstanceMetrics()
        metrics.update(truth, predict_labels(image, predictor.for_volume(image), block_size, halo)[0])
        f1.append(metrics.compute()["thresholds"]["0.5"]["f1"])
    assert min(f1[1:]) >= f1[0] - 0.02
