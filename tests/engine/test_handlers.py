"""Validation, best weights, CSV files and progress lines, on the toy trainer."""

import csv
import os
import sys
from pathlib import Path

import pytest
import torch
from engine_toys import ToyLoader, ToyPredictor, evaluator_of, three_bars, toy_item
from ignite.engine import Events

from seg3d_monai.data.memory_limit import machine_memory
from seg3d_monai.engine import Checkpoints, CsvLog, Progress, TrainerEvents, Validation, VolumeEvaluator, read_spacing


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("checkpoints_first", [True, False])
def test_best_and_last_weights(make_trainer, tmp_path, checkpoints_first):
    handlers = [Validation(validator=evaluator_of(1, 3, 2)), Checkpoints(output_dir=tmp_path)]
    trainer = make_trainer(train_handlers=handlers[::-1] if checkpoints_first else handlers)
    weights = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: weights.append(trainer.network.linear.weight.clone()))
    trainer.run()
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=True)["linear.weight"], weights[1])
    assert torch.load(tmp_path / "best.pt", weights_only=True)["iteration"] == 8
    assert torch.load(tmp_path / "last.pt", weights_only=True)["iteration"] == 12
    assert torch.load(tmp_path / "last.prev.pt", weights_only=True)["iteration"] == 8
    assert (trainer.state.best_metric, trainer.state.best_metric_epoch) == (1.0, 2)


def test_best_is_remembered_over_a_resume(make_trainer, tmp_path):
    def run(max_epochs, *script):
        handlers = [Validation(validator=evaluator_of(*script)), Checkpoints(output_dir=tmp_path)]
        make_trainer(max_epochs=max_epochs, train_handlers=handlers).run()
        return torch.load(tmp_path / "best.pt", weights_only=True)["iteration"]

    assert run(1, 2) == 4
    assert run(2, 1) == 4
    assert run(3, 3) == 12


def test_validation_sees_averaged_weights_in_eval_mode(make_trainer):
    seen = []
    validator = evaluator_of(
        3, look=lambda: seen.append((trainer.network.training, trainer.network.linear.weight.clone()))
    )
    trainer = make_trainer(ema_decay=0.9, max_epochs=1, train_handlers=[Validation(validator=validator)])
    trainer.run()
    ((training, weight),) = seen
    assert not training
    assert torch.equal(weight, trainer.ema.module.linear.weight)
    assert not torch.equal(weight, trainer.network.linear.weight)


@pytest.mark.parametrize(("interval", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_interval_in_epochs_and_always_at_the_end(make_trainer, interval, epochs):
    trainer = make_trainer(
        max_epochs=5, train_handlers=[Validation(validator=evaluator_of(*[3] * 9), interval=interval)]
    )
    validated = []
    trainer.add_event_handler(TrainerEvents.VALIDATED, lambda: validated.append(trainer.state.epoch))
    trainer.run()
    assert validated == epochs


def test_interval_in_minutes(make_trainer):
    now = [0.0]
    handlers = [Validation(validator=evaluator_of(*[3] * 9), minutes=1.0)]
    trainer = make_trainer(max_epochs=7, clock=lambda: now[0], train_handlers=handlers)
    validated = []
    trainer.add_event_handler(TrainerEvents.VALIDATED, lambda: validated.append(trainer.state.epoch))
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: now.__setitem__(0, now[0] + 25.0))
    trainer.run()
    assert validated == [3, 6, 7]


def test_validation_after_the_time_is_up_within_an_epoch(make_trainer, tmp_path):
    now = [0.0]
    handlers = [Validation(validator=evaluator_of(3)), Checkpoints(output_dir=tmp_path)]
    trainer = make_trainer(max_minutes=1.0, clock=lambda: now[0], train_handlers=handlers)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: now.__setitem__(0, now[0] + 30.0))
    trainer.run()
    assert trainer.state.iteration == 2
    assert trainer.state.metrics["f1_50"] == 1.0
    assert (tmp_path / "best.pt").exists()


def test_without_volumes_the_last_weights_are_shipped(make_trainer, tmp_path, caplog):
    handlers = [Validation(validator=VolumeEvaluator(dataset=[], predictor=None)), Checkpoints(output_dir=tmp_path)]
    trainer = make_trainer(train_handlers=handlers)
    trainer.run()
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(weights["linear.weight"], trainer.network.linear.weight)
    assert not (tmp_path / "best.pt").exists()
    assert "no volume to validate on" in caplog.text


def test_csv_rows(make_trainer, tmp_path):
    handlers = [CsvLog(output_dir=tmp_path, interval=2), Validation(validator=evaluator_of(3, 2))]
    trainer = make_trainer(max_epochs=2, train_handlers=handlers)
    outputs = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: outputs.append(trainer.state.output[0]))
    trainer.run()
    rows = rows_of(tmp_path / "train.csv")
    assert list(rows[0]) == ["epoch", "iteration", "elapsed_seconds", "memory_gb", "lr", "loss", "first", "second"]
    peaks = [float(row["memory_gb"]) for row in rows]
    assert peaks == sorted(peaks)
    if sys.platform == "linux":
        resident_gb = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
        assert 0.5 * resident_gb < peaks[-1] < machine_memory() / 1e9
    assert [(row["epoch"], row["iteration"]) for row in rows] == [("1", "2"), ("1", "4"), ("2", "6"), ("2", "8")]
    assert float(rows[1]["first"]) == (outputs[2]["first"] + outputs[3]["first"]) / 2
    scores = rows_of(tmp_path / "validation.csv")
    assert [(row["epoch"], float(row["f1_50"])) for row in scores] == [("1", 1.0), ("2", 0.8)]


def test_csv_of_a_resumed_run_has_every_row_once(make_trainer, tmp_path):
    def run(fail_at=None):
        handlers = [CsvLog(output_dir=tmp_path, interval=1), Checkpoints(output_dir=tmp_path)]
        trainer = make_trainer(loader=ToyLoader(num_batches=6), accumulation_steps=3, train_handlers=handlers)

        def fail():
            raise RuntimeError("killed")

        if fail_at:
            handlers[1].minutes = 0
            trainer.add_event_handler(Events.ITERATION_STARTED(once=fail_at), fail)
        trainer.run()

    with pytest.raises(RuntimeError, match="killed"):
        run(fail_at=9)  # saved after 6
    run()
    assert [int(row["iteration"]) for row in rows_of(tmp_path / "train.csv")] == list(range(1, 19))


def test_half_a_row_of_a_killed_run_is_left_out(make_trainer, tmp_path):
    def run(epochs):
        handlers = [CsvLog(output_dir=tmp_path, interval=2), Checkpoints(output_dir=tmp_path)]
        make_trainer(max_epochs=epochs, train_handlers=handlers).run()

    run(1)
    with (tmp_path / "train.csv").open("a", newline="") as file:
        file.write("2,")
    run(2)
    assert [row["iteration"] for row in rows_of(tmp_path / "train.csv")] == ["2", "4", "6", "8"]


def test_progress_lines_without_a_terminal(make_trainer, capsys):
    trainer = make_trainer(max_epochs=1, train_handlers=[Progress(seconds=0)])
    trainer.run()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split(",")[0] for line in lines] == [
        "training: 25%",
        "training: 50%",
        "training: 75%",
        "training: 100%",
        "training: done",
    ]
    assert "left, epoch 1, loss " in lines[0]


def test_progress_bar_on_a_terminal(make_trainer, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    evaluator = VolumeEvaluator(
        dataset=[toy_item(three_bars())], predictor=ToyPredictor(), val_handlers=[Progress(name="validation")]
    )
    evaluator.run()
    shown = capsys.readouterr().err
    assert "validation:   0%|" in shown
    assert shown.splitlines()[-1].startswith("validation: done, 0:00:00 left, epoch 1, name toy, instances 3")


@pytest.mark.parametrize("arguments", [{"interval": 0}, {"minutes": 0}])
def test_validation_refuses(arguments):
    with pytest.raises(ValueError, match="validation needs positive numbers"):
        Validation(validator=evaluator_of(), **arguments)


def test_csv_refuses():
    with pytest.raises(ValueError, match="interval=0 is not positive"):
        CsvLog(output_dir="x", interval=0)


def test_the_voxel_size_of_the_training_is_kept_in_every_file(make_trainer, tmp_path):
    spacing = (2.0, 0.8, 0.4)
    checkpoints = Checkpoints(output_dir=tmp_path, spacing_um=spacing)
    trainer = make_trainer(train_handlers=[Validation(validator=evaluator_of(1, 3, 2)), checkpoints])
    trainer.run()
    for name in ("model.pt", "best.pt", "last.pt", "last.prev.pt"):
        assert read_spacing(tmp_path / name) == spacing
    plain = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(plain) == set(trainer.network.state_dict())
    trainer.network.load_state_dict(plain)
    again = make_trainer(max_epochs=4, train_handlers=[Checkpoints(output_dir=tmp_path)])
    again.run()
    assert again.state.iteration == 16
    assert read_spacing(tmp_path / "last.pt") is None
