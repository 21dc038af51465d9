"""Peak memory of training at the papers' sizes: one crop full of touching cells, bfloat16, activation checkpointing.

On the CPU a fresh process builds the bundle's trainer with the overlay model_r50 over train.json, takes two steps and
reads its own peak of resident memory, from which nothing is taken off: Python, libraries, weights, gradients, AdamW's
moments and averaged weights are all in it. Two steps, because AdamW's moments exist from the first update on. It is
VmHWM and not getrusage's ru_maxrss, which a process started by a larger one inherits. On CUDA it is the peak of torch's
allocator.
"""

import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.memory import ResidentPeak
from bench.models.bars import Row
from bench.models.training import Batch, build, read_config, settings_of
from seg3d_monai.data.synthetic import make_volume
from seg3d_monai.data.synthetic_nuclei import NucleiModel
from seg3d_monai.data.targets import derive_targets

OVERLAYS = ("model_r50",)
CROP_SIZE, NUM_INSTANCES = (128, 128, 128), 100
QUICK_CROP_SIZE, QUICK_NUM_INSTANCES = (16, 32, 40), 6
NUM_STEPS = 2
METHOD = (
    f"Memory: a fresh process takes {NUM_STEPS} training steps, optimizer included, of a bundle with the overlay "
    f"{', '.join(OVERLAYS)} in bf16 on one crop of touching cells; peak is VmHWM of the process, Python and libraries "
    "included (on CUDA the peak of torch's allocator); 1 GB is 1e9 bytes."
)


def measure_memory(model: str, device: str, threads: int, is_quick: bool) -> Row:
    """One row: peak memory of a bundle's training at the papers' sizes, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as fresh_process:
            return fresh_process.submit(measure_here, model, device, threads, is_quick).result()
    except BrokenProcessPool:
        return {"model": model, "peak_gb": None, "error": "the process was killed, most likely for want of memory"}


def measure_here(model: str, device: str, threads: int, is_quick: bool) -> Row:
    """What `measure_memory` measures, in this process."""
    torch.set_num_threads(threads)
    size, num_instances = (QUICK_CROP_SIZE, QUICK_NUM_INSTANCES) if is_quick else (CROP_SIZE, NUM_INSTANCES)
    batch = crowded_crop(size, num_instances)
    has_resident_peak = Path("/proc/self/clear_refs").exists()
    resident = ResidentPeak() if has_resident_peak else None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # The trainer gets a loader that only has a length: its handlers and their data are not part of a step.
    changes = {"device": device, "amp": "bf16", "crop_size": list(size), "batch_size": 1}
    changes |= {"train#handlers": [], "train#dataloader": "$[None]"}
    parser = read_config(model, OVERLAYS, changes, is_quick)
    training = build(parser, device)
    seconds = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        training.step(batch)
        seconds.append(time.perf_counter() - start)
    checkpointed = [
        name
        for name, part in training.trainer.network.named_modules()
        if getattr(part, "activation_checkpointing", False)
    ]
    row: Row = {
        "model": model,
        "overlays": list(OVERLAYS),
        "changed_ids": sorted(changes),
        "settings": settings_of(parser, training.trainer),
        "num_instances": len(batch["targets"][0]["ids"]),
        "checkpointed": checkpointed,
        "steps_s": seconds,
    }
    if device == "cuda":
        return row | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    if resident is None:
        return row | {"peak_gb": None}
    return row | {"peak_gb": (resident.before + resident.growth()) / 1e9, "rss_after_import_gb": resident.before / 1e9}


def crowded_crop(size: tuple[int, int, int], num_instances: int) -> Batch:
    """A batch of one crop with so many synthetic cells, 0.6 to 1.3 times a mean diameter, most of them touching.

    Args:
        size: (z, y, x) voxels.
        num_instances: cells; together they fill about a third of the crop.

    Returns:
        {"image" float32 [1, 1, D, H, W], normalised, "targets": one dict, "crop_id"}.
    """
    diameter = (6 * 0.4 * math.prod(size) / (math.pi * num_instances)) ** (1 / 3)
    nuclei = NucleiModel(
        density=1.4 * num_instances / math.prod(size), diameter_um=(0.6 * diameter, 1.3 * diameter), attach_prob=0.9
    )
    image, labels = make_volume(size, seed=0, spacing_um=(1.0, 1.0, 1.0), nuclei=nuclei)
    labels = labels.astype(np.int64)
    kept = derive_targets(labels)["ids"].numpy()[:num_instances]
    if len(kept) < num_instances:
        raise ValueError(f"only {len(kept)} of {num_instances} cells fit into {size}; ask for fewer")
    targets: dict[str, Any] = dict(derive_targets(np.where(np.isin(labels, kept), labels, 0)))
    voxels = torch.from_numpy(image.astype(np.float32))
    return {"image": ((voxels - voxels.mean()) / voxels.std())[None, None], "targets": [targets], "crop_id": [0]}
