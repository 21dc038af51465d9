"""States kept as step_NNNNNN.pt, and what is left of a run whose disk is full or whose last file is damaged."""

import errno

import pytest
import torch
from engine_toys import ToyLoader
from ignite.engine import Events

from seg3d_monai.engine import Checkpoints, WarmupStableDecay
from seg3d_monai.engine.checkpoint import read_checkpoint

SETTINGS = {"optimizer": torch.optim.AdamW, "ema_decay": 0.9, "seed": 11}


def run(make_trainer, handlers, max_epochs=3, num_batches=5, stop_before=None, **arguments):
    """The losses of each iteration of a run, which may be killed."""
    loader = ToyLoader(num_batches=num_batches)
    trainer = make_trainer(**SETTINGS | arguments, max_epochs=max_epochs, loader=loader, train_handlers=handlers)
    losses = {}

    def remember():
        losses[trainer.state.iteration] = dict(trainer.state.output[0])

    def kill():
        raise KeyboardInterrupt

    trainer.add_event_handler(Events.ITERATION_COMPLETED, remember)
    if stop_before is None:
        trainer.run()
    else:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=stop_before), kill)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    return losses


def kept(folder):
    return [path.name for path in sorted(folder.glob("step_*.pt"))]


def test_every_so_many_steps(make_trainer, tmp_path):
    handlers = [Checkpoints(output_dir=tmp_path, snapshot_steps=4, keep=None)]
    run(make_trainer, handlers)
    assert kept(tmp_path) == ["step_000004.pt", "step_000008.pt", "step_000012.pt"]
    assert [read_checkpoint(tmp_path / name)["iteration"] for name in kept(tmp_path)] == [4, 8, 12]


def test_steps_are_optimizer_steps(make_trainer, tmp_path):
    """Epochs of 5 batches, 2 a step: steps end at batches 2, 4 and 5 of each."""
    handlers = [Checkpoints(output_dir=tmp_path, snapshot_steps=1, keep=4)]
    run(make_trainer, handlers, accumulation_steps=2)
    assert kept(tmp_path) == [f"step_00000{k}.pt" for k in (6, 7, 8, 9)]
    assert [read_checkpoint(tmp_path / name)["iteration"] for name in kept(tmp_path)] == [10, 12, 14, 15]


def test_every_so_many_minutes(make_trainer, tmp_path):
    now = [0.0]
    handlers = [Checkpoints(output_dir=tmp_path, snapshot_minutes=1.0, keep=2)]

    def tick(engine):
        now[0] += 25.0

    trainer = make_trainer(max_epochs=3, clock=lambda: now[0], train_handlers=handlers)
    trainer.add_event_handler(Events.ITERATION_STARTED, tick)
    trainer.run()
    assert kept(tmp_path) == ["step_000009.pt", "step_000012.pt"]  # of 3, 6, 9 and 12


def test_files_of_another_run_are_neither_counted_nor_deleted(make_trainer, tmp_path):
    (tmp_path / "step_000900.pt").write_bytes(b"another run's")
    (tmp_path / "step_final.pt").write_bytes(b"a user's")
    (tmp_path / "step_1234567.pt").write_bytes(b"another run's")
    run(make_trainer, [Checkpoints(output_dir=tmp_path, snapshot_steps=3, keep=2)])
    own = ["step_000012.pt", "step_000015.pt"]
    assert sorted(kept(tmp_path)) == sorted([*own, "step_000900.pt", "step_1234567.pt", "step_final.pt"])


def test_a_snapshot_is_gone_on_from_with_the_same_bits(make_trainer, tmp_path):
    schedule = WarmupStableDecay(warmup=0.1, decay=0.2)
    first, second = tmp_path / "first", tmp_path / "second"
    whole = run(make_trainer, [Checkpoints(output_dir=first, snapshot_steps=7)], schedule=schedule)
    handlers = [Checkpoints(output_dir=second, resume=str(first / "step_000007.pt"))]
    resumed = run(make_trainer, handlers, schedule=schedule, stop_before=12)
    assert resumed == {k: whole[k] for k in range(8, 12)}
    # Nothing was saved before the kill; once something is, output_dir's own state comes first.
    handlers = [Checkpoints(output_dir=second, resume=str(first / "step_000007.pt"), minutes=0)]
    assert min(run(make_trainer, handlers, schedule=schedule, stop_before=14)) == 8
    handlers = [Checkpoints(output_dir=second, resume=str(first / "step_000007.pt"))]
    assert run(make_trainer, handlers, schedule=schedule) == {k: whole[k] for k in (14, 15)}


def test_a_file_to_go_on_from_must_exist(make_trainer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"step_000003\.pt' does not exist"):
        run(make_trainer, [Checkpoints(output_dir=tmp_path, resume=tmp_path / "step_000003.pt")])


def test_after_a_damaged_last_file_the_one_before_is_gone_on_from(make_trainer, tmp_path, caplog):
    whole = run(make_trainer, [])
    run(make_trainer, [Checkpoints(output_dir=tmp_path, minutes=0)], stop_before=9)
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] == 8
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    resumed = run(make_trainer, [Checkpoints(output_dir=tmp_path)])
    assert f"{str(tmp_path / 'last.pt')!r} is damaged" in caplog.text
    assert resumed == {k: whole[k] for k in range(8, 16)}


@pytest.mark.parametrize("full_at", ["model.pt", "last.new.pt", "step_000007.pt"])
def test_on_a_full_disk_the_checkpoint_before_survives(make_trainer, tmp_path, monkeypatch, full_at):
    whole = run(make_trainer, [])
    save, saved = torch.save, []

    def save_on_full_disk(content, file):
        """Half of the file is written when the disk is full, at the seventh step."""
        if f".{full_at}." in str(file.name):
            saved.append(content)
            if full_at.startswith("step") or len(saved) == 7:
                save(content, file)
                file.truncate(file.tell() // 2)
                raise OSError(errno.ENOSPC, "No space left on device", file.name)
        save(content, file)

    monkeypatch.setattr(torch, "save", save_on_full_disk)
    handlers = [Checkpoints(output_dir=tmp_path, minutes=0, snapshot_steps=7)]
    with pytest.raises(OSError, match="No space left"):
        run(make_trainer, handlers)
    monkeypatch.undo()
    saved_last = 7 if full_at.startswith("step") else 6
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] == saved_last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.prev.pt", "last.pt", "model.pt"]
    torch.load(tmp_path / "model.pt", weights_only=True)
    resumed = run(make_trainer, [Checkpoints(output_dir=tmp_path)])
    assert resumed == {k: whole[k] for k in range(saved_last + 1, 16)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"snapshot_steps": 0}, "snapshot_steps=0"),
        ({"snapshot_minutes": 0.0}, r"snapshot_minutes=0\.0"),
        ({"keep": 0}, "keep=0"),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(ValueError, match=f"{words} is not positive"):
        Checkpoints(output_dir="x", **arguments)
