"""The bodies of the CUDA kernels, run thread by thread on the CPU under sanitizers, against the naive loops."""

import itertools

import pytest
import shim_runner
import torch
from ms_deform_attn3d_cases import Attention, attentions
from nms3d_cases import CASES, kept, nms_cases
from roi_align3d_cases import BOXES, IMAGES, SIZE, Pooling, poolings, tolerance

COUNT = itertools.count()


def as_stored(tensor, channels_last):
    """The values in the order in which they lie in memory."""
    return tensor.permute(0, 2, 3, 4, 1).contiguous() if channels_last else tensor.contiguous()


def restored(values, shape, channels_last):
    n, c, d, h, w = shape
    return values.reshape(n, d, h, w, c).permute(0, 4, 1, 2, 3) if channels_last else values.reshape(shape)


def run_roi_align(folder, pooling, source, channels_last, backward=False, boxes=BOXES, images=IMAGES, **values):
    dtype = source.dtype
    coordinates = torch.float64 if dtype == torch.float64 else values.pop("coordinates", torch.float32)
    size = SIZE if backward else source.shape[2:]
    geometry = {
        f"{name}_{axis}": value[i]
        for name, value in (("size", size), ("out", pooling.out), ("scale", pooling.scale))
        for i, axis in enumerate("zyx")
    }
    row = 2 if dtype == torch.float64 else 4
    wide = pooling.channels % row == 0 and pooling.channels >= 16 * row if channels_last else pooling.channels > 1
    if channels_last and backward and dtype == torch.float64:
        wide = False
    arguments = {
        "dtype": str(dtype).removeprefix("torch."),
        "coordinates": str(coordinates).removeprefix("torch."),
        "channels_last": channels_last,
        "backward": backward,
        "wide": wide and coordinates == torch.promote_types(dtype, torch.float32),
        "num_images": 2,
        "channels": pooling.channels,
        "num_boxes": len(boxes),
        "sampling_ratio": pooling.sampling_ratio,
        "aligned": pooling.aligned,
        "blocks": 5,
        "seed": next(COUNT),
        **geometry,
        **values,
    }
    arrays = {"source": as_stored(source, channels_last), "boxes": boxes.to(coordinates), "batch_index": images}
    result = shim_runner.run("run_roi_align3d", folder / str(arguments["seed"]), arrays, **arguments)
    out_dtype = torch.promote_types(dtype, torch.float32) if backward else dtype
    shape = (2, pooling.channels, *size) if backward else (len(boxes), pooling.channels, *pooling.out)
    return restored(result.array("result", out_dtype), shape, channels_last), result


@pytest.mark.parametrize("channels_last", [False, True])
@poolings
def test_roi_align3d_equals_the_naive_loop(tmp_path, pooling, channels_last):
    for dtype in (torch.float64, torch.float32) if pooling.channels < 64 else (torch.float32, torch.bfloat16):
        features = pooling.features().to(dtype)
        pooled, _ = run_roi_align(tmp_path, pooling, features, channels_last)
        close = tolerance(dtype)
        boxes = BOXES.to(torch.promote_types(dtype, torch.float32))
        torch.testing.assert_close(pooled.double(), pooling.pooled(features, boxes), rtol=close, atol=close)


@pytest.mark.parametrize("channels_last", [False, True])
@poolings
def test_roi_align3d_backward_is_the_transpose(tmp_path, pooling, channels_last):
    for dtype in (torch.float64, torch.float32) if pooling.channels < 64 else (torch.float32, torch.bfloat16):
        grad = pooling.grad().to(dtype)
        gradient, _ = run_roi_align(tmp_path, pooling, grad, channels_last, backward=True)
        close = 1e-12 if dtype == torch.float64 else 1e-4  # sums are in float32 for half types as well
        boxes = BOXES.to(torch.promote_types(dtype, torch.float32))
        torch.testing.assert_close(gradient.double(), pooling.gradient(grad, boxes), rtol=close, atol=close)


@pytest.mark.parametrize("channels_last", [False, True])
def test_roi_align3d_takes_float64_boxes_with_float32_features(tmp_path, channels_last):
    pooling = Pooling((2, 3, 4))
    features = pooling.features().float()
    pooled, _ = run_roi_align(tmp_path, pooling, features, channels_last, coordinates=torch.float64)
    torch.testing.assert_close(pooled.double(), pooling.pooled(features), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_roi_align3d_of_a_box_without_place_is_nan_and_gets_no_gradient(tmp_path, channels_last):
    pooling = Pooling((2, 3, 4), sampling_ratio=2)
    boxes, images = BOXES.clone(), IMAGES.clone()
    boxes[1, 4], boxes[3, 0], images[4], images[5] = torch.nan, -torch.inf, 2, -1
    pooled, _ = run_roi_align(tmp_path, pooling, pooling.features(), channels_last, boxes=boxes, images=images)
    valid = torch.tensor([0, 2, 6, 7])
    assert pooled[[1, 3, 4, 5]].isnan().all()
    expected = pooling.pooled(pooling.features(), boxes[valid], images[valid])
    torch.testing.assert_close(pooled[valid], expected, rtol=1e-12, atol=1e-12)
    gradient, _ = run_roi_align(
        tmp_path, pooling, pooling.grad(), channels_last, backward=True, boxes=boxes, images=images
    )
    expected = pooling.gradient(pooling.grad()[valid], boxes[valid], images[valid])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_roi_align3d_of_a_huge_box_reads_the_volume_only(tmp_path, channels_last):
    pooling = Pooling((1, 1, 4), channels=2)
    boxes = torch.tensor([[0.0, 0.0, -4e6, 4.0, 5.0, 4e6], [-1e30, -1e30, -1e30, 1e30, 1e30, 1e30]])
    ones = torch.ones(2, 2, *SIZE)
    pooled, run = run_roi_align(tmp_path, pooling, ones, channels_last, boxes=boxes, images=IMAGES[:2])
    # Bins of two million samples on x, one a voxel; the samples at -1 .. 7 count, half of them on each side of 0.
    assert pooled[0, :, 0, 0, [0, 3]].eq(0).all()
    assert pooled[0, :, 0, 0].sum(1).mul(2e6).tolist() == pytest.approx([8.5, 8.5], abs=1)
    assert pooled[1].abs().max() < 1e-20
    assert run.sectors < 20_000


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(64, torch.float32), (136, torch.bfloat16), (64, torch.float16), (32, torch.float64), (20, torch.float32)],
)
def test_roi_align3d_channels_last_touches_few_sectors(tmp_path, channels, dtype, backward):
    pooling = Pooling((2, 3, 4), sampling_ratio=2, channels=channels)
    source = (pooling.grad() if backward else pooling.features()).to(dtype)
    _, run = run_roi_align(tmp_path, pooling, source, True, backward)
    assert run.least > 1000
    assert run.sectors <= 2 * run.least


def run_attention(folder, attention, value, locations, weights, grad=None, **values):
    dtype = value.dtype
    sums = torch.promote_types(dtype, torch.float32)
    row = 2 if dtype == torch.float64 else 4
    wide = attention.channels % row == 0 and (grad is None or dtype != torch.float64)
    lanes = -(-attention.channels // (row if wide else 1))
    arguments = {
        "dtype": str(dtype).removeprefix("torch."),
        "backward": grad is not None,
        "wide": wide,
        "num_images": len(value),
        "num_queries": locations.shape[1],
        "num_values": value.shape[1],
        "heads": value.shape[2],
        "channels": value.shape[3],
        "levels": locations.shape[3],
        "points": locations.shape[4],
        "group": min(32, 1 << (lanes - 1).bit_length()),
        "blocks": 2,
        "seed": next(COUNT),
        **values,
    }
    arrays = {
        "value": value,
        "locations": locations.to(sums),
        "weights": weights.to(sums),
        "shapes": torch.tensor(attention.shapes),
        **({} if grad is None else {"grad": grad}),
    }
    result = shim_runner.run("run_ms_deform_attn3d", folder / str(arguments["seed"]), arrays, **arguments)
    if grad is None:
        return result.array("result", dtype).reshape(len(value), locations.shape[1], -1), result
    gradients = (
        result.array("grad_value", sums).reshape(value.shape),
        result.array("grad_locations", sums).reshape(locations.shape),
        result.array("grad_weights", sums).reshape(weights.shape),
    )
    return gradients, result


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@attentions
def test_ms_deform_attn3d_equals_the_naive_loop(tmp_path, attention, dtype):
    value, locations, weights = attention.tensors()
    value, locations, weights = value.to(dtype), locations.to(torch.promote_types(dtype, torch.float32)), weights
    output, _ = run_attention(tmp_path, attention, value, locations, weights)
    close = tolerance(dtype)
    torch.testing.assert_close(output.double(), attention.attended(value, locations, weights), rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES)
@attentions
def test_ms_deform_attn3d_backward_equals_grid_sample(tmp_path, attention, dtype):
    value, locations, weights = attention.tensors()
    value, grad = value.to(dtype), attention.grad().to(dtype)
    locations = locations.to(torch.promote_types(dtype, torch.float32))
    gradients, _ = run_attention(tmp_path, attention, value, locations, weights, grad)
    close = 1e-12 if dtype == torch.float64 else 2e-5  # sums are in float32 for half types as well
    for name, gradient, expected in zip(
        ("value", "locations", "weights"), gradients, attention.gradients(grad, value, locations, weights), strict=True
    ):
        torch.testing.assert_close(
            gradient.double(), expected, rtol=close, atol=close, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(32, torch.float32), (32, torch.bfloat16), (16, torch.float64), (8, torch.float32)]
)
def test_ms_deform_attn3d_touches_few_sectors(tmp_path, channels, dtype, backward):
    attention = Attention(((4, 6, 5), (2, 3, 3)), 1, 9, 8, channels, 4)
    value, locations, weights = attention.tensors()
    locations = locations.to(torch.promote_types(dtype, torch.float32))
    grad = attention.grad().to(dtype) if backward else None
    _, run = run_attention(tmp_path, attention, value.to(dtype), locations, weights, grad)
    assert run.least > 1000
    assert run.sectors <= 2 * run.least


def run_nms(folder, boxes, scores, group, threshold, **values):
    arguments = {
        "dtype": str(boxes.dtype).removeprefix("torch."),
        "threshold": threshold,
        "rounds": 12,
        "blocks": 3,
        "seed": next(COUNT),
        **values,
    }
    arrays = {"boxes": boxes, "scores": scores, "group": torch.zeros(0, dtype=torch.int64) if group is None else group}
    result = shim_runner.run("run_nms3d", folder / str(arguments["seed"]), arrays, **arguments)
    return result.array("result", torch.int64).tolist(), result.array("outcome", torch.int64).tolist()


@pytest.mark.parametrize("rounds", [0, 1, 12])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@nms_cases
def test_nms3d_equals_the_naive_loop(tmp_path, case, threshold, rounds):
    boxes, scores, group = CASES[case]
    for dtype in (torch.float64, torch.float32):
        kept_ones, outcome = run_nms(tmp_path, boxes.to(dtype), scores, group, threshold, rounds=rounds)
        assert kept_ones == kept(boxes.to(dtype), scores, group, threshold)
        assert outcome == [len(kept_ones), 0]


def test_nms3d_counts_boxes_that_cannot_be_compared(tmp_path):
    boxes, scores, group = (tensor.clone() for tensor in CASES["crowd"])
    boxes[3, 2], boxes[7, 5], scores[9] = torch.nan, torch.inf, torch.nan
    assert run_nms(tmp_path, boxes, scores, group, 0.5)[1][1] == 3
