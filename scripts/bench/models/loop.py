"""A training's own loop: how long it waits for batches, and how many crops a second go through it."""

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.models.bars import Row
from bench.models.training import Batch, build, read_config, settings_of, specimen_for
from bench.timing import synchronise
from seg3d_monai.data import CropLoader

NUM_STEPS, QUICK_STEPS = 200, 4
METHOD = (
    f"Loop: {NUM_STEPS} steps over the training's own loader, after as many that fill its cache, with each number of "
    "loader's workers; waiting is the time between a step's end and the next batch, as a share of the whole."
)


def measure_loop(
    model: str,
    overlays: Sequence[str],
    dataset_dir: Path | None,
    device: str,
    num_workers: int,
    is_quick: bool,
    folder: Path,
) -> Row:
    """One row: waiting, step and crops a second of a bundle's training.

    Args:
        model: name of the bundle.
        overlays: names or files of overlays.
        dataset_dir: data to train on; None for the built-in specimen.
        device: "cpu" or "cuda".
        num_workers: processes that make batches; 0 makes them between the steps.
        is_quick: tiny sizes.
        folder: where the specimen is, or is to be written, and the run's files.
    """
    data = specimen_for(folder, is_quick) if dataset_dir is None else dataset_dir
    changes = {"dataset_dir": str(data), "output_dir": str(folder / model), "device": device}
    parser = read_config(model, overlays, changes | {"num_workers": num_workers}, is_quick)
    training, loader = build(parser, device), parser.get_parsed_content("train#dataloader")
    num_steps, waits, steps, crops = QUICK_STEPS if is_quick else NUM_STEPS, [], [], 0
    batches = endless(loader)
    for number in range(2 * num_steps):
        start = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        training.step(batch)
        synchronise(torch.device(device))
        if number >= num_steps:
            waits.append(ready - start)
            steps.append(time.perf_counter() - ready)
            crops += len(batch["image"])
    whole = sum(waits) + sum(steps)
    return {
        "model": model,
        "overlays": [Path(name).stem for name in overlays],
        "settings": settings_of(parser, training.trainer),
        "num_workers": num_workers,
        "step_ms": statistics.median(steps) * 1e3,
        "wait_ms": statistics.median(waits) * 1e3,
        "waiting_share": sum(waits) / whole,
        "crops_per_s": crops / whole,
    }


def endless(loader: CropLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader  # type: ignore[misc]
        epoch += 1
