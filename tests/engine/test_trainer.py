"""The training iteration: sums, accumulation, clipping, precision, faults, time and averages, against plain loops."""

import itertools
import os
import signal

import pytest
import torch
from engine_toys import SHAPE, ToyLoader, ToyNetwork, toy_criterion
from ignite.engine import Events

from seg3d_monai.engine import Checkpoints, WarmupCosine


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def record_outputs(trainer):
    outputs = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: outputs.append(dict(trainer.state.output[0])))
    return outputs


def test_equals_a_bare_loop(make_trainer):
    trainer = make_trainer(dropout=0.0)
    outputs = record_outputs(trainer)
    trainer.run()
    torch.manual_seed(5)
    network = ToyNetwork(0.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loader, expected = ToyLoader(), []
    for epoch in (1, 2, 3):
        for position in range(4):
            batch = loader.batch(epoch, position)
            losses = toy_criterion(network(batch["image"], batch["targets"]), batch["targets"])
            total = losses["first"] + losses["second"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            expected.append({"loss": total.item(), **{name: loss.item() for name, loss in losses.items()}})
    assert outputs == expected
    for name, value in network.state_dict().items():
        assert torch.equal(trainer.network.state_dict()[name], value)


def test_batch_keeps_its_list_of_targets(make_trainer):
    trainer = make_trainer(max_epochs=1)
    trainer.run()
    assert trainer.state.batch["crop_id"] == [6, 7]
    assert isinstance(trainer.state.batch["targets"], list)


def test_accumulation_equals_a_larger_batch(make_trainer):
    small = make_trainer(dropout=0.0, loader=ToyLoader(num_batches=6, batch_size=2), accumulation_steps=3)
    large = make_trainer(dropout=0.0, loader=ToyLoader(num_batches=2, batch_size=6))
    small.run()
    large.run()
    for mine, other in zip(small.network.parameters(), large.network.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_last_step_of_an_epoch_takes_the_mean_of_what_is_left(make_trainer):
    lengths = {5: 2, 4: 2, 3: 1}  # batches -> optimizer steps with three batches a step
    for num_batches, steps in lengths.items():
        trainer = make_trainer(max_epochs=1, accumulation_steps=3, loader=ToyLoader(num_batches=num_batches))
        count = []
        trainer.optimizer.register_step_post_hook(lambda *_, count=count: count.append(1))
        trainer.run()
        assert len(count) == steps
    single = make_trainer(dropout=0.0, max_epochs=1, accumulation_steps=3, loader=ToyLoader(num_batches=1))
    plain = make_trainer(dropout=0.0, max_epochs=1, loader=ToyLoader(num_batches=1))
    single.run()
    plain.run()
    assert torch.equal(single.network.linear.weight, plain.network.linear.weight)


def test_clipping_bounds_the_step(make_trainer):
    trainer = make_trainer(dropout=0.0, max_epochs=1, lr=1.0, clip_norm=0.01, loader=ToyLoader(num_batches=1))
    before = weights_of(trainer)
    trainer.run()
    moved = torch.cat(
        [(trainer.network.state_dict()[n] - before[n]).flatten() for n in ("linear.weight", "linear.bias")]
    )
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_bf16_autocast_reaches_the_network_but_not_the_criterion(make_trainer):
    seen = []

    def criterion(outputs, targets):
        seen.append((outputs["value"].dtype, torch.is_autocast_enabled("cpu")))
        return toy_criterion(outputs, targets)

    trainer = make_trainer(dropout=0.0, amp="bf16", loss_function=criterion)
    full = make_trainer(dropout=0.0)
    trainer.run()
    full.run()
    assert set(seen) == {(torch.bfloat16, False)}
    torch.testing.assert_close(trainer.network.linear.weight, full.network.linear.weight, atol=0.01, rtol=0.01)
    assert not torch.equal(trainer.network.linear.weight, full.network.linear.weight)
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())


def test_not_finite_stops_and_names_the_crops(make_trainer):
    trainer = make_trainer(loader=ToyLoader(poison=(2, 1)))
    with pytest.raises(FloatingPointError, match=r"epoch 2, iteration 6, crops \[2, 3\]: loss .*nan.* is not finite"):
        trainer.run()
    assert trainer.network.linear.weight.isfinite().all()


def test_not_finite_skipped_leaves_that_batch_out(make_trainer):
    trainer = make_trainer(dropout=0.0, max_epochs=1, on_nonfinite="skip", loader=ToyLoader(poison=(1, 3)))
    shorter = make_trainer(dropout=0.0, max_epochs=1, loader=ToyLoader(num_batches=3))
    trainer.run()
    shorter.run()
    assert torch.equal(trainer.network.linear.weight, shorter.network.linear.weight)


def test_gradient_that_is_not_finite_stops_too(make_trainer):
    def criterion(outputs, targets):  # sqrt(0): finite value, infinite slope
        return {"root": (outputs["value"] * 0).sum().sqrt()}

    with pytest.raises(FloatingPointError, match="gradient norm"):
        make_trainer(loss_function=criterion).run()


def test_averaged_weights(make_trainer):
    trainer = make_trainer(dropout=0.0, max_epochs=1, ema_decay=0.15, loader=ToyLoader(num_batches=3))
    history = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: history.append(weights_of(trainer)["linear.weight"]))
    trainer.run()
    expected = history[0]
    for weight in history[1:]:  # min(decay, (1 + n) / (10 + n)) is the decay from n = 1 on
        expected = 0.15 * expected + 0.85 * weight
    with trainer.evaluated_weights() as weights:
        assert not trainer.network.training
        torch.testing.assert_close(weights["linear.weight"], expected)
        assert int(weights["seen"]) == 6
    assert trainer.network.training
    assert torch.equal(trainer.network.linear.weight, history[-1])


def test_schedule_in_steps(make_trainer):
    trainer = make_trainer(schedule=WarmupCosine(warmup=0.25, final=0.1), lr=2.0, optimizer=torch.optim.Adam)
    rates = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.run()
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))


def test_schedule_values_by_hand():
    schedule = WarmupCosine(warmup=0.2, final=0.5)
    assert [schedule(p) for p in (0.0, 0.1, 0.2, 0.6, 1.0, 1.7)] == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.5])
    assert WarmupCosine(warmup=0.0, final=0.0)(0.0) == 1.0


@pytest.mark.parametrize("arguments", [{"warmup": 1.0}, {"warmup": -0.1}, {"final": 1.5}])
def test_schedule_refuses(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        WarmupCosine(**arguments)


class FakeClock:
    """Advances by a fixed time at each batch, through the loader."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class SlowLoader(ToyLoader):
    def __init__(self, clock, seconds, **arguments):
        super().__init__(**arguments)
        self.clock, self.seconds = clock, seconds

    def batch(self, epoch, position):
        self.clock.now += self.seconds
        return super().batch(epoch, position)


def test_time_limit_ends_training_and_schedule(make_trainer):
    clock = FakeClock()
    trainer = make_trainer(
        max_epochs=1000,
        max_minutes=1.0,
        clock=clock,
        loader=SlowLoader(clock, seconds=10.0, num_batches=4),
        schedule=WarmupCosine(warmup=0.0, final=0.0),
        lr=1.0,
    )
    rates = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.run()
    assert trainer.state.iteration == 6
    assert trainer.progress == 1.0
    assert rates == pytest.approx([0.9330127, 0.75, 0.5, 0.25, 0.0669873, 0.0], abs=1e-6)


def test_steps_end_first_when_time_is_left(make_trainer):
    clock = FakeClock()
    trainer = make_trainer(max_epochs=2, max_minutes=60.0, clock=clock, loader=SlowLoader(clock, seconds=1.0))
    trainer.run()
    assert (trainer.state.epoch, trainer.state.iteration, trainer.elapsed) == (2, 8, 8.0)


def test_time_limit_waits_for_the_end_of_an_optimizer_step(make_trainer):
    clock = FakeClock()
    loader = SlowLoader(clock, seconds=25.0, num_batches=8)
    trainer = make_trainer(max_epochs=9, max_minutes=1.0, clock=clock, loader=loader, accumulation_steps=4)
    trainer.run()
    assert trainer.state.iteration == 4


def test_random_draws_follow_seed_epoch_and_iteration(make_trainer):
    first, same, other = make_trainer(seed=3), make_trainer(seed=3), make_trainer(seed=4)
    lists = [record_outputs(trainer) for trainer in (first, same, other)]
    first.run()
    torch.rand(7)  # what was drawn before does not matter
    same.run()
    other.run()
    assert lists[0] == lists[1]
    assert lists[0] != lists[2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"amp": "half"},
        {"amp": "fp16"},
        {"max_epochs": 0},
        {"accumulation_steps": 0},
        {"clip_norm": 0.0},
        {"on_nonfinite": "ignore"},
        {"max_minutes": 0.0},
        {"max_minutes": "null"},
        {"max_epochs": 2.5},
        {"ema_decay": 1.0},
        {"train_data_loader": []},
    ],
)
def test_refuses_arguments(make_trainer, arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=rf"^{name}=.* (cannot be used; give|choose one of) "):
        make_trainer(**arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits(make_trainer, tmp_path, number):
    before = signal.getsignal(number)
    trainer = make_trainer(accumulation_steps=2, train_handlers=[Checkpoints(output_dir=tmp_path)])
    trainer.add_event_handler(Events.ITERATION_STARTED(once=5), lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == 128 + number
    assert trainer.state.iteration == 6  # the optimizer step of batches 5 and 6 was finished
    assert torch.load(tmp_path / "last.pt", weights_only=True)["iteration"] == 6
    assert signal.getsignal(number) is before


def test_image_shape_is_not_a_cube():
    assert len(set(SHAPE)) == 3


def test_stop_ends_a_run_as_a_signal_does(make_trainer):
    trainer = make_trainer()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: trainer.stop(signal.SIGTERM))
    assert not trainer.stop(signal.SIGTERM)  # nothing is running yet
    with pytest.raises(SystemExit) as end:
        trainer.run()
    assert end.value.code == 128 + signal.SIGTERM
    assert trainer.state.iteration in (3, 4)
    assert not trainer.stop(signal.SIGTERM)
