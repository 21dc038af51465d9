"""Checkpoint files: resume bit for bit, damage, full disk, weights that do not fit."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from engine_toys import ToyLoader, ToyNetwork, evaluator_of
from ignite.engine import Events

from seg3d_monai.engine import Checkpoints, Validation, WarmupCosine, load_weights
from seg3d_monai.engine.checkpoint import (
    adapt_input_channels,
    read_checkpoint,
    read_last,
    read_spacing,
    start_from,
    write_checkpoint,
    write_last,
    write_weights,
)


def losses_of(trainer):
    losses = {}

    def remember():
        losses[trainer.state.iteration] = dict(trainer.state.output[0])

    trainer.add_event_handler(Events.ITERATION_COMPLETED, remember)
    return losses


SETTINGS = {
    "optimizer": torch.optim.AdamW,
    "lr": 0.01,
    "max_epochs": 4,
    "ema_decay": 0.9,
    "accumulation_steps": 2,
    "clip_norm": 1.0,
    "seed": 11,
}


@pytest.mark.parametrize("stop_after", [2, 5, 6, 10, 15])
def test_resume_gives_the_same_bits(make_trainer, tmp_path, stop_after):
    """Epochs of 5 batches, 2 a step: stops within an epoch, at its end and at its short last step."""
    schedule = WarmupCosine(warmup=0.1)
    whole = make_trainer(**SETTINGS, schedule=schedule, loader=ToyLoader(num_batches=5))
    expected = losses_of(whole)
    whole.run()

    first = make_trainer(**SETTINGS, schedule=schedule, loader=ToyLoader(num_batches=5))
    Checkpoints(output_dir=tmp_path, minutes=0).attach(first)
    stopped = losses_of(first)

    def crash():
        raise KeyboardInterrupt  # at once, as kill -9 would: nothing is saved on the way out

    first.add_event_handler(Events.ITERATION_STARTED(once=stop_after + 1), crash)
    with pytest.raises(KeyboardInterrupt):
        first.run()

    loader = ToyLoader(num_batches=5)
    second = make_trainer(**SETTINGS, schedule=schedule, loader=loader)
    Checkpoints(output_dir=tmp_path).attach(second)
    resumed = losses_of(second)
    torch.rand(3)
    second.run()
    assert min(resumed) <= stop_after + 1
    assert max(resumed) == 20
    assert {**stopped, **resumed} == expected
    for name, value in whole.checkpoint()["ema"].items():
        assert torch.equal(second.checkpoint()["ema"][name], value)
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] == 20


def test_elapsed_time_adds_up(make_trainer, tmp_path):
    now = [50.0]
    first = make_trainer(max_epochs=1, clock=lambda: now[0])
    Checkpoints(output_dir=tmp_path).attach(first)
    first.add_event_handler(Events.EPOCH_STARTED, lambda: now.__setitem__(0, 80.0))
    first.run()
    now[0] = 7.0  # another process's clock
    second = make_trainer(max_epochs=9, max_minutes=1.0, clock=lambda: now[0])
    Checkpoints(output_dir=tmp_path).attach(second)
    second.add_event_handler(Events.ITERATION_STARTED, lambda: now.__setitem__(0, now[0] + 10.0))
    second.run()
    assert second.state.iteration == 4 + 3
    assert second.elapsed == 60.0


def test_finished_training_is_not_repeated(make_trainer, tmp_path):
    Checkpoints(output_dir=tmp_path).attach(first := make_trainer())
    first.run()
    written = (tmp_path / "last.pt").read_bytes()
    second = make_trainer()
    Checkpoints(output_dir=tmp_path).attach(second)
    losses = losses_of(second)
    second.run()
    assert losses == {}
    assert torch.equal(first.network.linear.weight, second.network.linear.weight)
    assert (tmp_path / "last.pt").read_bytes() == written


def test_without_resume_starts_again(make_trainer, tmp_path):
    Checkpoints(output_dir=tmp_path).attach(first := make_trainer())
    first.run()
    Checkpoints(output_dir=tmp_path, resume=False).attach(second := make_trainer())
    losses = losses_of(second)
    second.run()
    assert sorted(losses) == list(range(1, 13))


@pytest.mark.parametrize(("word", "goes_on"), [("true", True), ("True", True), ("false", False)])
def test_words_of_a_shell_are_no_files(make_trainer, tmp_path, word, goes_on):
    Checkpoints(output_dir=tmp_path, resume=word).attach(first := make_trainer())
    first.run()
    Checkpoints(output_dir=tmp_path, resume=word).attach(second := make_trainer())
    losses = losses_of(second)
    second.run()
    assert (losses == {}) == goes_on


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_last_is_named_and_the_one_before_used(tmp_path, damage, caplog):
    write_last(tmp_path, {"number": 1, "values": torch.arange(100.0)})
    write_last(tmp_path, {"number": 2, "values": torch.arange(100.0)})
    path = tmp_path / "last.pt"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        at = content.find(torch.arange(100.0).numpy().tobytes()) + 41
        content[at] ^= 4
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "flipped": content, "empty": b"", "text": b"x"}[damage]
    )
    assert read_last(tmp_path)["number"] == 1
    assert f"{str(path)!r} is damaged" in caplog.text
    (tmp_path / "last.prev.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.pt' is damaged .*last\.prev\.pt' is damaged"):
        read_last(tmp_path)


def test_no_checkpoint_is_none(tmp_path):
    assert read_last(tmp_path) is None
    write_last(tmp_path, {"number": 1})
    os.replace(tmp_path / "last.pt", tmp_path / "last.prev.pt")  # killed between the two moves
    assert read_last(tmp_path)["number"] == 1


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    write_last(tmp_path, {"number": 1})
    write_last(tmp_path, {"number": 2})

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_last(tmp_path, {"number": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.prev.pt", "last.pt"]
    assert read_last(tmp_path)["number"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("name", ["model.pt", "best.pt", "last.new.pt"])
def test_a_training_goes_on_from_what_it_saved_before_the_disk_was_full(make_trainer, tmp_path, name):
    """The disk is full at the second of four validations, for whichever of the files it is."""

    def training(folder, *script):
        handlers = [Validation(validator=evaluator_of(*script)), Checkpoints(output_dir=folder)]
        return make_trainer(**SETTINGS, train_handlers=handlers)

    whole = training(tmp_path / "whole", 1, 2, 3, 3)
    expected = losses_of(whole)
    whole.run()
    folder = tmp_path / "run"
    first = training(folder, 1, 2)
    kept = {}

    @first.on(Events.ITERATION_STARTED(once=8))
    def fill_the_disk():
        kept.update({path.name: path.read_bytes() for path in folder.iterdir()})
        (folder / f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left on device"):
        first.run()
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert left.keys() == kept.keys() == {"model.pt", "best.pt", "last.pt"}
    assert left["last.pt"] == kept["last.pt"]
    assert name == "last.new.pt" or left[name] == kept[name]

    second = training(folder, 2, 3, 3)
    resumed = losses_of(second)
    second.run()
    assert resumed == {iteration: values for iteration, values in expected.items() if iteration > 4}
    found, wanted = (load_weights(ToyNetwork(), run / "model.pt") for run in (folder, tmp_path / "whole"))
    assert torch.equal(found.linear.weight, wanted.linear.weight)


def test_format_is_checked(tmp_path):
    write_weights(tmp_path / "model.pt", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a training checkpoint"):
        read_checkpoint(tmp_path / "model.pt")
    write_checkpoint(tmp_path / "new.pt", {"version": 99})
    with pytest.raises(ValueError, match="format version 99"):
        read_checkpoint(tmp_path / "new.pt")


def test_weights_load_into_another_network(tmp_path):
    network = ToyNetwork()
    write_weights(tmp_path / "model.pt", network.state_dict())
    other = load_weights(ToyNetwork(), tmp_path / "model.pt")
    assert torch.equal(other.linear.weight, network.linear.weight)
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == set(network.state_dict())


def test_weights_of_a_training_checkpoint_are_the_averaged_ones(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.5, train_handlers=[Checkpoints(output_dir=tmp_path)])
    trainer.run()
    loaded = load_weights(ToyNetwork(), tmp_path / "last.pt")
    assert torch.equal(loaded.linear.weight, trainer.ema.module.linear.weight)
    shipped = load_weights(ToyNetwork(), tmp_path / "model.pt")
    assert torch.equal(shipped.linear.weight, trainer.ema.module.linear.weight)


def test_files_that_do_not_say_the_voxel_size(make_trainer, tmp_path):
    assert read_spacing(tmp_path / "model.pt") is None
    make_trainer(train_handlers=[Checkpoints(output_dir=tmp_path)]).run()
    torch.save(ToyNetwork().state_dict(), tmp_path / "foreign.pt")
    write_checkpoint(tmp_path / "older.pt", {"network": ToyNetwork().state_dict(), "ema": None})
    for name in ("model.pt", "last.pt", "foreign.pt", "older.pt"):
        assert read_spacing(tmp_path / name) is None
    (tmp_path / "model.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="damaged"):
        read_spacing(tmp_path / "model.pt")


def test_weights_that_do_not_fit_are_named(tmp_path):
    weights = ToyNetwork().state_dict()
    weights["linear.weight"] = torch.zeros(3, 4)
    weights["extra"] = weights.pop("linear.bias")
    write_weights(tmp_path / "model.pt", weights)
    with pytest.raises(
        ValueError,
        match=r"1 missing: linear\.bias; 1 unexpected: extra; "
        r"1 differently shaped: linear\.weight \(3, 4\) instead of \(2, 30\)",
    ):
        load_weights(ToyNetwork(), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="does not exist; train first"):
        load_weights(ToyNetwork(), tmp_path / "none.pt")


def test_resuming_something_else_is_refused(make_trainer, tmp_path):
    make_trainer(train_handlers=[Checkpoints(output_dir=tmp_path)]).run()
    for arguments, words in [
        ({"loader": ToyLoader(num_batches=9)}, "4 batches, now 9"),
        ({"ema_decay": 0.5}, "without ema_decay"),
        ({"network": torch.nn.Linear(2, 2)}, "another network or optimizer"),
    ]:
        trainer = make_trainer(**arguments, train_handlers=[Checkpoints(output_dir=tmp_path)])
        with pytest.raises(ValueError, match=words):
            trainer.run()


def test_sigterm_from_outside(tmp_path):
    """A process that is told to stop saves, says nothing of a fault, and its code is that of SIGTERM."""
    script = textwrap.dedent(f"""
        import sys, time, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from engine_toys import ToyLoader, ToyNetwork, toy_criterion
        from seg3d_monai.engine import Checkpoints, InstanceTrainer
        network = ToyNetwork()
        def slow(outputs, targets):
            print("step", flush=True)
            time.sleep(0.05)
            return toy_criterion(outputs, targets)
        InstanceTrainer(
            device="cpu", max_epochs=10_000, train_data_loader=ToyLoader(), network=network, loss_function=slow,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
            train_handlers=[Checkpoints(output_dir={str(tmp_path)!r})],
        ).run()
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "step\n"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] >= 1


def stem(in_channels: int) -> torch.nn.Sequential:
    """A first convolution, a second one, and a grouped one, whose weight has one input channel whatever comes in."""
    return torch.nn.Sequential(
        torch.nn.Conv3d(in_channels, 4, (1, 3, 2)),
        torch.nn.Conv3d(4, 4, 1),
        torch.nn.Conv3d(4, 4, 1, groups=4),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(2),
    )


@pytest.mark.parametrize(
    ("old", "new", "sources", "scale"),
    [
        (1, 3, [0, 0, 0], 1 / 3),
        (2, 5, [0, 1, 0, 1, 0], 2 / 5),
        (3, 2, [0, 1], 3 / 2),
        (2, 2, [0, 1], 1.0),
    ],
)
def test_input_channels_are_repeated_in_turn_and_scaled(old, new, sources, scale):
    torch.manual_seed(0)
    image = torch.rand(2, new, 3, 5, 4)
    before, after = stem(old), stem(new)
    for network, channels in ((before, old), (after, new)):
        network(image[:, :1].expand(-1, channels, -1, -1, -1))
    weights = before.state_dict()
    untouched = {key: value.clone() for key, value in weights.items()}
    adapted = adapt_input_channels(weights, after.state_dict())
    for k, source in enumerate(sources):
        torch.testing.assert_close(adapted["0.weight"][:, k], weights["0.weight"][:, source] * scale)
    assert all(torch.equal(adapted[key], value) for key, value in untouched.items() if key != "0.weight")
    assert all(torch.equal(weights[key], value) for key, value in untouched.items())
    after.load_state_dict(adapted)


@pytest.mark.parametrize("old", [2, 3])
def test_weights_of_several_channels_see_a_grey_image_as_before(tmp_path, caplog, old):
    torch.manual_seed(0)
    image = torch.rand(2, 1, 3, 5, 4)
    before, after = stem(old), stem(1)
    wanted = before(image.expand(-1, old, -1, -1, -1))
    after(image)
    write_weights(tmp_path / "model.pt", before.state_dict())
    with pytest.raises(ValueError, match=r"1 differently shaped: 0\.weight"):
        load_weights(after, tmp_path / "model.pt")
    load_weights(after, tmp_path / "model.pt", adapt_input=True)
    torch.testing.assert_close(after(image), wanted)
    assert f"0.weight was adapted from {old} input channels to 1" in caplog.text
    caplog.clear()
    load_weights(before, tmp_path / "model.pt", adapt_input=True)
    assert not caplog.text


def test_a_training_starts_from_given_weights_or_from_its_own(tmp_path, caplog):
    torch.manual_seed(0)
    image, given, network = torch.rand(2, 1, 3, 5, 4), stem(2), stem(1)
    for net, channels in ((given, 2), (network, 1)):
        net(image.expand(-1, channels, -1, -1, -1))
    own = {key: value.clone() for key, value in network.state_dict().items()}
    for nothing in (None, ""):
        assert start_from(network, nothing) is network
        assert all(torch.equal(own[key], value) for key, value in network.state_dict().items())
    write_weights(tmp_path / "model.pt", given.state_dict())
    torch.testing.assert_close(
        start_from(network, tmp_path / "model.pt")(image), given(image.expand(-1, 2, -1, -1, -1))
    )
    assert "0.weight was adapted from 2 input channels to 1" in caplog.text


def test_other_differences_than_the_input_channels_are_named(tmp_path):
    def network(channels=1, width=4, kernel=3, hidden=6):
        layers = torch.nn.Conv3d(channels, width, kernel), torch.nn.Conv3d(width, 2, 1), torch.nn.Linear(hidden, 2)
        return torch.nn.Sequential(*layers)

    write_weights(tmp_path / "model.pt", network().state_dict())
    for changes, words in [
        ({"channels": 2, "hidden": 7}, r"2 differently shaped: 0\.weight .*2\.weight \(2, 6\) instead of \(2, 7\)"),
        ({"channels": 2, "kernel": 5}, r"1 differently shaped: 0\.weight"),
        ({"width": 5}, r"3 differently shaped: 0\.bias .*0\.weight .*1\.weight"),
        ({"hidden": 7}, r"1 differently shaped: 2\.weight"),  # no convolution
    ]:
        with pytest.raises(ValueError, match=rf"model\.pt' does not fit the network: .*{words}"):
            load_weights(network(**changes), tmp_path / "model.pt", adapt_input=True)
    extra = torch.nn.Sequential(*network(channels=2), torch.nn.Conv3d(2, 2, 1))
    with pytest.raises(ValueError, match=r"2 missing: 3\.bias, 3\.weight"):
        load_weights(extra, tmp_path / "model.pt", adapt_input=True)
