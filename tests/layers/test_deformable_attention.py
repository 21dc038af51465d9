"""Deformable attention against plain loops in float64; where it looks at first; padding; precision."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from seg3d_monai.layers import DeformableAttention3d, level_centres
from seg3d_monai.layers.deformable_attention import head_directions

SIZES = [(3, 5, 4), (2, 2, 3)]
STRIDES = [(1, 2, 4), (2, 4, 8)]
CELLS = sum(math.prod(size) for size in SIZES)


def build(channels=8, num_levels=2, num_heads=2, num_points=3, seed=0):
    """A module of which every parameter is random."""
    torch.manual_seed(seed)
    module = DeformableAttention3d(
        channels=channels, num_levels=num_levels, num_heads=num_heads, num_points=num_points
    ).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def read_cell(level, position):
    """Trilinear value of level [d, h, w, C] at a position in cells; outside counts as zero."""
    lower = np.floor(position).astype(int)
    value = np.zeros(level.shape[-1])
    for corner in np.ndindex(2, 2, 2):
        cell = lower + corner
        if all(0 <= c < n for c, n in zip(cell, level.shape[:3], strict=True)):
            value += np.prod(1 - np.abs(position - cell)) * level[tuple(cell)]
    return value


def attend(module, queries, references, memory, sizes, strides, padding):
    """The definition (Zhu et al. 2021, eq. 3), one query, head, level and point at a time."""
    weight = {name: p.detach().numpy() for name, p in module.named_parameters()}
    queries, references, memory = queries.numpy(), references.numpy(), memory.numpy()
    heads, levels, points = module.num_heads, module.num_levels, module.num_points
    value = memory @ weight["value.weight"].T + weight["value.bias"]
    value[padding.numpy()] = 0
    result = np.zeros(queries.shape)
    for n, q in np.ndindex(queries.shape[:2]):
        offset = (weight["offsets.weight"] @ queries[n, q] + weight["offsets.bias"]).reshape(heads, levels, points, 3)
        logit = (weight["weights.weight"] @ queries[n, q] + weight["weights.bias"]).reshape(heads, -1)
        share = (np.exp(logit) / np.exp(logit).sum(1, keepdims=True)).reshape(heads, levels, points)
        parts = []
        for m in range(heads):
            total, start = 0, 0
            for level, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
                cells = value[n, start : start + math.prod(size)].reshape(*size, heads, -1)[..., m, :]
                start += math.prod(size)
                for p in range(points):
                    box = references[n, q]
                    if len(box) == 3:
                        voxel = box + offset[m, level, p] * np.array(stride)
                    else:
                        voxel = (box[:3] + box[3:]) / 2 + offset[m, level, p] / points * (box[3:] - box[:3]) / 2
                    total = total + share[m, level, p] * read_cell(cells, voxel / np.array(stride) - 0.5)
            parts.append(total)
        result[n, q] = weight["output.weight"] @ np.concatenate(parts) + weight["output.bias"]
    return torch.from_numpy(result)


def inputs(images=2, queries=4, channels=8, boxes=False):
    torch.manual_seed(1)
    lower = torch.rand(images, queries, 3, dtype=torch.float64) * torch.tensor([3.0, 10, 16]) - 0.5
    extent = torch.rand(images, queries, 3, dtype=torch.float64) * torch.tensor([3.0, 6, 12])
    asked = torch.randn(images, queries, channels, dtype=torch.float64)
    memory = torch.randn(images, CELLS, channels, dtype=torch.float64)
    padding = torch.rand(images, CELLS) < 0.2
    return asked, torch.cat([lower, lower + extent], -1) if boxes else lower, memory, padding


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_result_is_that_of_plain_loops(boxes, num_queries):
    module = build()
    asked, references, memory, padding = inputs(queries=num_queries, boxes=boxes)
    found = module(asked, references, memory, SIZES, STRIDES, padding)
    torch.testing.assert_close(found, attend(module, asked, references, memory, SIZES, STRIDES, padding))
    none = torch.zeros_like(padding)
    found = module(asked, references, memory, SIZES, STRIDES)
    torch.testing.assert_close(found, attend(module, asked, references, memory, SIZES, STRIDES, none))


@pytest.mark.parametrize("num_levels", [1, 3, 4])
def test_any_number_of_levels(num_levels):
    module = build(num_levels=num_levels)
    sizes = [(4, 6, 5), (2, 3, 3), (1, 2, 2), (1, 1, 1)][:num_levels]
    strides = [(1, 2, 2), (2, 4, 4), (4, 8, 8), (4, 16, 16)][:num_levels]
    cells = sum(math.prod(size) for size in sizes)
    memory = torch.randn(1, cells, 8, dtype=torch.float64)
    asked, references, _, _ = inputs(images=1)
    padding = torch.zeros(1, cells, dtype=torch.bool)
    found = module(asked, references, memory, sizes, strides)
    torch.testing.assert_close(found, attend(module, asked, references, memory, sizes, strides, padding))


def test_padding_is_not_read():
    module = build()
    asked, references, memory, padding = inputs()
    wanted = module(asked, references, memory, SIZES, STRIDES, padding)
    for junk in (1e30, math.nan):
        spoiled = memory.masked_fill(padding[..., None], junk)
        assert torch.equal(module(asked, references, spoiled, SIZES, STRIDES, padding), wanted)


def places_seen(heads, points, level, references, size=(15, 13, 17), stride=(1, 2, 3)):
    """Where a new module reads, by a memory that holds its own coordinates: [Lq, heads, levels, points, 3] voxels.

    All levels have the same cells and only `level` and one point at a time has weight.
    """
    module = DeformableAttention3d(channels=heads * 3, num_levels=2, num_heads=heads, num_points=points)
    for layer in (module.value, module.output):
        nn.init.eye_(layer.weight)
    assert not module.offsets.weight.any()
    assert not module.weights.weight.any()
    assert not module.weights.bias.any()
    centres = level_centres(size, stride, "cpu").repeat(2, heads)
    queries = torch.randn(1, len(references), heads * 3)
    seen = []
    for p in range(points):
        with torch.no_grad():
            chosen = torch.full((heads, 2, points), -1e4)
            chosen[:, level, p] = 0
            module.weights.bias.copy_(chosen.flatten())
        found = module(queries, references[None], centres[None], [size] * 2, [stride] * 2)
        seen.append(found.view(len(references), heads, 3))
    return torch.stack(seen, 2)


@pytest.mark.parametrize("level", [0, 1])
def test_at_first_point_p_of_a_head_lies_p_cells_along_its_direction(level):
    reference = torch.tensor([[7.0, 13, 25], [7.6, 12.2, 23.7]])
    seen = places_seen(8, 4, level, reference)
    stride = torch.tensor([1.0, 2, 3])
    distance = torch.arange(1.0, 5)[:, None]
    wanted = reference[:, None, None] + head_directions(8)[:, None] * distance * stride
    torch.testing.assert_close(seen, wanted, atol=1e-4, rtol=0)


def test_in_a_box_the_last_point_lies_on_its_border():
    boxes = torch.tensor([[4.0, 6, 10, 10, 18, 22], [7.0, 5, 9, 8, 21, 40]])
    seen = places_seen(6, 4, 0, boxes)
    half = (boxes[:, 3:] - boxes[:, :3]) / 2
    relative = (seen - (boxes[:, :3] + half)[:, None, None]) / half[:, None, None]
    for p in range(4):
        torch.testing.assert_close(relative[:, :, p].abs().amax(-1), torch.full((2, 6), (p + 1) / 4))
    torch.testing.assert_close(relative[:, :, 3], head_directions(6).expand(2, 6, 3), atol=1e-4, rtol=0)


def test_a_new_module_weighs_all_points_and_levels_alike():
    module = DeformableAttention3d(channels=3, num_levels=2, num_heads=1, num_points=2)
    for layer in (module.value, module.output):
        nn.init.eye_(layer.weight)
    # One head looks along (0, 0, 1), one and two cells far: in voxels 3 and 6, and 6 and 12.
    sizes, strides = [(3, 3, 30), (3, 3, 15)], [(1, 2, 3), (1, 2, 6)]
    memory = torch.cat([level_centres(n, s, "cpu") for n, s in zip(sizes, strides, strict=True)])
    found = module(torch.randn(1, 1, 3), torch.tensor([[[1.5, 3, 40]]]), memory[None], sizes, strides)
    torch.testing.assert_close(found, torch.tensor([[[1.5, 3, 40 + (3 + 6 + 6 + 12) / 4]]]))


@pytest.mark.parametrize(("heads", "widest"), [(4, 90.0), (6, 75.0), (8, 65.0), (16, 45.0)])
def test_directions_cover_the_sphere(heads, widest):
    directions = head_directions(heads)
    torch.testing.assert_close(directions.abs().amax(1), torch.ones(heads))
    torch.manual_seed(0)
    anywhere = nn.functional.normalize(torch.randn(20000, 3), dim=1)
    nearest = (anywhere @ nn.functional.normalize(directions, dim=1).T).amax(1)
    assert nearest.clamp(-1, 1).acos().rad2deg().amax() < widest


def test_gradient_reaches_every_parameter_and_input():
    module = build()
    asked, references, memory, padding = (x.requires_grad_(x.is_floating_point()) for x in inputs(boxes=True))
    module(asked, references, memory, SIZES, STRIDES, padding).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(x.grad.any() for x in (asked, references, memory))
    assert not memory.grad[padding].any()


def test_no_query():
    module = build()
    memory = inputs()[2].requires_grad_()
    empty = torch.zeros(2, 0, 8, dtype=torch.float64), torch.zeros(2, 0, 6)
    found = module(*empty, memory, SIZES, STRIDES)
    assert found.shape == (2, 0, 8)
    found.sum().backward()
    assert not memory.grad.any()


def test_places_stay_exact_under_autocast():
    module = build(num_levels=1).float()
    with torch.no_grad():
        module.offsets.weight.zero_()
    # On an axis of 700 cells bfloat16 would be off by up to two cells; the memory changes from cell to cell.
    torch.manual_seed(2)
    memory, asked = torch.randn(1, 700, 8), torch.randn(1, 50, 8)
    references = torch.rand(1, 50, 3) * torch.tensor([1.0, 1, 700])
    wanted = module(asked, references, memory, [(1, 1, 700)], [(1, 1, 1)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(asked, references, memory, [(1, 1, 700)], [(1, 1, 1)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.03)


def test_inference_first_and_training_afterwards():
    module = build(num_levels=1)
    sizes, strides = [(2, 3, 11)], [(1, 2, 2)]
    memory = torch.randn(1, 66, 8, dtype=torch.float64)
    asked, references, _, _ = inputs(images=1, boxes=True)
    with torch.inference_mode():
        wanted = module(asked, references, memory, sizes, strides)
    found = module(asked, references.requires_grad_(), memory, sizes, strides)
    found.sum().backward()
    torch.testing.assert_close(found, wanted)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="channels 10 is no multiple of num_heads 4"):
        DeformableAttention3d(channels=10, num_levels=1, num_heads=4)
    module = build()
    asked, references, memory, _ = inputs()
    with pytest.raises(ValueError, match="num_levels = 2"):
        module(asked, references, memory, SIZES[:1], STRIDES[:1])
    with pytest.raises(ValueError, match=r"references must have the shape .*got \(2, 4, 2\)"):
        module(asked, references[..., :2], memory, SIZES, STRIDES)
