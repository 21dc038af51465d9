"""Each bundle trained by two Ray workers under ZeRO 3 that lose one, are stopped, and go on from their checkpoint.

The cluster is real, nodes of one CPU on this machine, and so are the deaths. Epochs have four iterations and end with a
checkpoint; a worker is lost in the sixth iteration, and the command stopped in the seventh.
"""

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accidents import notes
from monai.bundle import ConfigParser, ConfigWorkflow
from ray.cluster_utils import Cluster
from ray_nodes import RESTART, cluster_of, wait_until
from small_networks import SMALL_NETWORK
from test_bundles import CONFIGS, SMALL, write_dataset

from seg3d_monai.engine.checkpoint import read_checkpoint

SETTINGS = {
    **SMALL,
    "device": "cpu",
    "batch_size": 1,
    "train#dataset#num_samples": 8,
    "train#trainer#max_epochs": 2,
    "max_minutes": None,
    "val_interval": 1,
    "train#trainer#deepspeed#zero_optimization#stage3_param_persistence_threshold": 0,  # else all are small enough
    "train_workers": 2,
    "gpus_per_worker": 0,
    "cpus_per_worker": 1,
    "max_failures": 1,
    "resource_timeout_s": 120,
}
Make = Callable[..., ConfigWorkflow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of("abc") as made:
        yield made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def workflow(cluster: Cluster, dataset: Path) -> Make:
    """Make a bundle's workflow with its overlay and small settings, which lie beside the folder of the run."""

    def make(bundle: str, run: Path, *accidents: dict[str, Any], **overrides: Any) -> ConfigWorkflow:
        handlers = json.loads((CONFIGS[bundle] / "train.json").read_text())["train"]["handlers"]
        (log,) = (handler for handler in handlers if handler["_target_"].endswith(".CsvLog"))
        log["interval"] = 1
        handlers.append({"_target_": "accidents.Accidents", "output_dir": "@output_dir", "accidents": accidents})
        places = {"bundle_root": str(CONFIGS[bundle].parent), "dataset_dir": str(dataset), "output_dir": str(run)}
        settings = SETTINGS | SMALL_NETWORK[bundle] | places | {"train#handlers": handlers}
        run.with_suffix(".json").write_text(json.dumps(settings))
        return ConfigWorkflow(
            config_file=config_files(bundle, run), workflow_type="train", logging_file=False, **overrides
        )

    return make


def config_files(bundle: str, run: Path) -> list[str]:
    configs = CONFIGS[bundle]
    return [str(configs / "train.json"), str(configs / "overlays/deepspeed_zero3.json"), str(run.with_suffix(".json"))]


def train(workflow: ConfigWorkflow) -> None:
    workflow.initialize()
    workflow.run()


def losses(run: Path) -> list[dict[str, str]]:
    """The rows of train.csv, without what the clock and the memory say."""
    measured = ("elapsed_seconds", "memory_gb", "cuda_memory_gb")
    with (run / "train.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in measured} for row in csv.DictReader(file)]


def iterations(run: Path) -> list[list[int]]:
    """Those that each process has completed, again and again where it lost them."""
    return [[note["iteration"] for note in notes(run, rank)] for rank in (0, 1)]


def check_model(bundle: str, run: Path) -> dict[str, torch.Tensor]:
    """See that model.pt is plain weights, with which the plain network predicts as the workers' did."""
    weights: dict[str, torch.Tensor] = torch.load(run / "model.pt", weights_only=True)
    parser = ConfigParser()
    parser.read_config(config_files(bundle, run))
    network = parser.get_parsed_content("network").eval()
    network.load_state_dict(weights)
    evaluator = parser.get_parsed_content("final#evaluator")
    evaluator.run()
    assert evaluator.state.report == json.loads((run / "metrics.json").read_text())
    # After eight steps a network may find nothing at all: so the weights themselves are compared as well.
    torch.testing.assert_close(dict(weights), dict(read_checkpoint(run / "best.pt")["ema"]), rtol=0, atol=0)
    assert all(value.isfinite().all() for value in weights.values())
    return weights


def test_losses_are_the_same_when_a_machine_is_lost(cluster: Cluster, workflow: Make, tmp_path: Path) -> None:
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    train(workflow("maskrcnn3d", whole))
    taken: dict[str, Any] = {}

    def take_a_node() -> None:
        wait_until((lost / "accident_0").exists)
        taken["node"], taken["time"] = notes(lost, 1)[-1]["node"], time.time()
        cluster.remove_node(cluster.toy_nodes[taken["node"]], allow_graceful=False)

    taker = threading.Thread(target=take_a_node)
    taker.start()
    train(workflow("maskrcnn3d", lost, {"rank": 1, "iteration": 6, "what": "hang"}))
    taker.join()
    assert iterations(whole) == 2 * [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert iterations(lost) == 2 * [[1, 2, 3, 4, 5, *[5, 6, 7, 8]]]
    for rank in (0, 1):
        first, second = notes(lost, rank)[:5], notes(lost, rank)[5:]
        assert 0 < second[0]["time"] - taken["time"] < RESTART
        assert taken["node"] not in {note["node"] for note in second}
        assert len({note["pid"] for note in first + second}) == 2
    assert losses(lost) == losses(whole)
    assert [int(row["iteration"]) for row in losses(lost)] == [1, 2, 3, 4, 5, 6, 7, 8]
    torch.testing.assert_close(check_model("maskrcnn3d", lost), check_model("maskrcnn3d", whole), rtol=0, atol=0)


KILL = {"rank": 1, "iteration": 6, "what": "kill"}


def check_restart(run: Path) -> None:
    """See that both processes went on within the time, with the iterations since the checkpoint lost."""
    for rank in (0, 1):
        first, second = notes(run, rank)[4:6]
        assert (first["iteration"], second["iteration"]) == (5, 5)
        assert second["pid"] != first["pid"]
        assert second["time"] - first["time"] < RESTART


def test_a_group_outlives_a_worker(workflow: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(workflow("mask2former3d", run, KILL))
    assert iterations(run) == 2 * [[1, 2, 3, 4, 5, *[5, 6, 7, 8]]]
    check_restart(run)
    check_model("mask2former3d", run)


def test_a_group_outlives_a_worker_and_goes_on_after_sigterm(workflow: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop = {"rank": 0, "iteration": 7, "what": "stop", "pid": os.getpid()}
    with pytest.raises(SystemExit) as end:
        train(workflow("maskdino3d", run, KILL, stop))
    assert end.value.code == 128 + signal.SIGTERM
    assert iterations(run) == 2 * [[1, 2, 3, 4, 5, *[5, 6, 7]]]
    check_restart(run)
    assert read_checkpoint(run / "last.pt")["iteration"] == 7
    assert not (run / "metrics.json").exists()

    train(workflow("maskdino3d", run, KILL, stop, resume=True))
    assert iterations(run) == 2 * [[1, 2, 3, 4, 5, *[5, 6, 7], *[8]]]
    assert [int(row["iteration"]) for row in losses(run)] == [1, 2, 3, 4, 5, 6, 7, 8]
    check_model("maskdino3d", run)
