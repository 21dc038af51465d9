"""The warm-up-stable-decay schedule: values counted by hand, what does not depend on the length, what is refused."""

import pytest
import torch
from ignite.engine import Events

from seg3d_monai.engine import WarmupStableDecay


@pytest.mark.parametrize(
    ("shape", "decayed"),
    # 0.625, 0.7, 0.825 and 1.0 are 1/16, 1/4, 9/16 and all of a decay of 0.4 that begins at 0.6.
    [("sqrt", [0.75, 0.5, 0.25, 0.0]), ("linear", [15 / 16, 3 / 4, 7 / 16, 0.0])],
)
def test_values_by_hand(shape, decayed):
    schedule = WarmupStableDecay(warmup=0.1, decay=0.4, final=0.2, shape=shape)
    assert [schedule(p) for p in (0.0, 0.05, 0.1, 0.3, 0.6)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    found = [schedule(p) for p in (0.625, 0.7, 0.825, 1.0)]
    assert found == pytest.approx([0.2 + 0.8 * left for left in decayed])
    assert schedule(1.3) == pytest.approx(0.2)


def test_without_warm_up_and_with_nothing_stable():
    assert WarmupStableDecay(warmup=0.0)(0.0) == 1.0
    schedule = WarmupStableDecay(warmup=0.25, decay=0.75, shape="linear")
    assert [schedule(p) for p in (0.125, 0.25, 0.625, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_the_stable_part_does_not_know_the_length(make_trainer):
    def rates_of(epochs):
        schedule = WarmupStableDecay(warmup=1 / epochs, decay=1 / epochs)  # an epoch of 4 steps each
        trainer = make_trainer(max_epochs=epochs, schedule=schedule, lr=2.0, optimizer=torch.optim.Adam)
        rates = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: rates.append(trainer.optimizer.param_groups[0]["lr"])
        )
        trainer.run()
        return rates

    short, long = rates_of(3), rates_of(6)
    decay = [2 * (1 - k**0.5 / 2) for k in (1, 2, 3, 4)]
    assert short == pytest.approx([0.5, 1.0, 1.5, 2.0] + 4 * [2.0] + decay)
    assert long == pytest.approx([0.5, 1.0, 1.5, 2.0] + 16 * [2.0] + decay)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"warmup": 1.0}, r"warmup=1.0 is not in \[0, 1\)"),
        ({"final": -0.1}, r"final=-0.1 is not in \[0, 1\]"),
        ({"decay": 0.0}, r"decay=0.0 is not in \(0, 0.98\]"),
        ({"warmup": 0.5, "decay": 0.6}, r"decay=0.6 is not in \(0, 0.5\]"),
        ({"shape": "cosine"}, "shape='cosine' is not known; choose one of sqrt, linear"),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        WarmupStableDecay(**arguments)
