"""The operators on whatever hypothesis thinks of: a defined result equal to the naive loops, or a clear error."""

import math

import naive_oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seg3d_monai.ops import (
    batched_nms3d,
    group_norm,
    layer_norm,
    match_boxes3d,
    ms_deform_attn3d,
    nms3d,
    reference,
    roi_align3d,
)

FEW = settings(max_examples=150, deadline=None, derandomize=True)
EXTENTS = st.integers(1, 9)
COORDINATES = st.one_of(
    st.floats(-12, 12),
    st.integers(-6, 12).map(float),
    st.sampled_from([-1e30, 1e30, 1e-30, -0.0, 5e8, math.nan, math.inf, -math.inf]),
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def noise(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def boxes_of(draw, most, coordinates=COORDINATES):
    rows = draw(st.lists(st.tuples(*[coordinates] * 6), max_size=most))
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)


@FEW
@given(st.data())
def test_roi_align3d(data):
    draw = data.draw
    size, out = draw(st.tuples(EXTENTS, EXTENTS, EXTENTS)), draw(st.tuples(*[st.integers(1, 4)] * 3))
    images, channels = draw(st.integers(1, 2)), draw(st.sampled_from([0, 1, 2, 5, 16, 17, 40]))
    scale = draw(st.tuples(*[st.sampled_from([0.25, 0.7, 1.0, 3.0])] * 3))
    ratio, aligned, dtype = draw(st.integers(0, 3)), draw(st.booleans()), draw(DTYPES)
    features = noise((images, channels, *size), 0, dtype)
    if draw(st.booleans()):
        features = features.contiguous(memory_format=torch.channels_last_3d)
    boxes = boxes_of(draw, 6)
    index = torch.arange(len(boxes)) % images
    features.requires_grad_()
    if not torch.isfinite(boxes).all():
        with pytest.raises(ValueError, match="not finite"):
            roi_align3d(features, boxes, index, out, scale, ratio, aligned)
        return
    pooled = roi_align3d(features, boxes, index, out, scale, ratio, aligned)
    (gradient,) = torch.autograd.grad(pooled, features, torch.ones_like(pooled))
    assert gradient.shape == features.shape
    assert torch.isfinite(gradient).all()
    # The naive loop visits every sample of an adaptive grid, so it gets boxes of some voxels only.
    near = (boxes.abs() < 40).all(1) if ratio == 0 else torch.ones(len(boxes), dtype=torch.bool)
    exact = features.detach().double().contiguous().numpy()
    expected = naive_oracle.roi_align(exact, boxes[near].tolist(), index[near].tolist(), out, scale, ratio, aligned)
    tolerance = max(torch.finfo(dtype).eps * 2, 1e-9)
    np.testing.assert_allclose(pooled.detach()[near].double().numpy(), expected, rtol=tolerance, atol=tolerance)
    assert torch.isfinite(pooled).all()


@FEW
@given(st.data())
def test_match_boxes3d(data):
    draw = data.draw
    # Small whole numbers make ties and IoUs at the thresholds; their volumes are exact in any order of sums.
    coordinates = draw(st.sampled_from([st.integers(0, 4).map(float), st.sampled_from([0.0, 3.0, math.inf, math.nan])]))
    boxes, truth = (boxes_of(draw, most, coordinates).float() for most in (40, 10))
    background, foreground = sorted(draw(st.tuples(*[st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 1.0])] * 2)))
    arguments = (boxes, truth, foreground, background, draw(st.booleans()))
    assert torch.equal(match_boxes3d(*arguments), reference.match_boxes3d(*arguments))


@FEW
@given(st.data())
def test_nms3d(data):
    draw = data.draw
    dtype, threshold = draw(DTYPES), draw(st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0]))
    # Few different numbers make ties, duplicates, and IoUs at the threshold.
    coordinates = draw(st.sampled_from([COORDINATES, st.integers(0, 4).map(float), st.floats(0, 8)]))
    boxes = boxes_of(draw, 40, coordinates).to(dtype)
    scores = torch.tensor(
        draw(
            st.lists(
                st.sampled_from([0.0, -0.0, 0.5, 0.75, 1.0, -math.inf, math.inf]),
                min_size=len(boxes),
                max_size=len(boxes),
            )
        ),
        dtype=dtype,
    )
    group = torch.arange(len(boxes)) * 7 % draw(st.integers(1, 4)) - 1
    if not torch.isfinite(boxes).all():
        with pytest.raises(ValueError, match="not finite"):
            nms3d(boxes, scores, threshold)
        return
    if boxes.numel() and boxes.abs().max() > 1e20:
        # Products of such extents leave float64 in the naive loop; that nothing breaks is all that is asked.
        assert set(nms3d(boxes, scores, threshold).tolist()) <= set(range(len(boxes)))
        return
    kept = nms3d(boxes, scores, threshold).tolist()
    assert kept == naive_oracle.nms(boxes, scores, [0] * len(boxes), threshold)
    kept = batched_nms3d(boxes, scores, group, threshold).tolist()
    assert kept == naive_oracle.nms(boxes, scores, group.tolist(), threshold)


@FEW
@given(st.data())
def test_ms_deform_attn3d(data):
    draw = data.draw
    shapes = draw(st.lists(st.tuples(EXTENTS, EXTENTS, EXTENTS), min_size=1, max_size=3))
    images, queries, heads, points = (draw(st.integers(0 if name == "q" else 1, 3)) for name in "nqmp")
    channels, dtype = draw(st.sampled_from([1, 3, 16, 20, 70])), draw(DTYPES)
    value = noise((images, sum(map(math.prod, shapes)), heads, channels), 0, dtype)
    accumulate = torch.promote_types(dtype, torch.float32)
    samples = (images, queries, heads, len(shapes), points)
    places = st.one_of(st.floats(-0.3, 1.3), st.sampled_from([0.0, 1.0, 0.5, 1e30, -1e30, math.nan, math.inf]))
    count = math.prod(samples) * 3
    locations = torch.tensor(draw(st.lists(places, min_size=count, max_size=count)), dtype=accumulate)
    leaves = [value, locations.reshape(*samples, 3), noise(samples, 1, accumulate)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = ms_deform_attn3d(leaves[0], torch.tensor(shapes), *leaves[1:])
    exact = [leaf.detach().double().numpy() for leaf in leaves]
    expected = naive_oracle.ms_deform_attn(exact[0], shapes, *exact[1:])
    tolerance = max(torch.finfo(dtype).eps * 4, 2e-5 if accumulate == torch.float32 else 1e-9)
    np.testing.assert_allclose(output.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert torch.isfinite(gradient).all()


@FEW
@given(st.data())
def test_layer_norm(data):
    draw = data.draw
    rows, channels, dtype = draw(st.integers(0, 40)), draw(st.integers(1, 150)), draw(DTYPES)
    spread, offset = draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0])), draw(st.sampled_from([0.0, -3.0, 500.0]))
    eps, relu = draw(st.sampled_from([1e-6, 1e-2])), draw(st.booleans())
    parameter_dtype = dtype if draw(st.booleans()) else torch.promote_types(dtype, torch.float32)
    x = (noise((rows, channels), 0) * spread + offset).to(dtype)
    leaves = [x, noise((channels,), 1, parameter_dtype), noise((channels,), 2, parameter_dtype)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    result = layer_norm(*leaves, eps, relu)
    exact, weight, bias = (leaf.detach().double().numpy() for leaf in leaves)
    centred = exact - exact.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias
    expected = np.maximum(expected, 0) if relu else expected
    tolerance = max(torch.finfo(dtype).eps * 2, 2e-5)
    np.testing.assert_allclose(result.detach().double().numpy(), expected, rtol=tolerance, atol=10 * tolerance)
    for leaf, gradient in zip(leaves, torch.autograd.grad(result.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype
        assert torch.isfinite(gradient).all()


@FEW
@given(st.data())
def test_group_norm(data):
    draw = data.draw
    batch, groups, channels = draw(st.integers(0, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size, dtype = (draw(st.integers(0, 9)), draw(st.integers(1, 40))), draw(DTYPES)
    spread, offset = draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0])), draw(st.sampled_from([0.0, -3.0, 500.0]))
    eps, relu = draw(st.sampled_from([1e-6, 1e-2])), draw(st.booleans())
    parameter_dtype = dtype if draw(st.booleans()) else torch.promote_types(dtype, torch.float32)
    x = (noise((batch, groups * channels, *size), 0) * spread + offset).to(dtype)
    leaves = [x, *(noise((groups * channels,), seed, parameter_dtype) for seed in (1, 2))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    result = group_norm(*leaves, groups, eps, relu)
    exact, weight, bias = (leaf.detach().double().numpy() for leaf in leaves)
    grouped = exact.reshape(batch, groups, channels * size[0] * size[1])
    if grouped.size:
        centred = grouped - grouped.mean(-1, keepdims=True)
        normed = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)).reshape(exact.shape)
        expected = normed * weight[:, None, None] + bias[:, None, None]
        expected = np.maximum(expected, 0) if relu else expected
        tolerance = max(torch.finfo(dtype).eps * 2, 2e-5)
        np.testing.assert_allclose(result.detach().double().numpy(), expected, rtol=tolerance, atol=10 * tolerance)
    for leaf, gradient in zip(leaves, torch.autograd.grad(result.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype
        assert torch.isfinite(gradient).all()
