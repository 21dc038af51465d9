"""What is written of losses and gradients that are not finite: crops, losses, counts; what a resumed run keeps."""

import json

import pytest
from engine_toys import ToyLoader
from ignite.engine import Events

from seg3d_monai.engine import Checkpoints, NonFiniteLog, TrainerEvents


class NamedLoader(ToyLoader):
    """Says, as CropLoader does, which volumes and regions the crops come from; several batches may be poisoned."""

    def __init__(self, poison=(), num_batches=4):
        super().__init__(num_batches=num_batches)
        self.poisoned = set(poison)

    def batch(self, epoch, position):
        self.poison = (epoch, position) if (epoch, position) in self.poisoned else None
        batch = super().batch(epoch, position)
        rois = [(0, 0, crop, 2, 3, crop + 5) for crop in batch["crop_id"]]
        return {**batch, "volume": [f"v{crop}" for crop in batch["crop_id"]], "roi": rois}


def read(folder):
    return json.loads(
        (folder / "nonfinite.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )


def test_a_loss_that_ends_the_training(make_trainer, tmp_path):
    folder = tmp_path / "new"
    trainer = make_trainer(loader=NamedLoader([(2, 1)]), train_handlers=[NonFiniteLog(output_dir=folder)])
    with pytest.raises(FloatingPointError, match=r"epoch 2, iteration 6, crops \[2, 3\]"):
        trainer.run()
    log = read(folder)
    (record,) = log["first"]
    assert log["count"] == 1
    assert (record["epoch"], record["iteration"], record["crop_id"], record["volume"]) == (2, 6, [2, 3], ["v2", "v3"])
    assert record["roi"] == [[0, 0, 2, 2, 3, 7], [0, 0, 3, 2, 3, 8]]
    assert record["losses"] == {"loss": "nan", "first": "nan", "second": "nan"}
    assert record["reason"].startswith("loss {")
    assert [path.name for path in folder.iterdir()] == ["nonfinite.json"]


def test_batches_that_are_skipped_are_counted(make_trainer, tmp_path):
    poison = [(1, 0), (1, 3), (2, 2), (3, 1)]
    handler = NonFiniteLog(output_dir=tmp_path, most=2)
    make_trainer(loader=NamedLoader(poison), on_nonfinite="skip", train_handlers=[handler]).run()
    log = read(tmp_path)
    assert log["count"] == 4
    assert [(record["epoch"], record["crop_id"]) for record in log["first"]] == [(1, [0, 1]), (1, [6, 7])]


def test_a_gradient(make_trainer, tmp_path):
    trainer = make_trainer(on_nonfinite="skip", train_handlers=[NonFiniteLog(output_dir=tmp_path)], clip_norm=1.0)

    def spoil(engine):
        if engine.state.iteration == 7:
            trainer.network.linear.weight.register_hook(lambda gradient: gradient * float("inf"))

    trainer.add_event_handler(Events.ITERATION_STARTED(once=7), spoil)
    reasons = []
    trainer.add_event_handler(TrainerEvents.NOT_FINITE, lambda: reasons.append(trainer.state.fault["reason"]))
    trainer.run()
    log = read(tmp_path)
    assert log["count"] == len(reasons) == 6  # iterations 7 to 12
    record = log["first"][0]
    assert record["reason"] == reasons[0]
    assert record["reason"].startswith("gradient norm ")
    assert record["iteration"] == 7
    assert all(isinstance(value, float) for value in record["losses"].values())


def test_a_resumed_run_goes_on_in_the_file(make_trainer, tmp_path):
    def run(max_epochs, poison):
        handlers = [NonFiniteLog(output_dir=tmp_path), Checkpoints(output_dir=tmp_path)]
        make_trainer(
            max_epochs=max_epochs, loader=NamedLoader(poison), on_nonfinite="skip", train_handlers=handlers
        ).run()

    run(1, [(1, 1)])
    run(2, [(1, 1), (2, 0), (2, 3)])
    log = read(tmp_path)
    assert log["count"] == 3
    assert [record["iteration"] for record in log["first"]] == [2, 5, 8]


def test_what_came_after_the_checkpoint_is_not_counted_twice(make_trainer, tmp_path):
    log = {"count": 9, "first": [{"iteration": 1}, {"iteration": 3}, {"iteration": 30}]}  # six more are only counted
    (tmp_path / "nonfinite.json").write_text(json.dumps(log))
    handler = NonFiniteLog(output_dir=tmp_path)
    make_trainer(loader=NamedLoader([(1, 2)]), on_nonfinite="skip", train_handlers=[handler]).run()
    log = read(tmp_path)
    assert log["count"] == 8  # iteration 1, the six, and now iteration 3
    assert [record["iteration"] for record in log["first"]] == [1, 3]


def test_nothing_is_written_without_a_fault(make_trainer, tmp_path):
    make_trainer(train_handlers=[NonFiniteLog(output_dir=tmp_path / "run")]).run()
    assert not (tmp_path / "run").exists()


def test_refuses():
    with pytest.raises(ValueError, match="most=0 is not positive"):
        NonFiniteLog(output_dir="x", most=0)
