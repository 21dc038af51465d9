"""Bytes of weights, gradients and optimizer state in a worker at the worst moment of a step, under ZeRO 0 and ZeRO 3.

What is counted are storages of tensors, each once: those that the trainer, DeepSpeed's engine and its optimizer hold,
found by walking through their attributes, buckets and buffers of DeepSpeed included, full or empty. They are counted
during a step, after every convolution, matrix product and update and at every exchange between processes, together with
what is exchanged. Activations are held by the graph, not by these objects, and do not count.
"""

import types
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.engine.bars import Row
from bench.engine.bundle import LONG_MINUTES, Options, read_bundle
from bench.engine.processes import in_processes
from bench.memory import ResidentPeak
from bench.models.memory import crowded_crop
from bench.models.training import build
from seg3d_monai.engine import InstanceTrainer

OVERLAY = "model_r50"
CROP_SIZE, NUM_INSTANCES = (32, 64, 64), 12
NUM_STEPS = 3
CASES: tuple[tuple[int, int, Mapping[str, Any]], ...] = (
    (0, 1, {}),
    (3, 2, {"zero_optimization#stage3_param_persistence_threshold": 0}),
)
"""Stage of ZeRO, workers, and what differs from its overlay in DeepSpeed's settings."""
STATE = ("weights", "gradients", "optimizer state", "buffers", "the config's network")
"""What the bar is about; DeepSpeed trains a copy of the config's network, which stays where it is."""
AVERAGE = "averaged weights"
METHOD = (
    f"Bytes: a worker's storages of weights, gradients, optimizer state and DeepSpeed's buffers with the overlay "
    f"{OVERLAY} in bf16, counted within step {NUM_STEPS} after every convolution, product and update and at every "
    "exchange between processes, which counts with what it exchanges; the most of one moment. Averaged weights are "
    "apart. RSS is VmHWM of a worker, Python, libraries and activations included; 1 MB is 1e6 bytes."
)
AT = ("c10d::", "aten::convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::_fused_adam")
"""How the names of operators begin at which bytes are counted."""
CODE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
"""What holds no tensors, or only through what is walked anyway."""


def measure(options: Options) -> list[Row]:
    """One row for each stage of ZeRO, the most of its workers."""
    rows = []
    for stage, workers, settings in CASES:
        found = in_processes(workers, 1, options.folder, measure_here, options, stage, settings)
        row = max(found, key=lambda of_worker: of_worker["state_mb"])
        rows.append({"stage": stage, "workers": workers, **row})
    for row in rows:
        row["of_zero0"] = row["state_mb"] / rows[0]["state_mb"]
    return rows


def measure_here(options: Options, stage: int, settings: Mapping[str, Any]) -> Row:
    """Megabytes of each kind at the worst moment in this process, and its peak of resident memory."""
    resident = ResidentPeak() if Path("/proc/self/clear_refs").exists() else None
    changes: dict[str, Any] = {
        "amp": "bf16",
        "batch_size": 1,
        "max_minutes": LONG_MINUTES,
        "train#handlers": [],
        "train#dataloader": "$[None]",
    }
    changes |= {f"train#trainer#deepspeed#{key}": value for key, value in settings.items()}
    parser = read_bundle(options, f"zero{stage}", overlays=[OVERLAY, f"deepspeed_zero{stage}"], changes=changes)
    training = build(parser, "cpu")
    size, num_instances = ((16, 32, 40), 6) if options.is_quick else (CROP_SIZE, NUM_INSTANCES)
    batch = crowded_crop(size, num_instances)
    for _ in range(NUM_STEPS - 1):  # optimizer state is made in the first; ZeRO 3 learns the order of modules in it
        training.step(batch)
    with PeakBytes(training.trainer) as peak:
        training.step(batch)
    return {
        "changed_ids": sorted(changes),
        "deepspeed": parser["train#trainer#deepspeed"],
        "num_parameters": sum(parameter.numel() for parameter in training.trainer.network.parameters()),
        "num_counts": peak.num_counts,
        "at": peak.at,
        "mb": {kind: peak.most[kind] / 1e6 for kind in (*STATE, AVERAGE)},
        "buffers_mb": {name: number / 1e6 for name, number in peak.buffers.most_common(8)},
        "state_mb": sum(peak.most[kind] for kind in STATE) / 1e6,
        "peak_rss_mb": None if resident is None else (resident.before + resident.growth()) / 1e6,
    }


class PeakBytes(TorchDispatchMode):
    """While it is active, looks for the moment at which a trainer holds the most bytes.

    Attributes:
        most: bytes of each kind at that moment.
        buffers: bytes of the buffers at that moment, by the name of what holds them.
        at: operator after which that was.
        num_counts: how often bytes were counted.
    """

    def __init__(self, trainer: InstanceTrainer) -> None:
        super().__init__()
        self.most: Counter[str] = Counter()
        self.buffers: Counter[str] = Counter()
        self.at = ""
        self.num_counts = 0
        self._trainer = trainer

    def __torch_dispatch__(
        self,
        function: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, and count after it."""
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.startswith(AT):
            exchanged = [x for x in tree_leaves(args) if isinstance(x, Tensor)] if name.startswith("c10d::") else []
            self._count(name, exchanged)
        return result

    def _count(self, name: str, exchanged: Iterable[Tensor]) -> None:
        count = count_bytes(self._trainer, exchanged)
        self.num_counts += 1
        total = sum(count[kind] for kind in STATE)
        if total > sum(self.most[kind] for kind in STATE):
            self.at = name
            self.most = Counter({kind: count[kind] for kind in (*STATE, AVERAGE)})
            self.buffers = Counter({key: number for key, number in count.items() if key not in self.most})


def count_bytes(trainer: InstanceTrainer, exchanged: Iterable[Tensor] = ()) -> Counter[str]:
    """Bytes of each kind that a trainer holds now, and of its buffers by the name of what holds them.

    A storage counts once, for the first kind that it belongs to.
    """
    counted: Counter[str] = Counter()
    seen: set[int] = set()

    def take(kind: str, tensors: Iterable[Tensor | None], name: str | None = None) -> None:
        for tensor in tensors:
            storage = None if tensor is None else tensor.untyped_storage()
            if storage is not None and storage._cdata not in seen:
                seen.add(storage._cdata)
                counted[kind] += storage.nbytes()
                if name is not None:
                    counted[name] += storage.nbytes()

    optimizer, ema = trainer.optimizer, trainer.ema
    weights = list(trainer.replicas.module.parameters())
    masters = list(optimizer.state)
    take("weights", weights)
    take("weights", (getattr(parameter, "ds_tensor", None) for parameter in weights))  # its share of ZeRO 3
    take("gradients", (parameter.grad for parameter in (*weights, *masters)))
    take("optimizer state", masters)
    take("optimizer state", (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)))
    take("the config's network", trainer.network.parameters())
    take(AVERAGE, () if ema is None else ema.averages)
    for name, tensor in held_tensors(trainer.replicas):
        take("buffers", [tensor], name)
    take("buffers", exchanged, "exchanged")
    return counted


def held_tensors(root: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is reached from an object through attributes and containers, with the attribute's name."""
    todo, seen, kept = deque([("", root)]), set(), []
    while todo:
        name, held = todo.popleft()
        if id(held) in seen:
            continue
        seen.add(id(held))
        kept.append(held)  # so that no other object gets its id
        if isinstance(held, Tensor):
            yield name, held
            if held.is_leaf and held.grad is not None:
                todo.append((f"{name}.grad", held.grad))
        if isinstance(held, Mapping):
            todo.extend((str(key) if isinstance(key, str) else name, value) for key, value in held.items())
        elif isinstance(held, list | tuple | set | frozenset | deque):
            todo.extend((name, value) for value in held)
        elif not isinstance(held, CODE) and hasattr(held, "__dict__"):
            todo.extend(vars(held).items())
