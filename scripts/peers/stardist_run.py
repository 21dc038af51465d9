"""StarDist in 3D (Weigert et al. 2020), as its own 3D training example sets it up; run by the interpreter that has it.

Percentiles 1 and 99.8, anisotropy from the labels' extents, 96 rays of a Fibonacci lattice, a grid by the anisotropy,
batches of 2, flips and turns in the plane and changes of intensity, the default U-Net, learning rate and its reduction
on a plateau. Beyond the example: it ends by time, and the volumes to tune on serve as its validation data. Nothing of
this project is imported but what needs numpy alone.
"""

import importlib.metadata
import time
from typing import Any

import numpy as np
import tensorflow as tf
from csbdeep.utils import normalize
from csbdeep.utils.tf import keras_import
from stardist import Rays_GoldenSpiral, calculate_extents, fill_label_holes
from stardist.models import Config3D, StarDist3D

from peers.clock import TrainingClock
from peers.exchange import Array, RaceVolume, Request, Spacing, predict_all, write_answer
from peers.stardist_augmentation import augmented

RAYS, QUICK_RAYS = 96, 32
PATCH_SIZE, QUICK_PATCH_SIZE = (32, 96, 96), (16, 32, 32)
BATCH_SIZE = 2
EPOCHS = 10**5
"""More than any time has room for."""
Callback = keras_import("callbacks", "Callback")


class StopByTime(Callback):  # type: ignore[misc, valid-type]
    """Ends a training when its clock is over; the clock stands still from a validation to the next epoch."""

    def __init__(self, clock: TrainingClock) -> None:
        super().__init__()
        self.clock = clock

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Go on."""
        self.clock.go_on()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count, and end it when the time is over."""
        self.clock.step()
        if self.clock.is_over:
            self.model.stop_training = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Stand still."""
        self.clock.pause()


def normalised(image: Array) -> Array:
    """Raw voxels [Z, Y, X] -> float32, percentiles 1 and 99.8 to 0 and 1."""
    return normalize(image, 1, 99.8, axis=(0, 1, 2)).astype(np.float32)


def configuration(labels: list[Array], is_quick: bool) -> Any:
    """The example's configuration for these labels."""
    extents = calculate_extents(labels)
    anisotropy = tuple(float(number) for number in np.max(extents) / extents)
    grid = tuple(1 if number > 1.5 else 2 for number in anisotropy)
    smallest = np.min([array.shape for array in labels], axis=0)
    pooled = 4 * np.array(grid)  # two levels of the U-Net halve what the grid left
    wanted = np.minimum(smallest, QUICK_PATCH_SIZE if is_quick else PATCH_SIZE)
    return Config3D(
        rays=Rays_GoldenSpiral(QUICK_RAYS if is_quick else RAYS, anisotropy=anisotropy),
        grid=grid,
        anisotropy=anisotropy,
        use_gpu=False,
        n_channel_in=1,
        train_patch_size=tuple(int(n) for n in wanted // pooled * pooled),
        train_batch_size=BATCH_SIZE,
        train_tensorboard=False,
        **({"unet_n_filter_base": 4, "net_conv_after_unet": 8, "train_steps_per_epoch": 2} if is_quick else {}),
    )


def prepared(volumes: list[RaceVolume]) -> tuple[list[Array], list[Array]]:
    """Normalised images and labels whose holes are filled."""
    images = [normalised(volume.image) for volume in volumes]
    return images, [fill_label_holes(volume.labels.astype(np.int32)) for volume in volumes]


def run(request: Request) -> dict[str, Any]:
    """Train, optimize thresholds and predict; what is known then."""
    tf.config.threading.set_intra_op_parallelism_threads(request.threads)
    tf.config.threading.set_inter_op_parallelism_threads(request.threads)
    tf.random.set_seed(request.seed)
    images, labels = prepared(request.read(request.train))
    held_back = prepared(request.read(request.tune))
    config = configuration(labels, request.is_quick)
    model = StarDist3D(config, name="model", basedir=request.folder)
    model.prepare_for_training()
    clock = TrainingClock(60 * request.minutes)
    model.callbacks.append(StopByTime(clock))
    model.train(images, labels, validation_data=held_back, augmenter=augmented, seed=request.seed, epochs=EPOCHS)
    start = time.perf_counter()
    thresholds = model.optimize_thresholds(*held_back)
    tune_s = time.perf_counter() - start

    def predict(image: Array, spacing_um: Spacing) -> Array:
        return model.predict_instances(normalised(image))[0]

    return {
        "steps": clock.steps,
        "train_s": clock.elapsed,
        "step_s": clock.step_s,
        "tune_s": tune_s,
        "tuned": {"prob": float(thresholds["prob"]), "nms": float(thresholds["nms"])},
        "predicted": predict_all(request, predict),
        "settings": {
            "rays": config.n_rays,
            "grid": list(config.grid),
            "anisotropy": list(config.anisotropy),
            "patch_size": list(config.train_patch_size),
            "batch_size": BATCH_SIZE,
            "learning_rate": config.train_learning_rate,
            "parameters": int(model.keras_model.count_params()),
        },
        "versions": {name: importlib.metadata.version(name) for name in ("stardist", "csbdeep", "keras", "numpy")}
        | {"tensorflow": tf.__version__},
    }


if __name__ == "__main__":
    request = Request.from_arguments()
    write_answer(request, **run(request))
