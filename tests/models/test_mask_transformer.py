"""Mask DINO and Mask2Former as wholes: outputs, gradients, instances, several classes, crowds of targets."""

import pytest
import torch
from torch import nn

from seg3d_monai.backbones import ResNet
from seg3d_monai.losses import SetCriterion
from seg3d_monai.matching import HungarianMatcher
from seg3d_monai.models import (
    mask2former3d,
    mask2former3d_r50,
    mask2former3d_tiny,
    maskdino3d,
    maskdino3d_r50,
    maskdino3d_tiny,
)

SIZE = (7, 22, 34)
SMALL = {
    "memory_levels": ("c2",),
    "hidden": 16,
    "mask_channels": 8,
    "encoder_layers": 1,
    "encoder_feedforward": 16,
    "decoder_layers": 2,
    "decoder_feedforward": 16,
    "num_queries": 10,
    "num_heads": 4,
}
KINDS = {
    "maskdino": (maskdino3d, {"denoising_queries": 12}),
    "mask2former-learned": (mask2former3d, {"query_source": "learned"}),
    "mask2former-selected": (mask2former3d, {"query_source": "selected"}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, num_classes=2, in_channels=1, seed=0, **changes):
    torch.manual_seed(seed)
    backbone = ResNet(
        in_channels=in_channels, depths=(1, 1), widths=(8, 16), stem_channels=8, stage_strides=((1, 1, 1), (2, 2, 2))
    )
    build, settings = KINDS[kind]
    network = build(backbone=backbone, num_classes=num_classes, **(SMALL | settings | changes))
    for layer in network.modules():  # a block that starts as the identity passes no gradient to its body
        if isinstance(layer, nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return network


def criterion(kind):
    is_dino = kind == "maskdino"
    boxes = {"box_l1_weight": 5.0, "box_giou_weight": 2.0} if is_dino else {}
    cost, loss = ("focal", "focal") if is_dino else ("softmax", "cross_entropy")
    matcher = HungarianMatcher(class_weight=2, mask_bce_weight=5, mask_dice_weight=5, class_cost=cost, **boxes)
    return SetCriterion(matcher=matcher, num_uniform_points=64, num_instance_points=16, class_loss=loss)


def grid_of_bricks(number):
    """Up to 300 bricks of 1 x 3 x 3 voxels, touching each other."""
    places = [(z, y, x) for z in range(7) for y in range(0, 21, 3) for x in range(0, 33, 3)]
    return [(z, y, x, z + 1, y + 3, x + 3) for z, y, x in places[:number]]


@kinds
def test_every_parameter_gets_a_gradient(kind, make_target):
    network = make(kind)
    # Weights that start at zero pass no gradient to the layers before them.
    for name, parameter in network.named_parameters():
        if any(word in name for word in ("box_deltas", "shift", "gains", "offsets", "attention.weights")):
            nn.init.normal_(parameter, std=0.1)
    targets = [make_target(SIZE, grid_of_bricks(9), classes=[0, 1, 0] * 3), make_target(SIZE, grid_of_bricks(2))]
    losses = criterion(kind)(network(torch.randn(2, 1, *SIZE), targets), targets)
    sum(losses.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    idle = [name for name, p in network.named_parameters() if not p.grad.any() and not name.endswith("key.bias")]
    assert idle == []


@kinds
@pytest.mark.parametrize("numbers", [(0, 0), (0, 300), (1, 9)])
def test_none_one_and_too_many_instances_train_in_one_batch(kind, numbers, make_target):
    network, loss = make(kind), criterion(kind)
    targets = [make_target(SIZE, grid_of_bricks(number)) for number in numbers]
    losses = loss(network(torch.randn(2, 1, *SIZE), targets), targets)
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in network.parameters())


@kinds
def test_instances_in_evaluation(kind):
    network = make(kind, score_threshold=0.0).eval()
    with torch.inference_mode():
        found = network(torch.randn(2, 1, *SIZE))
    assert len(found) == 2
    for one in found:
        boxes = one["boxes"]
        assert (boxes[:, :3] < boxes[:, 3:]).all()
        assert ((boxes >= 0) & (boxes <= torch.tensor(SIZE * 2))).all()
        assert one["classes"].dtype == torch.int64
        assert one["scores"].tolist() == sorted(one["scores"].tolist(), reverse=True)
        extents = (boxes[:, 3:] - boxes[:, :3]).int().tolist()
        assert [list(mask.shape) for mask in one["mask_logits"]] == extents


@kinds
def test_intensities_are_raised_to_a_power(kind):
    plain, raised = (make(kind, score_threshold=0.0, image_power=power).eval() for power in (1.0, 0.5))
    image = torch.randn(1, 1, *SIZE)
    root = torch.where(image < 0, -1.0, 1.0) * image.abs().sqrt()
    found, expected = raised(image)[0], plain(root)[0]
    assert len(found["boxes"]) > 5
    for key in ("boxes", "scores", "classes"):
        torch.testing.assert_close(found[key], expected[key])
    with pytest.raises(ValueError, match="image_power is -1"):
        make(kind, image_power=-1)


@kinds
def test_two_channels_and_autocast(kind, make_target):
    network = make(kind, in_channels=2)
    targets = [make_target(SIZE, grid_of_bricks(4))]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(torch.randn(1, 2, *SIZE), targets)
    losses = criterion(kind)(outputs, targets)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_more_queries_than_in_training_at_inference():
    """Selected queries are no weights: a checkpoint loads into a network that asks for more."""
    for kind in ("maskdino", "mask2former-selected"):
        small, large = make(kind), make(kind, num_queries=40, seed=1)
        large.load_state_dict(small.state_dict())
        assert large.eval()(torch.randn(1, 1, *SIZE))[0]["boxes"].shape[1] == 6


def test_padding_of_a_batch_is_known():
    network = make("maskdino", score_threshold=0.0).eval()
    decoded = network.pixel_decoder(network.backbone(torch.randn(2, 1, *SIZE)), torch.tensor([SIZE, (3, 22, 20)]))
    assert decoded.padding[0][1].any()
    assert len(network(torch.randn(2, 1, *SIZE), valid_sizes=torch.tensor([SIZE, (3, 22, 20)]))) == 2


@pytest.mark.parametrize("build", [maskdino3d_tiny, mask2former3d_tiny])
def test_tiny_sizes_run(build):
    network = build(in_channels=2, num_classes=3).eval()
    with torch.inference_mode():
        assert len(network(torch.randn(1, 2, 8, 32, 40))) == 1


@pytest.mark.parametrize("build", [maskdino3d_r50, mask2former3d_r50])
def test_sizes_of_the_papers_can_be_built(build):
    with torch.device("meta"):
        network = build()
    assert 6e7 < sum(p.numel() for p in network.parameters()) < 8e7
    assert len(network.decoder.layers) == 9
