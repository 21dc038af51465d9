"""The config checker and the live parser, from Python and from `python -m monai.bundle run`."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from warm_processes import run_module

from seg3d_monai.engine import check_config, live_parser

GOOD = {
    "imports": [
        "$from seg3d_monai.engine import check_config",
        "$from seg3d_monai.engine import record_run",
        "$import engine_toys",
    ],
    "bundle_root": ".",
    "output_dir": "$@bundle_root + '/run'",
    "dataset_dir": "data",
    "device": "cpu",
    "seed": 3,
    "val_interval": 2,
    "max_epochs": 4,
    "sizes": {"hidden": 8},
    "progress": {"_target_": "seg3d_monai.engine.Progress", "seconds": 60},
    "network_def": {"_target_": "engine_toys.ToyNetwork", "dropout": 0.1, "_desc_": "a toy"},
    "network": "$@network_def.to(@device)",
    "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.01},
    "loss": "$engine_toys.toy_criterion",
    "train": {
        "dataset": {"_target_": "monai.data.Dataset", "data": "$list(range(@sizes#hidden))"},
        "dataloader": {"_target_": "engine_toys.ToyLoader", "num_batches": 3},
        "inferer": {"_target_": "SimpleInferer"},
        "handlers": [
            {
                "_target_": "seg3d_monai.engine.Validation",
                "validator": "@validate#evaluator",
                "interval": "@val_interval",
            },
            {"_target_": "seg3d_monai.engine.Checkpoints", "output_dir": "@output_dir"},
            {"_target_": "seg3d_monai.engine.CsvLog", "output_dir": "@output_dir", "interval": 1},
        ],
        "trainer": {
            "_target_": "seg3d_monai.engine.InstanceTrainer",
            "device": "@device",
            "max_epochs": "@max_epochs",
            "train_data_loader": "@train#dataloader",
            "network": "@network",
            "optimizer": "@optimizer",
            "loss_function": "@loss",
            "inferer": "@train#inferer",
            "seed": "@seed",
            "train_handlers": "@train#handlers",
        },
    },
    "validate": {
        "dataset": "$engine_toys.toy_items()",
        "handlers": ["%progress"],
        "evaluator": {
            "_target_": "seg3d_monai.engine.VolumeEvaluator",
            "dataset": "@validate#dataset",
            "predictor": {"_target_": "engine_toys.ToyPredictor", "largest": 2},
            "block_size": [4, 8, 8],
            "halo": [2, 4, 4],
            "val_handlers": "@validate#handlers",
        },
    },
    "report": {
        "_target_": "seg3d_monai.engine.FinalReport",
        "evaluator": "@validate#evaluator",
        "network": "@network",
        "output_dir": "@output_dir",
    },
    "initialize": ["$check_config()", "$record_run(@output_dir, seed=@seed)"],
    "run": ["$@train#trainer.run()", "$@report.final()"],
    "training": "%run",
}
META = {"version": "0.1.0", "monai_version": "1.6.1", "pytorch_version": "2.10", "numpy_version": "1.26"}


def faults_of(change):
    parser = ConfigParser(copy.deepcopy(GOOD))
    change(parser)
    try:
        check_config(parser=parser)
    except ValueError as error:
        return str(error).splitlines()
    return []


def override(id, value=0):
    return lambda parser: parser.update({id: value})


def test_good_config_passes():
    assert faults_of(lambda parser: None) == []


@pytest.mark.parametrize(
    ("id", "mend"),
    [
        ("dataset_dri", "the nearest valid key is 'dataset_dir'"),
        ("max_epoch", "the nearest valid key is 'max_epochs'"),
        ("lr", "the nearest valid key is 'optimizer#lr'"),
        ("num_batch", "the nearest valid key is 'train#dataloader#num_batches'"),
        ("train#datalaoder", "the nearest valid key is 'train#dataloader'"),
        ("xyzzy", "remove it, or use it as @id"),
    ],
)
def test_misspelt_id(id, mend):
    assert faults_of(override(id)) == [f"{id}: nothing in the config refers to this id; {mend}"]


@pytest.mark.parametrize(
    ("id", "target", "mend"),
    [
        ("train#trainer#max_epoch", "seg3d_monai.engine.InstanceTrainer", "the nearest valid key is 'max_epochs'"),
        ("optimizer#momentums", "torch.optim.SGD", "the nearest valid key is 'momentum'"),
        ("train#handlers#2#intervall", "seg3d_monai.engine.CsvLog", "the nearest valid key is 'interval'"),
        ("train#inferer#_disable_", "monai.inferers.inferer.SimpleInferer", "valid keys: none"),
        ("validate#evaluator#predictor#large", "engine_toys.ToyPredictor", "the nearest valid key is 'largest'"),
    ],
)
def test_misspelt_argument(id, target, mend):
    assert faults_of(override(id)) == [f"{id}: {target} has no argument {id.split('#')[-1]!r}; {mend}"]


@pytest.mark.parametrize(
    ("id", "value", "line"),
    [
        (
            "network_def#_target_",
            "engine_toys.ToyNetwrk",
            "network_def#_target_: 'engine_toys.ToyNetwrk' cannot be imported; "
            "the nearest valid name is 'engine_toys.ToyNetwork'",
        ),
        (
            "network_def#_target_",
            "seg3d_monai.engin.InstanceTrainer",
            "network_def#_target_: 'seg3d_monai.engin.InstanceTrainer' cannot be imported; "
            "the nearest valid name is 'seg3d_monai.engine'",
        ),
        (
            "train#inferer#_target_",
            "SimpleInfer",
            "train#inferer#_target_: 'SimpleInfer' cannot be imported; the nearest valid name is 'SimpleInferer'",
        ),
        ("device", "@devise", "device: @devise does not exist; the nearest valid key is 'device'"),
        (
            "network",
            "$@network_df.to(@device)",
            "network: @network_df does not exist; the nearest valid key is 'network_def'",
        ),
    ],
)
def test_misspelt_value(id, value, line):
    assert line in faults_of(override(id, value))


def test_every_fault_is_listed():
    faults = faults_of(lambda parser: parser.update({"dataset_dri": "x", "optimizer#lrr": 1}))
    assert [fault.split(":")[0] for fault in faults] == ["optimizer#lrr", "dataset_dri"]


def test_ids_that_only_refer_to_each_other_are_unused():
    faults = faults_of(lambda parser: parser.update({"ping": ["@pong"], "pong": {"back": "$@ping"}}))
    assert [fault.split(":")[0] for fault in faults] == ["ping", "pong"]


def test_part_of_a_section_that_nothing_uses():
    assert [f.split(":")[0] for f in faults_of(lambda parser: None)] == []
    assert [f.split(":")[0] for f in faults_of(override("sizes#hiden", 9))] == ["sizes#hiden"]
    assert faults_of(override("val_interval", "$@sizes['hiden']")) == []  # the whole section is used now


def test_sections_used_as_macros_count_as_used():
    halo = {"halo_of_all": [1, 2, 3], "validate#evaluator#halo": "%halo_of_all"}
    assert faults_of(lambda parser: parser.update(halo)) == []
    steps = {"run": "%steps", "steps": ["$@train#trainer.run()", "$@report.final()"]}  # copied before "#" becomes "::"
    assert faults_of(lambda parser: parser.update(steps)) == []


def test_entry_points():
    assert len(faults_of(override("my_run", ["$print(1)"]))) == 1
    parser = ConfigParser(copy.deepcopy(GOOD) | {"my_run": ["$print(1)"]})
    check_config(["my_run"], parser=parser)


def test_arguments_reach_the_base_class_and_free_targets_take_any():
    loader = {"_target_": "monai.data.DataLoader", "dataset": [1], "num_workers": 0, "pin_memory": False}
    assert faults_of(override("train#dataloader", loader)) == []
    (fault,) = faults_of(override("train#dataloader", loader | {"pin_memry": True}))
    assert fault.endswith("has no argument 'pin_memry'; the nearest valid key is 'pin_memory'")
    for target in ("builtins.dict", "$engine_toys.toy_items"):
        assert faults_of(override("network_def", {"_target_": target, "anything": 1})) == []


def test_target_that_another_id_names():
    paradigm = {"paradigm": "seg3d_monai.engine.InstanceTrainer", "train#trainer#_target_": "@paradigm"}
    assert faults_of(lambda parser: parser.update(paradigm)) == []
    (fault,) = faults_of(lambda parser: parser.update(paradigm | {"train#trainer#max_epoch": 1}))
    assert fault.endswith("has no argument 'max_epoch'; the nearest valid key is 'max_epochs'")
    (fault,) = faults_of(lambda parser: parser.update(paradigm | {"paradigm": "seg3d_monai.engine.InstanceTrain"}))
    assert fault.endswith("the nearest valid name is 'seg3d_monai.engine.InstanceTrainer'")


def test_live_parser_needs_a_config():
    with pytest.raises(RuntimeError, match="call it from a bundle's config"):
        live_parser()


@pytest.fixture
def bundle(tmp_path):
    """A bundle of the toys on disk: two files that are merged, metadata, and a folder to run in."""
    configs = tmp_path / "toy" / "configs"
    configs.mkdir(parents=True)
    (configs / "train.json").write_text(json.dumps(GOOD | {"bundle_root": str(tmp_path / "toy")}))
    (configs / "overlay.json").write_text(json.dumps({"train#dataloader#num_batches": 2}))
    (configs / "metadata.json").write_text(json.dumps(META))
    return tmp_path / "toy"


@pytest.fixture
def workflow(bundle):
    def make(**overrides):
        files = [str(bundle / "configs" / name) for name in ("train.json", "overlay.json")]
        return ConfigWorkflow(config_file=files, workflow_type="train", **overrides)

    return make


def test_workflow_in_python(workflow, bundle):
    made = workflow(max_epochs=1)
    made.initialize()
    assert made.check_properties() == []
    recorded = json.loads((bundle / "run" / "config.json").read_text())
    assert recorded["max_epochs"] == 1
    assert recorded["train"]["dataloader"]["num_batches"] == 2
    assert recorded["training"] == recorded["run"] == ["$@train::trainer.run()", "$@report.final()"]
    environment = json.loads((bundle / "run" / "environment.json").read_text())
    assert environment["seed"] == 3
    assert {"torch", "monai", "seg3d_monai"} <= environment["packages"].keys()


def test_evaluation_config_has_all_properties(tmp_path):
    config = {name: GOOD[name] for name in ("imports", "bundle_root", "dataset_dir", "device", "network_def")} | {
        "dataset": "$engine_toys.toy_items()",
        "inferer": {"_target_": "engine_toys.ToyPredictor"},
        "handlers": [{"_target_": "seg3d_monai.engine.Progress"}],
        "evaluator": {
            "_target_": "seg3d_monai.engine.VolumeEvaluator",
            "dataset": "@dataset",
            "predictor": "@inferer",
            "val_handlers": "@handlers",
        },
        "initialize": ["$check_config()"],
        "evaluating": ["$@evaluator.run()"],
    }
    (tmp_path / "evaluate.json").write_text(json.dumps(config))
    (tmp_path / "metadata.json").write_text(json.dumps(META))
    made = ConfigWorkflow(
        config_file=str(tmp_path / "evaluate.json"), workflow_type="evaluation", run_id="evaluating", logging_file=False
    )
    made.initialize()
    assert made.check_properties() == []
    made.run()
    assert made.evaluator.key_metric == 1.0


def test_workflow_in_python_refuses(workflow):
    with pytest.raises(RuntimeError) as raised:
        workflow(dataset_dri="x").initialize()
    assert isinstance(raised.value.__cause__, ValueError)
    assert str(raised.value.__cause__).startswith("dataset_dri: ")


def test_own_run_id_is_an_entry_point(workflow):
    workflow(testing=["$print(1)"], run_id="testing").initialize()


def test_run_folder_that_cannot_be_written(workflow, bundle):
    (bundle / "file").write_text("")
    with pytest.raises(RuntimeError) as raised:
        workflow(output_dir=str(bundle / "file" / "run")).initialize()
    assert "output_dir=" in str(raised.value.__cause__)
    assert "cannot be written" in str(raised.value.__cause__)


def words_of(bundle, *arguments):
    files = [str(bundle / "configs" / name) for name in ("train.json", "overlay.json")]
    return ["monai.bundle", "run", "training", "--config_file", str(files), *arguments]


def run_bundle(bundle, *arguments):
    return run_module(*words_of(bundle, *arguments), cwd=bundle)


def test_command_line_trains_and_ends_with_the_score(bundle):
    before = {path for path in bundle.rglob("*") if path.is_file()}
    done = run_bundle(bundle, "--max_epochs", "3", "--optimizer#lr", "0.02")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "F1@0.5 = 0.800"  # the toy predictor misses the largest of three bars
    recorded = json.loads((bundle / "run" / "config.json").read_text())
    assert (recorded["max_epochs"], recorded["optimizer"]["lr"]) == (3, 0.02)
    written = {
        path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file() and path not in before
    }
    names = ("config.json", "environment.json", "last.pt", "last.prev.pt", "best.pt", "model.pt", "train.csv")
    assert written == {f"run/{name}" for name in (*names, "validation.csv", "metrics.json")}
    assert len((bundle / "run" / "train.csv").read_text().splitlines()) == 1 + 6


def test_command_line_refuses_in_one_line(bundle):
    command = [sys.executable, "-m", *words_of(bundle, "--dataset_dri", "x")]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "ValueError: dataset_dri: nothing in the config refers to this id; the nearest valid key is 'dataset_dir'"
    )
    assert "Traceback" not in done.stderr
    assert not (bundle / "run").exists()


def test_command_line_override_below_an_id_that_does_not_exist(bundle):
    done = run_bundle(bundle, "--optimzer#lr", "1")  # MONAI itself refuses this one
    assert done.returncode != 0
    assert "optimizer" in done.stderr
    assert not (bundle / "run").exists()
