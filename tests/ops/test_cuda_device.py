"""The operators on a true GPU, with the cases and oracles of the tests that run the kernels' bodies on the CPU."""

import shutil

import pytest
import torch
from ms_deform_attn3d_cases import Attention, attentions
from nms3d_cases import CASES, kept, nms_cases
from roi_align3d_cases import BOXES, IMAGES, SIZE, Pooling, poolings, tolerance

import seg3d_monai.ops  # noqa: F401  loads the operators
from seg3d_monai.ops.loading import load_cuda_operators

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last_3d)


def roi_align(pooling, features, boxes, images=IMAGES):
    return torch.ops.seg3d.roi_align3d(
        features, boxes, images.cuda(), *pooling.out, *pooling.scale, pooling.sampling_ratio, pooling.aligned
    )


def roi_align_backward(pooling, grad, boxes, channels_last, images=IMAGES):
    settings = (2, *SIZE, *pooling.scale, pooling.sampling_ratio, pooling.aligned, channels_last)
    return torch.ops.seg3d.roi_align3d_backward(grad, boxes, images.cuda(), *settings)


@pytest.mark.parametrize(
    "name", ["roi_align3d", "roi_align3d_backward", "ms_deform_attn3d", "ms_deform_attn3d_backward", "nms3d"]
)
def test_the_kernels_under_test_are_compiled_ones(name):
    if shutil.which("nvcc"):
        assert load_cuda_operators().path == "compiled"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"seg3d::{name}", "CUDA")


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@poolings
def test_roi_align3d(pooling, dtype, memory_format):
    features, close = pooling.features().to(dtype), tolerance(dtype)
    boxes = BOXES.to(torch.promote_types(dtype, torch.float32))
    pooled = roi_align(pooling, features.cuda().contiguous(memory_format=memory_format), boxes.cuda())
    assert pooled.dtype == dtype
    assert pooled.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(pooled.cpu().double(), pooling.pooled(features, boxes), rtol=close, atol=close)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@poolings
def test_roi_align3d_backward(pooling, dtype, memory_format):
    grad = pooling.grad().to(dtype)
    boxes = BOXES.to(torch.promote_types(dtype, torch.float32))
    close = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 2 * tolerance(dtype))
    channels_last = memory_format == torch.channels_last_3d
    for given in FORMATS:
        gradient = roi_align_backward(pooling, grad.cuda().contiguous(memory_format=given), boxes.cuda(), channels_last)
        assert gradient.dtype == dtype
        assert gradient.is_contiguous(memory_format=memory_format)
        expected = pooling.gradient(grad, boxes)
        torch.testing.assert_close(gradient.cpu().double(), expected, rtol=close, atol=close)


def test_roi_align3d_of_a_box_without_place_is_nan():
    pooling, boxes, images = Pooling((2, 3, 4)), BOXES.clone(), IMAGES.clone()
    boxes[1, 4], images[4] = torch.nan, 2
    pooled = roi_align(pooling, pooling.features().cuda(), boxes.cuda(), images).cpu()
    assert pooled[[1, 4]].isnan().all()
    assert not pooled[[0, 2, 3, 5, 6, 7]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@attentions
def test_ms_deform_attn3d(attention, dtype):
    value, locations, weights = attention.tensors()
    value, close = value.to(dtype), tolerance(dtype)
    locations, weights = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (locations, weights))
    shapes = torch.tensor(attention.shapes)
    for given in (shapes, shapes.cuda()):
        output = torch.ops.seg3d.ms_deform_attn3d(value.cuda(), given, locations.cuda(), weights.cuda())
        assert output.dtype == dtype
        expected = attention.attended(value, locations, weights)
        torch.testing.assert_close(output.cpu().double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@attentions
def test_ms_deform_attn3d_backward(attention, dtype):
    value, locations, weights = attention.tensors()
    value, grad = value.to(dtype), attention.grad().to(dtype)
    locations, weights = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (locations, weights))
    gradients = torch.ops.seg3d.ms_deform_attn3d_backward(
        grad.cuda(), value.cuda(), torch.tensor(attention.shapes), locations.cuda(), weights.cuda()
    )
    expected = attention.gradients(grad, value, locations, weights)
    for gradient, true_one, like in zip(gradients, expected, (value, locations, weights), strict=True):
        close = {torch.float64: 1e-12, torch.float32: 1e-4}.get(like.dtype, 2 * tolerance(like.dtype))
        assert gradient.dtype == like.dtype
        torch.testing.assert_close(gradient.cpu().double(), true_one, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ms_deform_attn3d_takes_half_locations_and_weights(dtype):
    attention = Attention()
    tensors = [tensor.to(dtype) for tensor in attention.tensors()]
    shapes = torch.tensor(attention.shapes)
    output = torch.ops.seg3d.ms_deform_attn3d(tensors[0].cuda(), shapes, tensors[1].cuda(), tensors[2].cuda())
    close = tolerance(dtype)
    torch.testing.assert_close(output.cpu().double(), attention.attended(*tensors), rtol=close, atol=close)
    gradients = torch.ops.seg3d.ms_deform_attn3d_backward(
        attention.grad().to(dtype).cuda(), tensors[0].cuda(), shapes, tensors[1].cuda(), tensors[2].cuda()
    )
    assert [gradient.dtype for gradient in gradients] == [dtype] * 3


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@nms_cases
def test_nms3d(case, dtype, threshold):
    boxes, scores, group = CASES[case]
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    if group is None:
        result = torch.ops.seg3d.nms3d(boxes.cuda(), scores.cuda(), threshold)
    else:
        result = torch.ops.seg3d.batched_nms3d(boxes.cuda(), scores.cuda(), group.cuda(), threshold)
    assert result.is_cuda
    assert result.tolist() == kept(boxes, scores, group, threshold)


def test_nms3d_refuses_boxes_that_are_not_finite():
    boxes, scores, _ = (tensor.clone() if tensor is not None else None for tensor in CASES["clusters"])
    boxes[5, 1] = torch.nan
    with pytest.raises(RuntimeError, match="1 of 200 boxes"):
        torch.ops.seg3d.nms3d(boxes.cuda(), scores.cuda(), 0.5)


def test_nothing_gives_nothing():
    nothing = torch.zeros(0, 6, device="cuda")
    assert torch.ops.seg3d.nms3d(nothing, nothing[:, 0], 0.5).tolist() == []
    pooling = Pooling((2, 3, 4))
    assert roi_align(pooling, pooling.features().cuda(), nothing.double(), IMAGES[:0]).shape == (0, 5, 2, 3, 4)
    gradient = roi_align_backward(pooling, pooling.grad()[:0].cuda(), nothing.double(), False, IMAGES[:0])
    assert torch.equal(gradient.cpu(), torch.zeros(2, 5, *SIZE, dtype=torch.float64))


def test_another_stream_is_used():
    pooling = Pooling((5, 6, 9), sampling_ratio=2)
    features, boxes = pooling.features().cuda(), BOXES.cuda()
    expected = roi_align(pooling, features, boxes)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # The operator must come after this sleep and the copy, which only their own stream ensures.
        torch.cuda._sleep(20_000_000)
        late = features.clone()
        pooled = roi_align(pooling, late, boxes)
    torch.cuda.synchronize()
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_loaded", [False, True])
def test_layer_norm_is_torchs_own(is_loaded, dtype):
    if is_loaded:
        load_cuda_operators()
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 20), (20,), (20,), (40, 20))
    x, weight, bias, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    accumulate = torch.promote_types(dtype, torch.float32)
    tensors = x.to(dtype), weight.to(accumulate), bias.to(accumulate)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
        result = torch.ops.seg3d.layer_norm(*leaves, 1e-5, True)
        results.append((result, *torch.autograd.grad(result, leaves, grad.to(device, dtype))))
    for one, two in zip(*results, strict=True):
        close = 1e-12 if one.dtype == torch.float64 else 4 * tolerance(one.dtype)
        assert two.is_cuda
        torch.testing.assert_close(two.cpu(), one, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_loaded", [False, True])
def test_group_norm_is_torchs_own(is_loaded, dtype):
    if is_loaded:
        load_cuda_operators()
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 5, 7), (6,), (6,), (2, 6, 5, 7))
    x, weight, bias, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    accumulate = torch.promote_types(dtype, torch.float32)
    tensors = x.to(dtype), weight.to(accumulate), bias.to(accumulate)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
        result = torch.ops.seg3d.group_norm(*leaves, 3, 1e-5, True)[0]
        results.append((result, *torch.autograd.grad(result, leaves, grad.to(device, dtype))))
    for one, two in zip(*results, strict=True):
        close = 1e-12 if one.dtype == torch.float64 else 4 * tolerance(one.dtype)
        assert two.is_cuda
        torch.testing.assert_close(two.cpu(), one, rtol=close, atol=close)


def test_targets_are_the_same_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    lower = torch.randint(0, 20, (500, 3), generator=generator)
    boxes = torch.cat([lower, lower + 1 + torch.randint(0, 9, (500, 3), generator=generator)], 1).float()
    truth = boxes[::20] + torch.tensor([0.0, 0, 1, 0, 0, 1])
    label = torch.randint(-1, 4, (28, 29, 30), generator=generator)
    ids = torch.randint(1, 4, (500,), generator=generator)
    for match_best in (False, True):
        on_both = [
            torch.ops.seg3d.match_boxes3d(boxes.to(device), truth.to(device), 0.5, 0.2, match_best).cpu()
            for device in ("cpu", "cuda")
        ]
        assert torch.equal(*on_both)
    # Powers of two: bin centres are exact, whichever way a device sums.
    on_cpu, on_cuda = (
        torch.ops.seg3d.mask_targets3d(*(t.to(device) for t in (label, ids, boxes)), 2, 4, 8)
        for device in ("cpu", "cuda")
    )
    assert on_cuda[0].is_cuda
    torch.testing.assert_close(on_cuda[0].cpu(), on_cpu[0])
    assert torch.equal(on_cuda[1].cpu(), on_cpu[1])
