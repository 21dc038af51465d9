import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seg3d_monai.ops import layer_norm
from seg3d_monai.ops.registration import PLAIN_ON_CUDA, REFERENCE_KERNELS, _on_other_devices

pytestmark = pytest.mark.usefixtures("kernels")

WIDTHS = [1, 3, 17, 32, 64, 96, 100, 128, 256]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def inputs(rows, channels, dtype=torch.float64, seed=0, offset=0.0):
    """x [rows, C], weight, bias [C], and a gradient of the result, all of them numbers that `dtype` holds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, channels), (channels,), (channels,), (rows, channels))
    x, *rest = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x = x + offset
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), rest[0].to(parameter_dtype), rest[1].to(parameter_dtype), rest[2].to(dtype)


def normed_in_numpy(x, weight, bias, eps=EPS, relu=False):
    """The definition, in float64."""
    x, weight, bias = (tensor.detach().double().numpy() for tensor in (x, weight, bias))
    centred = x - x.mean(-1, keepdims=True)
    result = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias
    return np.maximum(result, 0) if relu else result


def gradients_in_numpy(grad, x, weight, bias, eps=EPS, relu=False):
    """Gradients of x, weight and bias by the chain rule, in float64."""
    result = normed_in_numpy(x, weight, bias, eps)
    grad, x, weight = (tensor.detach().double().numpy() for tensor in (grad, x, weight))
    grad = np.where(result > 0, grad, 0) if relu else grad
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    normed, of_normed = centred / deviation, grad * weight
    projected = normed * (of_normed * normed).mean(-1, keepdims=True)
    of_x = (of_normed - of_normed.mean(-1, keepdims=True) - projected) / deviation
    return of_x, (grad * normed).sum(0), grad.sum(0)


def run_both_ways(x, weight, bias, grad, eps=EPS, relu=False):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    result = layer_norm(*leaves, eps, relu)
    return result.detach(), *torch.autograd.grad(result, leaves, grad)


def assert_near(actual, expected, tolerance):
    """Equal up to `tolerance` of each number and of the largest one."""
    expected = torch.as_tensor(expected)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("rows", [1, 7, 16, 45])
def test_equals_the_definition(rows, channels, relu):
    x, weight, bias, grad = inputs(rows, channels)
    actual = run_both_ways(x, weight, bias, grad, relu=relu)
    assert_near(actual[0], normed_in_numpy(x, weight, bias, relu=relu), 1e-12)
    for mine, true in zip(actual[1:], gradients_in_numpy(grad, x, weight, bias, relu=relu), strict=True):
        assert_near(mine, true, 1e-11)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("channels", WIDTHS)
def test_other_dtypes_differ_from_float64_by_rounding(channels, dtype, relu):
    x, weight, bias, grad = inputs(70, channels, dtype)
    eps = 1e-2  # a single channel has no variance, and 1 / sqrt(eps) magnifies what rounding leaves
    actual = run_both_ways(x, weight, bias, grad, eps, relu)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32, torch.float32]
    close = max(torch.finfo(dtype).eps, 4e-6)
    assert_near(actual[0], normed_in_numpy(x, weight, bias, eps, relu), close)
    of_x, *of_parameters = gradients_in_numpy(grad, x, weight, bias, eps, relu)
    assert_near(actual[1], of_x, 4 * close)
    for mine, true in zip(actual[2:], of_parameters, strict=True):
        assert_near(mine, true, 4e-6)  # summed in float32, whatever the dtype of x


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torchs_own(dtype, relu):
    x, weight, bias, grad = inputs(200, 64, dtype)

    def torchs_own(x, grad):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        result = F.layer_norm(leaves[0], (64,), *leaves[1:], EPS)
        result = torch.relu(result) if relu else result
        return result.detach(), *torch.autograd.grad(result, leaves, grad)

    # In half types torch sums the gradients of the parameters in these, in as many parts as there are threads.
    wide = torch.promote_types(dtype, torch.float32)
    expected = (*torchs_own(x, grad)[:2], *torchs_own(x.to(wide), grad.to(wide))[2:])
    for mine, other in zip(run_both_ways(x, weight, bias, grad, relu=relu), expected, strict=True):
        assert mine.dtype == other.dtype
        assert_near(mine, other.double(), max(2 * torch.finfo(dtype).eps, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_parameters_of_a_half_type(dtype):
    x, weight, bias, grad = inputs(50, 100, dtype)
    weight, bias = weight.to(dtype), bias.to(dtype)
    actual = run_both_ways(x, weight, bias, grad)
    assert {tensor.dtype for tensor in actual} == {dtype}
    expected = (normed_in_numpy(x, weight, bias), *gradients_in_numpy(grad, x, weight, bias))
    for mine, true in zip(actual, expected, strict=True):
        assert_near(mine, true, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("channels", [3, 64, 100])
def test_rows_far_from_zero(channels, kernels):
    x, weight, bias, grad = inputs(40, channels, torch.float32, offset=1e4)
    actual = run_both_ways(x, weight, bias, grad)
    # torch's own loses what the mean of float32 numbers loses; the kernels do not.
    close = 2e-6 if kernels == "compiled" else 1e-2
    expected = (normed_in_numpy(x, weight, bias), *gradients_in_numpy(grad, x, weight, bias))
    for mine, true in zip(actual, expected, strict=True):
        assert_near(mine, true, close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.3, -1e4, 3e4])
def test_constant_rows_give_the_bias(value, dtype, kernels):
    if kernels == "reference":
        pytest.skip("torch's own rounds the mean")
    for channels in (1, 17, 64, 100):
        x = torch.full((5, channels), value, dtype=dtype)
        _, weight, bias, _ = inputs(1, channels, dtype)
        assert torch.equal(layer_norm(x, weight, bias), bias.to(dtype).expand(5, -1))


@pytest.mark.parametrize("channels", [17, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_stay_in_their_row(bad, dtype, channels):
    x, weight, bias, grad = inputs(20, channels, dtype)
    for place in (0, channels - 1):
        broken = x.clone()
        broken[6, place] = bad
        for relu in (False, True):
            result, of_x, *of_parameters = run_both_ways(broken, weight, bias, grad, relu=relu)
            expected, expected_of_x, *_ = run_both_ways(x, weight, bias, grad, relu=relu)
            others = torch.arange(20) != 6
            assert result[6].isnan().all()
            assert of_x[6].isnan().all()
            assert torch.equal(result[others], expected[others])
            assert torch.equal(of_x[others], expected_of_x[others])
            assert of_parameters[0].isnan().all()
            assert of_parameters[1].isfinite().all()


def test_relu_passes_what_is_above_zero():
    x = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64)
    weight, bias = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    grad = torch.tensor([[5.0, 7.0, 11.0]], dtype=torch.float64)
    result, of_x, of_weight, of_bias = run_both_ways(x, weight, bias, grad, eps=0.0, relu=True)
    root = math.sqrt(1.5)
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, root]], dtype=torch.float64))
    torch.testing.assert_close(of_bias, torch.tensor([0.0, 0.0, 11.0], dtype=torch.float64))
    torch.testing.assert_close(of_weight, torch.tensor([0.0, 0.0, 11 * root], dtype=torch.float64))
    # Only the last channel passes; (0, 0, 11) less its mean less its part along the normed row (-r, 0, r), times r.
    true = root * torch.tensor([[-11 / 3 + 11 / 2, -11 / 3, 11 - 11 / 3 - 11 / 2]], dtype=torch.float64)
    torch.testing.assert_close(of_x, true)


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float16, 2.0**-25), (torch.float32, 0.0)])
def test_relu_passes_nothing_where_the_result_rounds_to_zero(dtype, tiny):
    x, grad = torch.zeros(1, 64, dtype=dtype), torch.ones(1, 64, dtype=dtype)
    bias = torch.full((64,), tiny)
    bias[:5] = 1.5 * tiny + 1e-7
    result, _, _, of_bias = run_both_ways(x, torch.ones(64), bias, grad, relu=True)
    assert torch.equal(of_bias > 0, result[0] > 0)
    assert of_bias.tolist() == [1.0] * 5 + [0.0] * 59


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 17), (0, 3, 100)])
def test_no_rows(shape, dtype):
    _, weight, bias, _ = inputs(1, shape[-1], dtype)
    result, of_x, of_weight, of_bias = run_both_ways(torch.zeros(shape, dtype=dtype), weight, bias, torch.ones(shape))
    assert result.shape == of_x.shape == shape
    assert not of_weight.any()
    assert not of_bias.any()


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 5, 64), (1, 2, 3, 2, 2, 17)])
def test_any_number_of_axes(shape):
    x, weight, bias, grad = inputs(math.prod(shape[:-1]), shape[-1])
    flat = run_both_ways(x, weight, bias, grad)
    result, of_x, *of_parameters = run_both_ways(x.view(shape), weight, bias, grad.view(shape))
    assert result.shape == of_x.shape == shape
    assert torch.equal(result.reshape(x.shape), flat[0])
    assert torch.equal(of_x.reshape(x.shape), flat[1])
    assert all(torch.equal(one, other) for one, other in zip(of_parameters, flat[2:], strict=True))


@pytest.mark.parametrize("channels", [17, 64])
def test_strided_inputs(channels):
    tensors = inputs(30, channels, torch.bfloat16)
    strided = [torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in tensors]
    assert not any(tensor.is_contiguous() for tensor in strided)
    actual, expected = run_both_ways(*strided), run_both_ways(*tensors)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    swapped = tensors[0].T.contiguous().T
    assert layer_norm(swapped, *tensors[1:3]).is_contiguous()
    assert torch.equal(layer_norm(swapped, *tensors[1:3]), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 64, 256])
def test_bits_do_not_depend_on_the_number_of_threads(channels, dtype, kernels):
    if kernels == "reference":
        pytest.skip("torch's own sums over as many parts as there are threads")
    tensors = inputs(300_000 // channels, channels, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_both_ways(*tensors, relu=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_gradients_of_the_parameters_of_many_rows(kernels):
    x, weight, bias, grad = inputs(100_000, 64, torch.bfloat16)
    _, _, of_weight, of_bias = run_both_ways(x, weight, bias, grad)
    _, *expected = gradients_in_numpy(grad, x, weight, bias)
    assert_near(of_weight, expected[0], 1e-6 if kernels == "compiled" else 1e-4)
    assert_near(of_bias, expected[1], 1e-6 if kernels == "compiled" else 1e-4)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 32, 37])
def test_gradcheck(channels, relu):
    leaves = [tensor.requires_grad_() for tensor in inputs(4, channels)[:3]]
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, 1e-2, relu), leaves)


def test_a_second_derivative_is_refused():
    x, weight, bias, _ = inputs(3, 5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer_norm(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="layer_norm can be differentiated once"):
        gradient.sum().backward()


def test_autocast_changes_nothing():
    x, weight, bias, _ = inputs(9, 20, torch.float32)
    expected = layer_norm(x, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer_norm(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_passes_torchs_own_checks(dtype):
    x, weight, bias, grad = inputs(6, 20, dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(torch.ops.seg3d.layer_norm.default, (*leaves, EPS, True))
    torch.library.opcheck(torch.ops.seg3d.layer_norm.default, (x.T.contiguous().T, weight, bias, EPS, False))
    torch.library.opcheck(torch.ops.seg3d.layer_norm_backward.default, (grad, x, weight, bias, EPS, True))


def test_compiles_without_a_graph_break_and_exports():
    x, weight, bias, _ = inputs(6, 20, torch.float32)
    x.requires_grad_()

    class Norm(torch.nn.Module):
        def forward(self, x, weight, bias):
            return layer_norm(x * 2, weight, bias, relu=True)

    expected = Norm()(x, weight, bias)
    compiled = torch.compile(Norm(), fullgraph=True, backend="aot_eager")
    actual = compiled(x, weight, bias)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), x), torch.autograd.grad(expected.sum(), x))
    program = torch.export.export(Norm(), (x.detach(), weight, bias))
    torch.testing.assert_close(program.module()(x.detach(), weight, bias), expected)


def test_other_devices_run_the_reference_and_never_come_back_to_the_operator():
    for name in PLAIN_ON_CUDA:
        assert _on_other_devices(name) is REFERENCE_KERNELS[name]
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"seg3d::{name}", "CUDA")
    x, weight, bias, grad = (tensor.to("meta") for tensor in inputs(6, 20, torch.bfloat16))
    result, *gradients = run_both_ways(x, weight, bias, grad)
    assert (result.shape, result.dtype) == (x.shape, torch.bfloat16)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]


X, WEIGHT, BIAS, _ = inputs(3, 4, torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.numpy()}, TypeError, "x must be a torch.Tensor .* got ndarray"),
        ({"x": X.long()}, TypeError, "x must be .* got torch.int64"),
        ({"x": X.sum()}, ValueError, r"x must have the shape \[..., C\], got \(\)"),
        ({"x": X[:, :0]}, ValueError, "with C >= 1, got"),
        ({"weight": WEIGHT.double()}, TypeError, "weight must be float32, got torch.float64"),
        ({"x": X.bfloat16(), "weight": WEIGHT.half()}, TypeError, "weight must be bfloat16 or float32, got"),
        ({"bias": BIAS.bfloat16()}, TypeError, "bias must be float32, got torch.bfloat16"),
        ({"weight": WEIGHT[None]}, ValueError, r"weight must have the shape \[C\], got \(1, 4\)"),
        ({"weight": WEIGHT[1:]}, ValueError, "weight must have one entry per channel, got 3 for C = 4"),
        ({"bias": BIAS[1:]}, ValueError, "bias must have one entry per channel, got 3 for C = 4"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias is on meta, x on cpu; move them to one device"),
        ({"eps": -1.0}, ValueError, "eps must be a float >= 0, got -1.0"),
        ({"eps": "small"}, TypeError, "eps must be a float >= 0, got 'small'"),
        ({"relu": 1}, TypeError, "relu must be True or False, got 1"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**{"x": X, "weight": WEIGHT, "bias": BIAS, **changes})


def test_the_bare_operator_refuses_what_does_not_fit(kernels):
    if kernels == "reference":
        pytest.skip("torch's own operators refuse in their own words")
    norm, backward = torch.ops.seg3d.layer_norm, torch.ops.seg3d.layer_norm_backward
    with pytest.raises(RuntimeError, match=r"must have the shape \[C\] with C = 4"):
        norm(X, WEIGHT[1:], BIAS, EPS, False)
    with pytest.raises(RuntimeError, match="must have the dtype of x"):
        norm(X.double(), WEIGHT, BIAS, EPS, False)
    with pytest.raises(RuntimeError, match="must have one dtype"):
        norm(X.bfloat16(), WEIGHT, BIAS.bfloat16(), EPS, False)
    with pytest.raises(RuntimeError, match="C >= 1"):
        norm(X[:, :0], WEIGHT[:0], BIAS[:0], EPS, False)
    with pytest.raises(RuntimeError, match="grad must have the dtype, the shape"):
        backward(X[1:], X, WEIGHT, BIAS, EPS, False)
