"""The dense part against the network's own evaluation, by a route of plain loops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from export_toys import iou
from torch import Tensor, nn

from seg3d_monai.export import DensePart, DenseTensor
from seg3d_monai.export.plain_operators import grid_sample_attention, plain_operators
from seg3d_monai.models import masked_autoencoder3d, maskrcnn3d
from seg3d_monai.ops import ms_deform_attn3d

BUNDLES = ["maskrcnn3d", "maskdino3d", "mask2former3d"]
SIZE = (16, 32, 48)


def images(batch: int = 2, size: tuple[int, int, int] = SIZE) -> Tensor:
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("kind", [DensePart, DenseTensor])
def test_weights_have_the_names_that_they_have_in_the_network(
    bundle: str, kind: type[DensePart], small: Callable[..., nn.Module]
) -> None:
    network, other = small(bundle), small(bundle, seed=1)
    dense = kind(network)
    assert list(dense.state_dict()) == list(network.state_dict())
    first = dense(images(1))
    dense.load_state_dict(other.state_dict())
    changed, wanted = dense(images(1)), kind(other)(images(1))
    tensors = [(x.values() if isinstance(x, dict) else [x]) for x in (first, changed, wanted)]
    for before, after, expected in zip(*tensors, strict=True):
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, expected, rtol=0, atol=0)


@torch.no_grad()
def test_boxes_and_objectness_give_the_proposals_that_the_network_goes_on_with(
    small: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small("maskrcnn3d")
    network.pre_nms_top_n, network.post_nms_top_n, network.min_objectness = (300, 300), (40, 40), 0.45
    seen: list[Tensor] = []
    monkeypatch.setattr(
        type(network), "_detect", lambda self, features, images, proposals, growth: seen.extend(proposals) or []
    )
    network(images())
    outputs = DensePart(network)(images())
    levels = [3 * 8 * 8 * 12, 3 * 4 * 4 * 6]  # three anchors a cell of strides (2, 4, 4) and (4, 8, 8)
    assert outputs["boxes"].shape == (2, sum(levels), 6)
    for n, proposals in enumerate(seen):
        kept: list[tuple[float, np.ndarray]] = []
        for scores, boxes in zip(
            outputs["objectness"][n].split(levels), outputs["boxes"][n].split(levels), strict=True
        ):
            order = scores.argsort(descending=True, stable=True)[:300].tolist()
            alone: list[np.ndarray] = []
            for row in order:
                box, prob = boxes[row].numpy(), 1 / (1 + np.exp(-float(scores[row])))
                if prob < 0.45 or (box[3:] - box[:3]).min() < 1 or any(iou(box, other) > 0.4 for other in alone):
                    continue
                alone.append(box)
                kept.append((float(scores[row]), box))
        kept.sort(key=lambda one: -one[0])
        assert 5 < len(proposals) <= 40
        np.testing.assert_allclose(proposals.numpy(), np.stack([box for _, box in kept[:40]]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_features_are_those_that_heads_read(small: Callable[..., nn.Module]) -> None:
    network = small("maskrcnn3d")
    outputs = DensePart(network)(images())
    read = {*network.box_pooler.strides, *network.mask_pooler.strides}
    assert {name for name in outputs if name.startswith("features_")} == {f"features_{level}" for level in read}
    assert outputs["features_p1"].shape == (2, 8, 16, 16, 24)
    assert outputs["semantic_logits"].shape == (2, 2, 16, 16, 24)
    assert "semantic_logits" not in DensePart(small("maskrcnn3d", **{"network_def#semantic": False}))(images())


@torch.no_grad()
@pytest.mark.parametrize("bundle", ["maskdino3d", "mask2former3d"])
def test_dense_outputs_give_the_instances_of_the_network(bundle: str, small: Callable[..., nn.Module]) -> None:
    network = small(bundle)
    network.score_threshold = 0.002
    outputs, stride = DensePart(network)(images()), np.array([1, 2, 2])
    for n, instances in enumerate(network(images())):
        logits = outputs["class_logits"][n].double().numpy()
        if bundle == "mask2former3d":
            powers = np.exp(logits - logits.max(1, keepdims=True))
            prob = (powers / powers.sum(1, keepdims=True))[:, :-1].max(1)
        else:
            prob = (1 / (1 + np.exp(-logits))).max(1)
        found = []
        for q, cells in enumerate(outputs["mask_logits"][n].double().numpy()):
            low, high = np.zeros(3, int), np.array(cells.shape)
            if bundle == "maskdino3d":  # a quarter of the extent around the box, then a cell
                box = outputs["boxes"][n, q].double().numpy()
                margin, last = (box[3:] - box[:3]) / 4, high.copy()
                low = np.minimum(np.maximum(np.floor((box[:3] - margin) / stride), 0), last - 1).astype(int) - 1
                high = np.minimum(np.ceil((box[3:] + margin) / stride), last).astype(int) + 1
                low, high = np.maximum(low, 0), np.minimum(np.maximum(high, low + 2), last)
            window = cells[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
            if prob[q] >= 0.002 and (window > 0).any():
                inside = np.argwhere(window > 0)
                score = prob[q] * (1 / (1 + np.exp(-window[window > 0]))).mean()
                lower = np.maximum(inside.min(0) - 1, 0) + low
                upper = np.minimum(inside.max(0) + 2, np.array(window.shape)) + low
                found.append((score, *(lower * stride), *np.minimum(upper * stride, SIZE)))
        found = sorted((one for one in found if one[0] >= 0.002), reverse=True)
        assert len(found) > 3
        np.testing.assert_allclose(instances["scores"].numpy(), [one[0] for one in found], rtol=0, atol=1e-5)
        np.testing.assert_allclose(instances["boxes"].numpy(), np.array([one[1:] for one in found]), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_one_tensor_holds_the_outputs(bundle: str, small: Callable[..., nn.Module]) -> None:
    network = small(bundle)
    outputs, one = DensePart(network)(images()), DenseTensor(network)(images())
    if bundle == "maskrcnn3d":
        torch.testing.assert_close(one[:, 0], outputs["objectness"], rtol=0, atol=0)
        torch.testing.assert_close(one[:, 1:].transpose(1, 2), outputs["boxes"], rtol=0, atol=0)
        return
    logits = outputs["class_logits"].double()
    prob = logits.sigmoid().amax(-1) if bundle == "maskdino3d" else logits.softmax(-1)[..., 0]
    wanted = prob[..., None, None, None] * outputs["mask_logits"].double().sigmoid()
    assert one.dtype == torch.float32
    torch.testing.assert_close(one.double(), wanted, rtol=0, atol=1e-6)


def test_what_has_no_dense_part_is_refused(small: Callable[..., nn.Module]) -> None:
    backbone = small("maskrcnn3d").backbone.backbone
    with pytest.raises(TypeError, match="InpaintingAutoencoder, which has no dense part"):
        DensePart(masked_autoencoder3d(backbone=backbone))
    with pytest.raises(ValueError, match="call eval"):
        DensePart(small("maskdino3d").train())(images(1))


def test_a_network_in_training_stays_there(small: Callable[..., nn.Module]) -> None:
    assert DensePart(small("maskrcnn3d").train()).training
    assert not DensePart(small("maskrcnn3d")).training


@torch.no_grad()
@pytest.mark.parametrize("bundle", BUNDLES)
def test_plain_operators_change_nothing_and_leave_nothing(bundle: str, small: Callable[..., nn.Module]) -> None:
    dense = DensePart(small(bundle))
    before = dense(images())
    with plain_operators():
        plain = dense(images())
    after = dense(images())
    for name, values in before.items():
        torch.testing.assert_close(plain[name], values, rtol=0, atol=1e-4)
        torch.testing.assert_close(after[name], values, rtol=0, atol=0)


def test_the_attention_made_of_grid_sample_is_the_operator() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4, 5), (2, 1, 3)]
    value = torch.randn(2, 66, 3, 4, generator=generator)
    locations = torch.rand(2, 7, 3, 2, 5, 3, generator=generator) * 1.6 - 0.3  # some outside
    weights = torch.rand(2, 7, 3, 2, 5, generator=generator)
    expected = ms_deform_attn3d(value, torch.tensor(sizes), locations, weights)
    torch.testing.assert_close(grid_sample_attention(value, sizes, locations, weights), expected, rtol=0, atol=1e-5)
    nothing = grid_sample_attention(value, sizes, locations[:, :0], weights[:, :0])
    assert nothing.shape == (2, 0, 12)


def test_norms_on_large_maps_are_plain_too() -> None:
    """Large maps run on the operator, which a trace must not hold."""
    from seg3d_monai.layers.norm import GroupNorm

    norm, x = GroupNorm(2, 8, relu=True).eval(), torch.randn(1, 8, 40, 32, 32)
    with torch.no_grad(), plain_operators():
        traced = torch.jit.trace(norm, x)
    assert "seg3d::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), norm(x), rtol=0, atol=1e-5)


def test_one_level_alone(small: Callable[..., nn.Module]) -> None:
    network = maskrcnn3d(
        backbone=small("maskrcnn3d").backbone.backbone, anchor_shapes=[[(4, 8, 8)]], fpn_channels=8, box_hidden=8
    ).eval()
    outputs = DensePart(network)(images(1))
    assert {name: tuple(values.shape) for name, values in outputs.items()} == {
        "objectness": (1, 16 * 16 * 24),
        "boxes": (1, 16 * 16 * 24, 6),
        "features_p1": (1, 8, 16, 16, 24),
    }
