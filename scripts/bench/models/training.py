"""A bundle's training, built from its shipped configuration, and single steps of its own trainer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor

from bench.models.floor import Call, record
from seg3d_monai.data.synthetic import write_specimen
from seg3d_monai.engine import InstanceTrainer

BUNDLES = Path(__file__).parents[3] / "bundles"

SHOWN = (
    *("crop_size", "batch_size", "amp", "learning_rate", "num_queries", "backbone", "network_def", "loss", "optimizer"),
    *("train#trainer#clip_norm", "train#trainer#ema_decay", "train#trainer#accumulation_steps"),
)
"""Ids of the configuration that say how large a step is; those that a bundle does not have are left out."""

QUICK = {"crop_size": [16, 32, 40], "backbone#depth": 10, "backbone#width": 8}
QUICK_TRANSFORMER = {
    **{"num_queries": 12, "network_def#hidden": 16, "network_def#mask_channels": 8},
    **{"network_def#encoder_feedforward": 16, "network_def#decoder_feedforward": 16},
}
QUICK_NETWORK = {
    "maskrcnn3d": {"network_def#fpn_channels": 8, "network_def#box_hidden": 16, "network_def#mask_channels": 8},
    "maskdino3d": QUICK_TRANSFORMER,
    "mask2former3d": QUICK_TRANSFORMER,
}
"""Overrides for a smoke test."""

QUICK_SPECIMEN: dict[str, Any] = {"train_volumes": 1, "train_shape": (20, 48, 56), "test_shape": (20, 48, 56)}

Batch = dict[str, Any]


def specimen_for(folder: Path, is_quick: bool) -> Path:
    """The built-in synthetic specimen, written where it is not there yet."""
    return write_specimen(folder / "specimen", **(QUICK_SPECIMEN if is_quick else {"test_shape": (64, 160, 160)}))


def read_config(model: str, overlays: Sequence[str], changes: Mapping[str, Any], is_quick: bool) -> ConfigParser:
    """train.json of a bundle, overlays over it, by name or file, then the changed ids, and quick sizes if wanted."""
    folder = BUNDLES / model / "configs"
    parser = ConfigParser()
    files = [Path(name) if Path(name).is_file() else folder / "overlays" / f"{name}.json" for name in overlays]
    parser.read_config(folder / "train.json")
    for file in files:
        for key, value in json.loads(file.read_text(encoding="utf-8")).items():
            parser[key] = value
    for key, value in {**changes, **(QUICK | QUICK_NETWORK[model] if is_quick else {})}.items():
        parser[key] = value
    parser.parse(True)
    return parser


def settings_of(parser: ConfigParser, trainer: InstanceTrainer) -> dict[str, Any]:
    """The configuration's ids of SHOWN as they stand in it, and what "auto" and the builders made of them."""
    found = {key.split("#")[-1]: parser[key] for key in SHOWN if key in parser}
    autocast = "off" if trainer.amp_type is None else str(trainer.amp_type).removeprefix("torch.")
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    return {**found, "autocast": autocast, "parameters": parameters}


@dataclass(frozen=True)
class Training:
    """A trainer that takes single steps.

    Args:
        trainer: of the bundle.
        device: where it trains.
    """

    trainer: InstanceTrainer
    device: torch.device

    def step(self, batch: Batch) -> dict[str, float]:
        """The trainer's own iteration: gradients to zero, network, criterion, backward, clipping, optimizer, EMA."""
        self.trainer.state.iteration += 1
        return self.trainer._iteration(self.trainer, batch)[0]

    def record(self, batch: Batch) -> list[Call]:
        """The floor's calls of the step that `step` would take next: the same weights and draws, but no update."""
        trainer = self.trainer
        trainer.state.iteration += 1
        trainer._seed_everything()
        trainer.state.iteration -= 1
        trainer.network.train()
        image = batch["image"].to(self.device)
        targets = [{key: value.to(self.device) for key, value in target.items()} for target in batch["targets"]]

        def network() -> Any:
            with torch.autocast(self.device.type, trainer.amp_type, enabled=trainer.amp_type is not None):
                return trainer.inferer(image, trainer.network, targets)

        def criterion(outputs: Any) -> Tensor:
            return torch.stack(list(trainer.loss_function(outputs, targets).values())).sum()

        calls = record(network, criterion)
        trainer.optimizer.zero_grad()
        return calls


def build(parser: ConfigParser, device: str) -> Training:
    """The trainer of a configuration, with the first weights that its seed gives."""
    torch.manual_seed(parser["seed"])
    return Training(parser.get_parsed_content("train#trainer"), torch.device(device))


def first_batches(parser: ConfigParser, count: int) -> list[Batch]:
    """The first batches of the training's first epoch."""
    loader = parser.get_parsed_content("train#dataloader")
    loader.set_epoch(0)
    return list(islice(loader, count))
