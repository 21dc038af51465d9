"""Early stopping: validations counted by hand, any order of the handlers, over a resume."""

import logging

import pytest
from engine_toys import evaluator_of

from seg3d_monai.engine import Checkpoints, CsvLog, EarlyStopping, Validation

# Bars that are found at each validation, and the F1 that comes of it.
F1 = {1: 0.5, 2: 0.8, 3: 1.0}


def epochs_of(make_trainer, script, stopping, **arguments):
    handlers = [Validation(validator=evaluator_of(*script)), stopping]
    trainer = make_trainer(max_epochs=len(script), train_handlers=handlers, **arguments)
    trainer.run()
    assert trainer.state.key_metrics == tuple(F1[largest] for largest in script[: trainer.state.epoch])
    return trainer.state.epoch


@pytest.mark.parametrize(
    ("script", "patience", "min_delta", "epochs"),
    [
        ((1, 2, 2, 2, 2, 2), 2, 0.0, 4),
        ((1, 2, 2, 2, 2, 2), 3, 0.0, 5),
        ((1, 2, 3, 2, 1, 3, 3), 3, 0.0, 6),  # equal is no rise
        ((2, 1, 1, 2, 3, 3, 3), 3, 0.0, 4),
        ((1, 2, 3, 3, 3, 3, 3), 2, 0.4, 5),  # 0.8 is no rise over 0.5, 1.0 is
        ((2, 3, 3, 3), 1, 0.3, 2),
        ((1, 2, 3), 1, 0.0, 3),
        ((1, 1, 1), 3, 0.0, 3),
    ],
)
def test_ends_after_so_many_validations_without_a_rise(make_trainer, script, patience, min_delta, epochs):
    stopping = EarlyStopping(patience=patience, min_delta=min_delta)
    assert epochs_of(make_trainer, script, stopping) == epochs


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1), (0, 2, 1)])
def test_counts_over_a_resume_whatever_the_order_of_the_handlers(make_trainer, tmp_path, caplog, order):
    def run(max_epochs, *script, patience=3):
        handlers = [
            Validation(validator=evaluator_of(*script)),
            EarlyStopping(patience=patience),
            Checkpoints(output_dir=tmp_path),
        ]
        trainer = make_trainer(max_epochs=max_epochs, train_handlers=[handlers[i] for i in order])
        trainer.run()
        return trainer.state.iteration // 4

    caplog.set_level(logging.INFO)
    assert run(3, 1, 2, 2) == 3
    assert run(9, 2, 2) == 5  # one validation without a rise in the first run, two in the second
    assert "the key metric has not risen above 0.8 for 3 validations" in caplog.text
    assert run(9) == 5  # ended is ended


def test_more_patience_goes_on(make_trainer, tmp_path):
    def run(patience, *script):
        handlers = [
            Validation(validator=evaluator_of(*script)),
            EarlyStopping(patience=patience),
            Checkpoints(output_dir=tmp_path),
            CsvLog(output_dir=tmp_path, interval=1),
        ]
        trainer = make_trainer(max_epochs=9, train_handlers=handlers)
        trainer.run()
        return trainer.state.iteration // 4

    assert run(1, 2, 2) == 2
    assert run(2, 3, 2, 2) == 5
    assert len((tmp_path / "validation.csv").read_text().splitlines()) == 1 + 5


def test_without_validation_nothing_is_stopped(make_trainer):
    trainer = make_trainer(train_handlers=[EarlyStopping(patience=1)])
    trainer.run()
    assert trainer.state.iteration == 12


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"patience": 2, "min_delta": -0.1}])
def test_refuses(arguments):
    with pytest.raises(ValueError, match="give validations > 0 and a rise >= 0"):
        EarlyStopping(**arguments)
