"""A bundle in two processes that torchrun starts, as the model zoo's bundles are trained on several GPUs."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from small_networks import SMALL_NETWORK
from test_bundles import CONFIGS, SMALL, overrides, write_dataset

BUNDLE = "maskrcnn3d"


def test_two_processes_of_torchrun_train_one_model(tmp_path: Path) -> None:
    dataset, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    files = [str(CONFIGS[BUNDLE] / name) for name in ("train.json", "multi_gpu_train.json")]
    settings = {"dataset_dir": str(dataset), "output_dir": str(run), "batch_size": 1}
    settings |= SMALL | SMALL_NETWORK[BUNDLE] | {"train#handlers#3#interval": 1}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "monai.bundle", "run", "training", "--config_file", str(files), *overrides(settings)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    # Four crops, one a process and step; the first process alone writes, each row once.
    with (run / "train.csv").open() as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["1", "2"]
    assert not (tmp_path / "runs").exists()
    assert (run / "metrics.json").exists()
    parser = ConfigParser()
    parser.read_config(files)
    parser.update({**SMALL, **SMALL_NETWORK[BUNDLE]})
    parser.get_parsed_content("network_def").load_state_dict(torch.load(run / "model.pt", weights_only=True))
