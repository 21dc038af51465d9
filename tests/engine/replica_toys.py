"""Toys that are trained by several processes: a loader of uneven crops, a criterion that counts, and how to start."""

import traceback
from datetime import timedelta

import ignite.distributed as idist
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from engine_toys import SHAPE, ToyNetwork
from ignite.engine import Events
from torch import nn
from warm_processes import START_METHOD

from seg3d_monai.engine import InstanceTrainer
from seg3d_monai.losses import MaskRCNNCriterion
from seg3d_monai.matching import IoUMatcher
from seg3d_monai.models import maskrcnn3d_tiny


class CropsOfRank:
    """Batches of crops 0, 1, 2, ... of which each process takes its share; crop c has c % 3 instances."""

    def __init__(self, *, num_crops, batch_size, rank=0, size=1, make=None, poison=None):
        self.batch_size, self.rank, self.size, self.poison = batch_size, rank, size, poison
        self.make = make or toy_crop
        self.length = num_crops // (batch_size * size)

    def __len__(self):
        return self.length

    def __iter__(self):
        for position in range(self.length):
            first = (position * self.size + self.rank) * self.batch_size
            crops = list(range(first, first + self.batch_size))
            images, targets = zip(*(self.make(crop) for crop in crops), strict=True)
            image = torch.stack(images)
            if self.poison in crops:
                image[:] = float("nan")
            yield {"image": image, "targets": list(targets), "crop_id": crops}


def toy_crop(crop):
    generator = torch.Generator().manual_seed(crop)
    return torch.rand(1, *SHAPE, generator=generator), {"ids": torch.arange(crop % 3)}


class CountingCriterion:
    """One loss a mean over images, the other a mean over instances."""

    @staticmethod
    def count(targets):
        return {"images": len(targets), "instances": sum(len(target["ids"]) for target in targets)}

    def __call__(self, outputs, targets, counts=None):
        counts = counts or self.count(targets)
        value = outputs["value"].float()
        weight = torch.tensor([len(target["ids"]) for target in targets])
        return {
            "image": (value[:, 0] - 1).square().sum() / counts["images"],
            "instance": (weight * (value[:, 1] + 2).square()).sum() / max(counts["instances"], 1e-9),
        }


def toy_trainer(loader, **arguments):
    torch.manual_seed(5)
    network = ToyNetwork(dropout=0.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    return InstanceTrainer(
        **{
            "device": "cpu",
            "max_epochs": 2,
            "train_data_loader": loader,
            "network": network,
            "optimizer": optimizer,
            "loss_function": CountingCriterion(),
            **arguments,
        }
    )


SIZE = (24, 48, 64)


def cell_crop(crop):
    """Noise with 0, 1, 2 or 3 cells, boxes of (6, 12, 12) voxels."""
    generator = torch.Generator().manual_seed(crop)
    label, boxes = torch.zeros(SIZE, dtype=torch.int64), []
    for number in range(crop % 4):
        z, y, x = 3 + 4 * number, 5 + 12 * number, 40 - 13 * number
        label[z : z + 6, y : y + 12, x : x + 12] = number + 1
        boxes.append([z, y, x, z + 6, y + 12, x + 12])
    image = torch.randn(1, *SIZE, generator=generator) + 3 * (label > 0)
    target = {
        "label": label,
        "ids": torch.arange(1, len(boxes) + 1),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6),
        "classes": torch.zeros(len(boxes), dtype=torch.int64),
    }
    return image, target


def detector_trainer(loader, **arguments):
    """Mask R-CNN on which nothing is drawn by chance: every anchor and every proposal is taken."""
    torch.manual_seed(5)
    network = maskrcnn3d_tiny()
    for parameter in network.parameters():  # residual blocks and boxes do something from the start
        with torch.no_grad():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.num_roi_samples = network.num_mask_samples = 100_000
    network.roi_foreground_fraction = 1.0
    matcher = IoUMatcher(foreground_iou=0.4, background_iou=0.2, match_best=True)
    criterion = MaskRCNNCriterion(matcher=matcher, num_anchor_samples=100_000, anchor_foreground_fraction=1.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    return InstanceTrainer(
        **{
            "device": "cpu",
            "max_epochs": 1,
            "train_data_loader": loader,
            "network": network,
            "optimizer": optimizer,
            "loss_function": criterion,
            **arguments,
        }
    )


def weights(network: nn.Module):
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def gradients(trainer):
    """Run and give the gradients of the last step."""
    trainer.run()
    return {name: parameter.grad.clone() for name, parameter in trainer.network.named_parameters()}


def in_processes(size, calls, folder):
    """What each call `(function, *arguments)` returns, or raises, in each of `size` processes.

    The functions are called as `function(rank, size, *arguments)`, one call after the other, with torch.distributed. A
    process that waits for another one for a minute raises.
    """
    mp.start_processes(_process, (size, calls, str(folder)), size, start_method=START_METHOD)
    of_ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    return list(zip(*of_ranks, strict=True))


def _process(rank, size, calls, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    assert idist.get_world_size() == size
    results = []
    for function, *arguments in calls:
        try:
            results.append(function(rank, size, *arguments))
        except Exception as error:
            traceback.print_exc()
            results.append(error)
        dist.barrier()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def train_toy(rank, size, batch_size, accumulation_steps):
    loader = CropsOfRank(num_crops=24, batch_size=batch_size, rank=rank, size=size)
    trainer = toy_trainer(loader, accumulation_steps=accumulation_steps, ema_decay=0.9)
    outputs = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: outputs.append(trainer.state.output[0]["loss"]))
    trainer.run()
    return weights(trainer.network), weights(trainer.ema.module), outputs


def detector_gradients(rank, size, batch_size, accumulation_steps):
    loader = CropsOfRank(num_crops=4, batch_size=batch_size, rank=rank, size=size, make=cell_crop)
    return gradients(detector_trainer(loader, accumulation_steps=accumulation_steps))
