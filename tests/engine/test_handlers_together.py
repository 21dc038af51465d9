"""All handlers of a training by two processes: the first one writes, both decide alike, means are over both."""

import csv
import json

import pytest
import torch
from engine_toys import evaluator_of
from ignite.engine import Events
from replica_toys import CropsOfRank, in_processes, toy_trainer

from seg3d_monai.engine import Checkpoints, CsvLog, EarlyStopping, NonFiniteLog, Progress, TensorBoard, Validation


def train(rank, size, folder, script, max_epochs):
    """What a process sees of a training in which crop 6, of the second process, is not a number."""
    run = folder if rank == 0 else folder / "second"  # is there if the second process writes what it should not
    checkpoints = Checkpoints(output_dir=folder, minutes=0, snapshot_steps=3, keep=2)
    validation = Validation(validator=evaluator_of(*(script if rank == 0 else ())))  # the second must not predict
    handlers = [
        Progress(seconds=0),
        validation,
        EarlyStopping(patience=2),
        CsvLog(output_dir=run, interval=1),
        TensorBoard(output_dir=run, interval=1),
        NonFiniteLog(output_dir=folder),
        checkpoints,
    ]
    loader = CropsOfRank(num_crops=16, batch_size=2, rank=rank, size=size, poison=6)
    trainer = toy_trainer(loader, max_epochs=max_epochs, on_nonfinite="skip", ema_decay=0.9, train_handlers=handlers)
    losses = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.output[0]["loss"]))
    trainer.run()
    state = trainer.state
    return state.iteration, state.key_metrics, state.best_metric, dict(state.metrics), losses, trainer.checkpoint()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    run = folder / "run"
    calls = [(train, run, (1, 2), 2), (train, run, (2, 1), 9)]  # the second one goes on from the first
    return run, in_processes(2, calls, folder)


def test_both_decide_alike(trained):
    _, runs = trained
    for first, second in runs:
        assert first[:4] == second[:4]
        for name, value in first[5]["network"].items():
            if name != "seen":
                assert torch.equal(value, second[5]["network"][name])
    assert [run[0][0] for run in runs] == [8, 16]  # 4 batches an epoch; stopped after two validations without a rise
    assert runs[1][0][1] == (0.5, 0.8, 0.8, 0.5)


def test_the_first_one_writes(trained):
    run, _ = trained
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("last.pt", "last.prev.pt", "best.pt", "model.pt", "step_000012.pt", "step_000015.pt"),
        *("train.csv", "validation.csv", "tensorboard", "nonfinite.1.json"),
    }
    with (run / "validation.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_rows_are_means_over_both(trained):
    run, runs = trained
    losses = [sum(pair) / 2 for first, second in runs for pair in zip(first[4], second[4], strict=True)]
    with (run / "train.csv").open() as file:
        rows = [float(row["loss"]) for row in csv.DictReader(file)]
    assert rows == pytest.approx(losses, nan_ok=True)


def test_the_one_whose_crop_it_is_writes_of_it(trained):
    log = json.loads((trained[0] / "nonfinite.1.json").read_text())
    assert log["count"] == 4
    assert [record["crop_id"] for record in log["first"]] == 4 * [[6, 7]]
