"""Trainings under DeepSpeed, each called as `function(rank, size, *arguments)` in every process; small models."""

import torch
from engine_toys import ToyNetwork
from ignite.engine import Events
from replica_toys import CropsOfRank, cell_crop, toy_trainer
from torch import nn

from seg3d_monai.backbones import ConvNeXt, ViT, resnet_backbone
from seg3d_monai.engine import InstanceTrainer
from seg3d_monai.losses import MaskRCNNCriterion, SetCriterion
from seg3d_monai.matching import HungarianMatcher, IoUMatcher
from seg3d_monai.models import mask2former3d, maskdino3d, maskrcnn3d

MODELS = ["maskrcnn3d", "maskrcnn3d_accurate", "maskdino3d", "mask2former3d"]
BACKBONES = {
    "maskrcnn3d_accurate": (resnet_backbone, {"depth": 10, "width": 8, "norm": "batch"}),
    "maskrcnn3d": (resnet_backbone, {"depth": 10, "width": 8}),
    "maskdino3d": (
        ConvNeXt,
        {"depths": [1] * 4, "widths": [8, 8, 16, 16], "kernel_size": (3, 3, 3), "activation_checkpointing": True},
    ),
    "mask2former3d": (ViT, {"channels": 16, "depth": 1, "num_heads": 2, "patch_size": (2, 8, 8)}),
}
SIZES = {
    "hidden": 16,
    "mask_channels": 8,
    "encoder_layers": 1,
    "encoder_feedforward": 16,
    "decoder_layers": 2,
    "decoder_feedforward": 16,
    "num_queries": 12,
    "num_heads": 2,
}


def settings(stage, **more):
    """ZeRO with every parameter shared out, however small, and at stage 3 no longer whole than a module runs."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    return {"zero_optimization": zero, **more}


def parameters(weights):
    """A copy without counts: the toy's, of crops, differs from process to process."""
    return {name: value.clone() for name, value in weights.items() if value.is_floating_point() and name != "seen"}


def evaluated(trainer):
    """The weights that would be evaluated, and the trained ones."""
    with trainer.evaluated_weights() as weights:
        averaged = parameters(weights)
    return averaged, parameters(trainer.checkpoint()["network"])


def train(rank, size, stage, clip_norm=None, more=None):
    """(evaluated, trained) weights after two epochs of steps of four batches, the last one of two."""
    loader = CropsOfRank(num_crops=20, batch_size=2 // size, rank=rank, size=size)
    deepspeed = None if stage is None else settings(stage, **(more or {}))
    trainer = toy_trainer(loader, accumulation_steps=4, ema_decay=0.9, clip_norm=clip_norm, deepspeed=deepspeed)
    trainer.run()
    return evaluated(trainer)


def adam_trainer(rank, size, stage, **arguments):
    loader = CropsOfRank(num_crops=16, batch_size=4 // size, rank=rank, size=size)
    torch.manual_seed(5)
    network = ToyNetwork(dropout=0.0)
    groups = [{"params": [p], "lr": 0.02 * (1 + p.ndim)} for p in network.parameters()]
    return toy_trainer(
        loader,
        network=network,
        optimizer=torch.optim.AdamW(groups, lr=0.02),
        ema_decay=0.9,
        deepspeed=None if stage is None else settings(stage),
        **arguments,
    )


def train_in_parts(rank, size, stage, folder):
    """The weights of an uninterrupted training, and of one that went on from its first epoch; saves that."""
    whole = adam_trainer(rank, size, stage)
    whole.run()
    first = adam_trainer(rank, size, stage)
    first.add_event_handler(Events.EPOCH_COMPLETED(once=1), first.terminate)
    first.run()
    save(rank, first, folder / f"zero{stage}.pt")
    second = adam_trainer(rank, size, stage)
    second.restore(torch.load(folder / f"zero{stage}.pt", weights_only=True))
    second.run()
    return evaluated(whole), evaluated(second)


def go_on(rank, size, stage, path):
    """The weights of a training that goes on from a file of other processes."""
    trainer = adam_trainer(rank, size, stage)
    trainer.restore(torch.load(path, weights_only=True))
    trainer.run()
    return evaluated(trainer)


def save(rank, trainer, path):
    state = trainer.checkpoint()
    if rank == 0:
        torch.save(state, path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def skip(rank, size, stage, poison, batches):
    """The weights after a training in which a batch is left out."""
    loader = CropsOfRank(num_crops=16, batch_size=2, rank=rank, size=size, poison=poison)
    trainer = toy_trainer(
        loader,
        on_nonfinite="skip",
        accumulation_steps=batches,
        max_epochs=1,
        deepspeed=None if stage is None else settings(stage),
    )
    trainer.run()
    return evaluated(trainer)[0]


def model(name):
    """A network and its criterion; there are three backbones, and Mask DINO recomputes its activations."""
    make_backbone, sizes = BACKBONES[name]
    backbone = make_backbone(in_channels=1, **sizes)
    if name in ("maskrcnn3d", "maskrcnn3d_accurate"):
        shapes, more = [[[6, 12, 12]], [[12, 24, 24]]], {}
        if name == "maskrcnn3d_accurate":
            more = {"norm": "batch", "semantic": True, "mask_image_channels": 1, "mask_margin": 0.1}
        network = maskrcnn3d(
            backbone=backbone, anchor_shapes=shapes, fpn_channels=8, box_hidden=16, mask_channels=8, **more
        )
        matcher = IoUMatcher(foreground_iou=0.4, background_iou=0.2, match_best=True)
        return network, MaskRCNNCriterion(matcher=matcher)
    build, kind = (maskdino3d, "focal") if name == "maskdino3d" else (mask2former3d, "cross_entropy")
    more = {"activation_checkpointing": True} if name == "maskdino3d" else {"query_source": "selected"}
    cost = "focal" if kind == "focal" else "softmax"
    matcher = HungarianMatcher(class_weight=4, mask_bce_weight=5, mask_dice_weight=5, class_cost=cost)
    criterion = SetCriterion(matcher=matcher, class_loss=kind)
    return build(backbone=backbone, num_classes=1, **SIZES, **more), criterion


def empty_crop(crop):
    image, target = cell_crop(crop)
    nothing = {key: value[:0] for key, value in target.items() if key != "label"}
    return image, nothing | {"label": torch.zeros_like(target["label"])}


def crop_of_first(crop):
    """Cells for the first of two processes of batches of one, none for the second."""
    return empty_crop(crop) if crop % 2 else cell_crop(crop + 1)


def model_trainer(name, loader, **arguments):
    torch.manual_seed(3)
    network, criterion = model(name)
    with torch.no_grad():
        for parameter in network.parameters():  # residual blocks and boxes do something from the start
            parameter.add_(0.02 * torch.randn_like(parameter))
    return InstanceTrainer(
        **{
            "device": "cpu",
            "max_epochs": 1,
            "train_data_loader": loader,
            "network": network,
            "optimizer": torch.optim.SGD(network.parameters(), lr=1e-3),
            "loss_function": criterion,
            **arguments,
        }
    )


def train_model(rank, size, name, stage, amp="off", more=None):
    """Two steps in which the second process has crops without cells: weights before and after, `readers_of_others`."""
    loader = CropsOfRank(num_crops=2 * size, batch_size=1, rank=rank, size=size, make=crop_of_first)
    deepspeed = None if stage is None else settings(stage, **(more or {}))
    trainer = model_trainer(name, loader, amp=amp, deepspeed=deepspeed)
    before = parameters(trainer.network.state_dict())
    trainer.run()
    return before, evaluated(trainer)[0], readers_of_others(trainer.replicas.module) if stage == 3 else []


def readers_of_others(engine):
    """Modules that read weights of other modules in the forward pass; DeepSpeed fetches these for them too."""
    return [name for name, module in engine.module.named_modules() if any(module.ds_external_parameters())]


def parameters_without_gradient(network: nn.Module):
    return [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
