"""Training by several processes: the same gradients however crops are shared out, and one decision for all."""

import os
import signal

import pytest
import torch
from ignite.engine import Events
from replica_toys import CropsOfRank, detector_gradients, in_processes, toy_trainer, train_toy, weights

ARRANGEMENTS = [(1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2)]  # processes, batch size, batches a step: 4 crops a step
POISONED = [(6, 1), (2, 2), (6, 2)]  # the crop of the second process that is not a number, batches a step


def decide(rank, size, poison, on_nonfinite, accumulation_steps):
    loader = CropsOfRank(num_crops=16, batch_size=2, rank=rank, size=size, poison=poison)
    trainer = toy_trainer(loader, on_nonfinite=on_nonfinite, accumulation_steps=accumulation_steps, max_epochs=1)
    trainer.run()
    return weights(trainer.network)


def stop(rank, size, how):
    clock = {"time": 100.0 * rank}  # the clocks of two machines have nothing in common

    def tick(engine):
        clock["time"] += 10 + 7 * rank
        if how == "signal" and rank == 1 and engine.state.iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    loader = CropsOfRank(num_crops=16, batch_size=2, rank=rank, size=size)
    minutes = 1.0 if how == "time" else None
    trainer = toy_trainer(loader, max_epochs=9, max_minutes=minutes, clock=lambda: clock["time"])
    trainer.add_event_handler(Events.ITERATION_COMPLETED, tick)
    try:
        trainer.run()
    except SystemExit as error:
        return trainer.state.iteration, error.code
    return trainer.state.iteration, trainer.elapsed


CALLS = [
    *((train_toy, *arrangement[1:]) for arrangement in ARRANGEMENTS[2:]),
    (detector_gradients, 2, 1),
    *((decide, poison, "skip", batches) for poison, batches in POISONED),
    (decide, 6, "stop", 1),
    (stop, "signal"),
    (stop, "time"),
]


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """(function, *arguments) -> what it returns in the first and in the second process; they start once for all."""
    found = in_processes(2, CALLS, tmp_path_factory.mktemp("processes"))
    return lambda *call: found[CALLS.index(call)]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_the_arrangement_of_crops_does_not_change_the_training(arrangement, in_two_processes):
    network, average, losses = train_toy(0, 1, 4, 1)
    size, *settings = arrangement
    found = in_two_processes(train_toy, *settings) if size == 2 else [train_toy(0, 1, *settings)]
    for mine, its_average, _ in found:
        torch.testing.assert_close(mine, network, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(its_average, average, rtol=1e-5, atol=1e-6)
    # The losses of the parts are on the scale of the whole: their mean is its loss.
    parts = torch.tensor([of_rank for *_, of_rank in found]).view(size, -1, settings[1])
    torch.testing.assert_close(parts.mean((0, 2)), torch.tensor(losses), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_of_a_detector_are_the_same(size, in_two_processes):
    whole = detector_gradients(0, 1, 4, 1)
    found = in_two_processes(detector_gradients, 2, 1) if size == 2 else [detector_gradients(0, 1, 2, 2)]
    for gradients in found:
        for name, gradient in whole.items():
            assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize(("poison", "batches"), POISONED)
def test_a_loss_that_is_not_finite_in_one_process_is_left_out_in_all(poison, batches, in_two_processes):
    first, second = in_two_processes(decide, poison, "skip", batches)
    assert all(value.isfinite().all() for value in first.values())
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(in_two_processes):
    first, second = in_two_processes(decide, 6, "stop", 1)
    assert isinstance(first, FloatingPointError)
    assert isinstance(second, FloatingPointError)
    assert "crops [4, 5]: loss of another process is not finite" in str(first)
    assert "crops [6, 7]: loss {'loss': nan" in str(second)


@pytest.mark.parametrize("how", ["signal", "time"])
def test_all_stop_at_the_same_iteration(how, in_two_processes):
    first, second = in_two_processes(stop, how)
    assert first == second
    if how == "signal":
        assert first[0] in (3, 4)
        assert first[1] == 128 + signal.SIGTERM
    else:
        assert first == (7, 60.0)  # the first process' clock stands at 60 seconds in the seventh iteration
