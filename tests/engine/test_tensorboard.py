"""What TensorBoard reads back: losses, rates, metrics, pictures at their iterations; resumes; a missing package."""

import builtins
import subprocess
import sys

import numpy as np
import pytest
from engine_toys import ToyLoader, ToyVolume, evaluator_of, three_bars
from ignite.engine import Events
from matplotlib.image import imread, imsave
from tensorboard.backend.event_processing import event_accumulator

from seg3d_monai.engine import Checkpoints, TensorBoard, Validation, VolumeEvaluator
from seg3d_monai.engine.tensorboard import LARGEST_PICTURE
from seg3d_monai.report import save_slices


def read(folder):
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    images = {tag: {e.step: e for e in events.Images(tag)} for tag in events.Tags()["images"]}
    return scalars, images


def test_scalars(make_trainer, tmp_path):
    handlers = [TensorBoard(output_dir=tmp_path, interval=2), Validation(validator=evaluator_of(3, 2))]
    trainer = make_trainer(max_epochs=2, lr=0.5, schedule=lambda progress: 1 - progress, train_handlers=handlers)
    outputs = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: outputs.append(trainer.state.output[0]))
    trainer.run()
    scalars, images = read(tmp_path)
    assert images == {}
    assert scalars["train/lr"] == pytest.approx({2: 0.375, 4: 0.25, 6: 0.125, 8: 0.0})
    for name in ("loss", "first", "second"):
        means = {k: (outputs[k - 2][name] + outputs[k - 1][name]) / 2 for k in (2, 4, 6, 8)}
        assert scalars[f"train/{name}"] == pytest.approx(means, rel=1e-6)
    assert scalars["validation/f1_50"] == pytest.approx({4: 1.0, 8: 0.8})
    assert {path.name for path in tmp_path.iterdir()} == {"tensorboard"}


def test_a_resumed_run_goes_on_without_points_that_come_twice(make_trainer, tmp_path):
    def run(stop_before=None):
        handlers = [
            TensorBoard(output_dir=tmp_path, interval=1),
            Checkpoints(output_dir=tmp_path, minutes=0 if stop_before else 99),
        ]
        trainer = make_trainer(loader=ToyLoader(num_batches=6), accumulation_steps=3, train_handlers=handlers)

        def kill():
            raise KeyboardInterrupt

        if stop_before:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=stop_before), kill)
        trainer.run()

    with pytest.raises(KeyboardInterrupt):
        run(stop_before=9)  # saved after 6, written up to 8
    run()
    scalars, _ = read(tmp_path)
    assert list(scalars["train/loss"]) == list(range(1, 19))


class Drawn(list):
    """Stands for `save_slices`: keeps what it is asked for, and writes a picture of 3 x 5 pixels in one colour."""

    def __call__(self, path, image, truth, prediction, spacing_um, title, *, position):
        self.append((image, truth, prediction, spacing_um, title, position))
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, np.full((3, 5, 3), (0.2, 0.4, 1.0)))


def test_pictures_of_the_first_volumes(make_trainer, tmp_path):
    drawn = Drawn()
    labels = three_bars()
    validator = evaluator_of(3, 3, 3, 2, 2, 2, volumes=3)
    for k, item in enumerate(validator.data_loader.dataset):
        validator.data_loader.dataset[k] = {**item, "name": f"specimen/{k}"}
    handlers = [
        Validation(validator=validator),
        TensorBoard(output_dir=tmp_path, validator=validator, draw=drawn, num_pictures=2),
    ]
    make_trainer(max_epochs=2, train_handlers=handlers).run()
    _, images = read(tmp_path)
    assert {tag: list(steps) for tag, steps in images.items()} == {f"validation/specimen/{k}": [4, 8] for k in (0, 1)}
    assert (images["validation/specimen/0"][4].height, images["validation/specimen/0"][4].width) == (3, 5)
    assert sorted(path.name for path in (tmp_path / "slices").iterdir()) == ["specimen_0.png", "specimen_1.png"]
    assert [title for *_, title, _ in drawn] == [f"specimen/{k}, epoch {n}" for n in (1, 2) for k in (0, 1)]
    image, truth, prediction, spacing, _, position = drawn[2]
    assert image.shape == (1, *labels.shape)
    assert spacing is None
    assert np.array_equal(truth, labels)
    assert set(np.unique(prediction)) == {0, 1, 2}  # as the evaluator numbers them; bar 3 was not found
    assert labels[tuple(position)] > 0
    assert validator.state.prediction is None


@pytest.mark.parametrize("place", [(1, 2, 3), (70, 5, 590), (139, 29, 280)])
def test_large_volumes_are_drawn_around_their_instances(make_trainer, tmp_path, place):
    drawn = Drawn()
    labels = np.zeros((140, 30, 600), np.uint16)
    labels[place] = 7
    item = {"volume": ToyVolume(labels), "label": ToyVolume(labels), "name": "large"}
    validator = VolumeEvaluator(dataset=[item], predictor=None)
    handler = TensorBoard(output_dir=tmp_path, validator=validator, draw=drawn)
    trainer = make_trainer(train_handlers=[handler])
    validator.state.iteration, validator.state.batch = 1, item
    validator.state.truth, validator.state.prediction = labels, labels + 1
    handler._predicted(validator, trainer)
    ((image, truth, prediction, _, _, position),) = drawn
    assert truth.shape == prediction.shape == image.shape[1:] == (LARGEST_PICTURE[0], 30, LARGEST_PICTURE[2])
    assert truth[tuple(position)] == 7
    assert np.array_equal(image[0], truth)
    assert np.array_equal(prediction, truth + 1)


def test_the_pictures_that_bundles_draw(make_trainer, tmp_path):
    validator = evaluator_of(2)
    handlers = [
        TensorBoard(output_dir=tmp_path, validator=validator, draw=save_slices),
        Validation(validator=validator),
    ]
    make_trainer(max_epochs=1, train_handlers=handlers).run()
    _, images = read(tmp_path)
    picture = imread(tmp_path / "slices" / "toy.png")
    event = images["validation/toy"][4]
    assert (event.height, event.width) == picture.shape[:2]
    assert picture[..., :3].std() > 0.05


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_tensorboard(name, *arguments, **keywords):
        if name.split(".")[0] == "tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **keywords)

    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(ImportError, match=r'pip install "seg3d_monai\[tracking\]"'):
        TensorBoard(output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_engine_does_not_import_tensorboard_or_matplotlib():
    # MONAI imports TensorBoard for itself where it finds it.
    code = "import sys, monai.bundle, monai.engines, monai.visualize; before = set(sys.modules); "
    code += "import seg3d_monai.engine; print(sorted({'tensorboard', 'matplotlib'} & (set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("arguments", [{"interval": 0}, {"num_pictures": -1}])
def test_refuses(arguments):
    with pytest.raises(ValueError, match="give iterations > 0 and pictures >= 0"):
        TensorBoard(output_dir="x", **arguments)
