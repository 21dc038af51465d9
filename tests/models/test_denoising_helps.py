"""Denoising shortens the training: from the same weights, on the same crops, with the same draws.

It pays off late, when queries find their objects and masks are refined, and not where two crops are learned by
heart: hence many crops and a loss that takes some hundred steps.
"""

import pytest
import torch
from overfit_toys import image_of, target_of, tissue

from seg3d_monai.backbones import resnet_backbone
from seg3d_monai.losses import SetCriterion
from seg3d_monai.matching import HungarianMatcher
from seg3d_monai.models import maskdino3d

SIZE, NUM_CROPS, BATCH_SIZE = (16, 32, 48), 160, 2
WEIGHTS = {"class": 4.0, "mask_bce": 5.0, "mask_dice": 5.0, "box_l1": 5.0, "box_giou": 2.0}
MOST_STEPS, AVERAGED, ENOUGH = 700, 25, 1.6
"""ENOUGH: of the last layer's weighted losses of matched queries, averaged over AVERAGED steps; it starts at 18."""


def network_of(denoising_queries):
    return maskdino3d(
        backbone=resnet_backbone(depth=10, in_channels=1, width=16),
        hidden=32,
        mask_channels=32,
        encoder_layers=2,
        encoder_feedforward=64,
        decoder_layers=3,
        decoder_feedforward=128,
        num_queries=40,
        num_heads=4,
        denoising_queries=denoising_queries,
    )


def steps_needed(network, crops, seed):
    """Steps until the loss is low enough, or MOST_STEPS."""
    matcher = HungarianMatcher(class_cost="focal", **{f"{name}_weight": weight for name, weight in WEIGHTS.items()})
    criterion = SetCriterion(matcher=matcher, num_uniform_points=256, num_instance_points=128, weights=WEIGHTS)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.01)
    course = []
    while len(course) < MOST_STEPS:
        torch.manual_seed(1000 * seed + len(course))
        drawn = [crops[i] for i in torch.randint(len(crops), (BATCH_SIZE,)).tolist()]
        images, targets = torch.stack([image for image, _ in drawn]), [target for _, target in drawn]
        outputs = network(images, targets)
        torch.manual_seed(1000 * seed + len(course))  # the same points, whatever denoising drew
        losses = criterion(outputs, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        course.append(sum(losses[name].item() for name in WEIGHTS))
        if len(course) >= AVERAGED and sum(course[-AVERAGED:]) < AVERAGED * ENOUGH:
            break
    return len(course)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fewer_steps_with_denoising(seed):
    labels = [tissue(4 + i * 7 % 13, seed=1000 * seed + i, size=SIZE) for i in range(NUM_CROPS)]
    crops = [(image_of(label), target_of(label)) for label in labels]
    torch.manual_seed(seed)
    weights = network_of(100).state_dict()
    steps = {}
    for queries in (0, 100):
        network = network_of(queries)
        network.load_state_dict({k: v for k, v in weights.items() if queries or "label_embedding" not in k})
        steps[queries] = steps_needed(network, crops, seed)
    print(steps)
    assert steps[100] < steps[0] <= MOST_STEPS
