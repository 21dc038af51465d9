"""A U-Net with foreground and distance, plainly trained, and a watershed on its maps: what a careful user builds.

AdamW with warm-up and half a cosine over the minutes, bf16 where the processor computes in it, averaged weights. It is
run as a process of its own: `python -m peers.unet REQUEST`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.exchange import Array, Request, Spacing, predict_all, write_answer
from peers.unet_crops import TrainingCrops, normalised
from peers.unet_network import FILTERS, QUICK_FILTERS, DistanceUNet
from peers.watershed import GRID, Maps, instances, tuned
from seg3d_monai.data.freed_memory import keep_freed_memory
from seg3d_monai.engine.average import WeightAverage
from seg3d_monai.engine.schedule import WarmupCosine
from seg3d_monai.inference.precision import autocast_dtype

CROP_SIZE, QUICK_CROP_SIZE = (48, 96, 96), (16, 32, 32)
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM, EMA_DECAY = 2, 1e-3, 0.01, 5.0, 0.99
QUICK_GRID: dict[str, tuple[float, ...]] = {key: values[:1] for key, values in GRID.items()}


@dataclass(frozen=True)
class Training:
    """What came of a training.

    Attributes:
        network: with the averaged weights, in eval mode.
        steps: optimizer steps.
        seconds: of the loop.
        loss: mean over the last tenth of the steps.
    """

    network: nn.Module
    steps: int
    seconds: float
    loss: float


def loss_of(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy and Dice of the foreground, cross-entropy of the distance, over voxels that are not ignored.

    Args:
        logits: [N, 2, D, H, W].
        batch: as `TrainingCrops.batch` makes it.
    """
    foreground, distance = logits.float().unbind(1)
    kind, weight = batch["kind"][:, 0], (batch["kind"][:, 0] >= 0).float()
    truth = (kind > 0).float()
    count = weight.sum().clamp_min(1)
    entropy = F.binary_cross_entropy_with_logits(foreground, truth, weight, reduction="sum") / count
    prob = foreground.sigmoid() * weight
    dice = 1 - (2 * (prob * truth).sum() + 1) / (prob.sum() + truth.sum() + 1)
    far = F.binary_cross_entropy_with_logits(distance, batch["distance"][:, 0], weight, reduction="sum") / count
    return entropy + dice + far


def train(
    network: nn.Module,
    batches: Callable[[int], dict[str, Tensor]],
    *,
    minutes: float,
    autocast: torch.dtype | None,
    clock: Callable[[], float] = time.perf_counter,
) -> Training:
    """Train until the minutes are over, one step at least.

    Args:
        network: images -> logits.
        batches: the batch of each step.
        minutes: of wall-clock time.
        autocast: type of the forward pass, None for float32.
        clock: seconds that only grow; for tests.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule, average = WarmupCosine(warmup=0.03, final=0.01), WeightAverage(network, EMA_DECAY)
    losses: list[float] = []
    network.train()
    start = clock()
    while not losses or clock() - start < 60 * minutes:
        factor = schedule((clock() - start) / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        batch = batches(len(losses))
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = network(batch["image"])
        loss = loss_of(logits, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        average.update()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 10) :]
    return Training(
        network=average.module.eval(), steps=len(losses), seconds=clock() - start, loss=sum(last) / len(last)
    )


def run(request: Request) -> dict[str, Any]:
    """Train, tune and predict; what is known then."""
    torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    keep_freed_memory()
    autocast = autocast_dtype("auto", "cpu")
    volumes = request.read(request.train)
    spacing = np.median([volume.spacing_um for volume in volumes], axis=0).tolist()
    network = DistanceUNet(spacing_um=spacing, filters=QUICK_FILTERS if request.is_quick else FILTERS)
    crop_size = QUICK_CROP_SIZE if request.is_quick else CROP_SIZE
    crops = TrainingCrops(volumes=volumes, crop_size=crop_size, seed=request.seed)
    done = train(network, lambda step: crops.batch(step, BATCH_SIZE), minutes=request.minutes, autocast=autocast)
    trained = done.network
    assert isinstance(trained, DistanceUNet)

    def maps(image: Array, spacing_um: Spacing) -> Maps:
        foreground, distance = trained.maps(torch.from_numpy(normalised(image)), autocast).numpy()
        return Maps(foreground=foreground, distance=distance, spacing_um=spacing_um)

    start = time.perf_counter()
    held_back = request.read(request.tune)
    settings, facts = tuned(
        [maps(volume.image, volume.spacing_um) for volume in held_back],
        [volume.labels for volume in held_back],
        QUICK_GRID if request.is_quick else GRID,
    )
    tune_s = time.perf_counter() - start
    return {
        "steps": done.steps,
        "train_s": done.seconds,
        "step_s": done.seconds / done.steps,
        "tune_s": tune_s,
        "tuned": facts,
        "predicted": predict_all(request, lambda image, spacing_um: instances(maps(image, spacing_um), settings)),
        "settings": {
            "crop_size": list(crop_size),
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "filters": list(QUICK_FILTERS if request.is_quick else FILTERS),
            "parameters": sum(parameter.numel() for parameter in trained.parameters()),
            "autocast": str(autocast),
            "last_loss": done.loss,
        },
        "versions": {},
    }


if __name__ == "__main__":
    request = Request.from_arguments()
    write_answer(request, **run(request))
