"""A bundle's training with all that watches it switched on: MONAI's MLflow flag, TensorBoard, snapshots, early stop."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from small_networks import SMALL_NETWORK
from test_bundles import BUNDLES, CONFIGS, SMALL, overrides, write_dataset

STUB = '''
"""Stands for MLflow, with as much of it as MONAI's handler calls; writes each call down."""
import json, os
from types import SimpleNamespace as Namespace
from mlflow import entities, exceptions

def write(**call):
    with open(os.environ["MLFLOW_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class MlflowClient:
    runs = []

    def __init__(self, tracking_uri=None):
        self.tracking_uri = tracking_uri
        write(call="client", uri=tracking_uri)

    def get_experiment_by_name(self, name):
        return Namespace(name=name, experiment_id="1", lifecycle_stage=entities.LifecycleStage.ACTIVE)

    def search_runs(self, experiment_id):
        return self.runs

    def create_run(self, experiment_id, run_name):
        info = Namespace(run_id=str(len(self.runs)), run_name=run_name, status="RUNNING")
        self.runs.append(Namespace(info=info, data=Namespace(params={})))
        return self.runs[-1]

    def get_run(self, run_id):
        return self.runs[int(run_id)]

    def log_batch(self, run_id, metrics, params, tags):
        for metric in metrics:
            write(call="metric", run=run_id, key=metric.key, value=metric.value, step=metric.step)
        for param in params:
            self.runs[int(run_id)].data.params[param.key] = param.value
            write(call="param", run=run_id, key=param.key, value=param.value)

    def set_terminated(self, run_id, status=None):
        write(call="end", run=run_id)
'''
ENTITIES = """
from collections import namedtuple
Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")

class LifecycleStage:
    ACTIVE = "active"

class RunStatus:
    FINISHED = "FINISHED"

    @staticmethod
    def to_string(status):
        return status
"""


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """Environment of a process that finds the stub when it imports mlflow."""
    package = tmp_path / "stub" / "mlflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(STUB))
    (package / "entities.py").write_text(textwrap.dedent(ENTITIES))
    (package / "exceptions.py").write_text("class MlflowException(Exception):\n    pass\n")
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "MLFLOW_CALLS": str(tmp_path / "calls")}


def test_all_that_watches_a_training(tmp_path: Path, stub: dict[str, str]) -> None:
    dataset = write_dataset(tmp_path / "data")
    run, work = tmp_path / "run", tmp_path / "work"
    work.mkdir()
    settings = {
        **SMALL,
        **SMALL_NETWORK["maskrcnn3d"],
        "train#trainer#max_epochs": 9,
        "val_interval": 1,
        "patience": 2,
        "layer_decay": 0.8,
        "snapshot_steps": 2,
        "tensorboard": True,
        "learning_rate": 1e-9,
    }
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--tracking", "mlflow"]
    command += ["--config_file", str(CONFIGS["maskrcnn3d"] / "train.json"), *overrides(settings)]
    command += ["--dataset_dir", str(dataset), "--output_dir", str(run)]
    done = subprocess.run(command, cwd=work, env=stub, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("F1@0.5 = ")

    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert {call["uri"] for call in calls if call["call"] == "client"} == {f"sqlite:///{run}/mlruns.db"}
    assert {call["run"] for call in calls if "run" in call} == {"0"}
    assert {(call["key"], call["value"]) for call in calls if call["call"] == "param"} >= {("epoch_length", "2")}
    metrics = {(call["key"], call["step"]): call["value"] for call in calls if call["call"] == "metric"}
    rows = (run / "validation.csv").read_text().splitlines()
    assert len(rows) == 1 + 3  # nothing is learnt: the first validation, and two without a rise
    assert [step for key, step in metrics if key == "train_loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for key, step in metrics if key == "f1_50"] == [1, 2, 3]
    assert calls[-1] == {"call": "end", "run": "0"}

    kept = {"step_000002.pt", "step_000004.pt", "step_000006.pt", "last.pt", "last.prev.pt", "best.pt", "model.pt"}
    written = {"config.json", "environment.json", "validation.csv", "metrics.json", "crops.sqlite"}
    assert {path.name for path in run.iterdir()} >= kept | written | {"tensorboard", "slices"}
    assert not {path.name for path in run.iterdir()} & {"nonfinite.json", "mlruns"}
    assert sorted(path.name for path in (run / "slices").iterdir()) == ["v2.png"]
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_bundle_passes_its_check_with_tracking(bundle: str, tmp_path: Path) -> None:
    from seg3d_monai.engine import check_config

    workflow = ConfigWorkflow(
        config_file=str(CONFIGS[bundle] / "train.json"),
        logging_file=False,
        tracking="mlflow",
        output_dir=str(tmp_path / "run"),
    )
    workflow.parser.parse()
    check_config(parser=workflow.parser)
    targets = [handler["_target_"].split(".")[-1] for handler in workflow.parser["train#handlers"]]
    assert targets[-1] == "MLFlowHandler"
    assert [handler["_target_"] for handler in workflow.parser["validate#evaluator#val_handlers"]] == ["MLFlowHandler"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_what_costs_is_off(bundle: str) -> None:
    parser = ConfigParser()
    parser.read_config(str(CONFIGS[bundle] / "train.json"))
    handlers = {handler["_target_"].split(".")[-1]: handler for handler in parser["train#handlers"]}
    for name in ("EarlyStopping", "TensorBoard"):
        assert parser.get_parsed_content(f"train#handlers#{list(handlers).index(name)}") is None
    assert parser["snapshot_steps"] is None
    assert parser["layer_decay"] == 1.0
    assert parser["optimizer#params#decay_weights_only"] is False
