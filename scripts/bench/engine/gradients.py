"""The gradient of one step on four crops, taken in every way that the engine has, and the losses of twenty steps.

Which proposals the RPN makes depends on which of two nearly equal scores is the larger: rounding there becomes other
boxes. Here the proposals are a fixed lattice, and every anchor and every proposal is taken: nothing is drawn, and only
rounding is left. The gradient is read from the weights before and after a step of SGD, since ZeRO shares its own
out; the learning rate is so large that the weights before do not reach the digits of those after.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from monai.bundle import ConfigParser
from numpy.typing import NDArray
from torch import Tensor

from bench.engine.bars import Row
from bench.engine.bundle import LONG_MINUTES, Options, read_bundle
from bench.engine.processes import in_processes
from bench.engine.turns import EngineRun
from seg3d_monai.engine import rank
from seg3d_monai.engine.replicas import reduce_numbers

LARGE_RATE, CURVE_RATE = 2.0**24, 0.01
NUM_STEPS = 20
SHAKEN = 0.02
ALL = 10**9
EXTENT, SPACING = (12, 18, 18), (8, 12, 12)
"""Of the boxes of the lattice, and between them, in voxels."""

Gradient = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Way:
    """A way to take a step on four crops.

    Attributes:
        workers: processes.
        batch_size: crops of a batch.
        accumulation_steps: batches of a step in a process.
        stage: of ZeRO; None is without DeepSpeed.
    """

    workers: int
    batch_size: int
    accumulation_steps: int = 1
    stage: int | None = None

    @property
    def name(self) -> str:
        """In the report."""
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}"
        accumulated = f" x accumulation {self.accumulation_steps}" * (self.accumulation_steps > 1)
        zero = "" if self.stage is None else f", ZeRO {self.stage}"
        return f"{workers} x batch {self.batch_size}{accumulated}{zero}"


WAYS = (Way(1, 4), Way(1, 2, 2), Way(2, 2), *(Way(2, 2, stage=stage) for stage in range(4)))
"""The first is what the others are compared with."""
METHOD = (
    f"Gradients: step 1 of the bundle in float32 with SGD, clipping and averaged weights off, proposals replaced by a "
    f"lattice of boxes, all anchors and proposals taken. The difference from {WAYS[0].name} over its norm, for each "
    "parameter and for all together, from the weights before and after a step of learning rate 2**24. "
    f"ZeRO 3 shares out every parameter (persistence threshold 0). Curves: the losses of {NUM_STEPS} steps of learning "
    f"rate {CURVE_RATE:g} with the bundle's clipping, largest relative difference."
)


def measure(options: Options) -> list[Row]:
    """One row a way: how far its gradient and its losses are from those of the first."""
    num_steps = 3 if options.is_quick else NUM_STEPS
    ways = [way for way in WAYS if not (options.is_quick and way.stage in (0, 1, 2))]
    found: dict[Way, tuple[Gradient, list[float]]] = {}
    for workers in (1, 2):
        group = [way for way in ways if way.workers == workers]
        (results, *_) = in_processes(workers, 1, options.folder, measure_here, options, group, num_steps)
        found |= dict(zip(group, results, strict=True))
    gradient, losses = found[ways[0]]
    return [{"way": way.name, **compare(*found[way], gradient, losses)} for way in ways]


def compare(gradient: Gradient, losses: Sequence[float], wanted: Gradient, wanted_losses: Sequence[float]) -> Row:
    """Relative differences of gradients, as norms, and of losses."""
    apart = {name: relative(gradient[name] - value, value) for name, value in wanted.items()}
    worst = max(apart, key=lambda name: apart[name])
    everything = [np.concatenate([x[name].ravel() for name in wanted]) for x in (gradient, wanted)]
    curve = [abs(a - b) / abs(b) for a, b in zip(losses, wanted_losses, strict=True)]
    return {
        "worst": apart[worst],
        "worst_parameter": worst,
        "overall": relative(everything[0] - everything[1], everything[1]),
        "norm": float(np.linalg.norm(everything[0])),
        "loss_deviation": max(curve),
        "losses": list(losses),
    }


def relative(difference: NDArray[np.float64], value: NDArray[np.float64]) -> float:
    """Norm of a difference over that of the value; 0 where both are 0."""
    size, whole = float(np.linalg.norm(difference)), float(np.linalg.norm(value))
    return size / whole if whole else math.inf * size if size else 0.0


def measure_here(options: Options, ways: Sequence[Way], num_steps: int) -> list[tuple[Gradient, list[float]]]:
    """Gradient and losses of each way; the first process' are complete."""
    with patch("seg3d_monai.models.mask_rcnn.select_proposals", lattice):
        return [(gradient_of(options, way), losses_of(options, way, num_steps)) for way in ways]


def gradient_of(options: Options, way: Way) -> Gradient:
    """The gradient of step 1; empty but in the first process."""
    run = start_run(read_way(options, way, {"learning_rate": LARGE_RATE, "train#trainer#clip_norm": None}))
    before = {name: value.double().numpy() for name, value in run.trainer.checkpoint()["network"].items()}
    run.take(way.accumulation_steps)
    after = run.trainer.checkpoint()["network"]
    if rank() != 0:
        return {}
    names = [name for name, _ in run.trainer.network.named_parameters()]
    return {name: (before[name] - after[name].double().numpy()) / LARGE_RATE for name in names}


def start_run(parser: ConfigParser) -> EngineRun:
    """The engine's run from first weights that are shaken a little: as they come, whole blocks have no gradient."""
    torch.manual_seed(parser["seed"])
    with torch.no_grad():
        for parameter in parser.get_parsed_content("network").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=SHAKEN)
    return EngineRun(parser.get_parsed_content("train#trainer"))


def losses_of(options: Options, way: Way, num_steps: int) -> list[float]:
    """The losses of the first steps, means over all their batches."""
    run = start_run(read_way(options, way, {"learning_rate": CURVE_RATE}))
    run.take(num_steps * way.accumulation_steps)
    sums = reduce_numbers(run.losses, "SUM")
    steps = np.array(sums).reshape(num_steps, way.accumulation_steps).mean(1) / way.workers
    return [float(loss) for loss in steps]


def read_way(options: Options, way: Way, changes: Mapping[str, Any]) -> ConfigParser:
    """The bundle's configuration for a way, without draws."""
    fixed: dict[str, Any] = {
        "amp": "off",
        "batch_size": way.batch_size,
        "max_minutes": LONG_MINUTES,
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": "@learning_rate"},
        "network_def#num_roi_samples": ALL,
        "network_def#num_mask_samples": ALL,
        "network_def#roi_foreground_fraction": 1.0,
        "loss#num_anchor_samples": ALL,
        "loss#anchor_foreground_fraction": 1.0,
        "train#handlers": [],
        "train#trainer#accumulation_steps": way.accumulation_steps,
        "train#trainer#schedule": None,
        "train#trainer#ema_decay": None,
    }
    overlays = [] if way.stage is None else [f"deepspeed_zero{way.stage}"]
    if way.stage == 3:
        fixed["train#trainer#deepspeed#zero_optimization#stage3_param_persistence_threshold"] = 0
    return read_bundle(options, way.name, overlays=overlays, changes={**fixed, **changes})


def lattice(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_size: Sequence[int],
    **limits: float,
) -> list[Tensor]:
    """In the place of `select_proposals`: the same boxes [P, 6] for every image, whatever the RPN says."""
    starts = (range(0, size - extent + 1, step) for size, extent, step in zip(image_size, EXTENT, SPACING, strict=True))
    corners = torch.tensor(list(product(*starts)), dtype=torch.float32)
    boxes = torch.cat([corners, corners + torch.tensor(EXTENT)], 1).to(anchors[0])
    return [boxes] * len(objectness[0])
