import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seg3d_monai.ops import group_norm
from seg3d_monai.ops.registration import PLAIN_ON_CUDA, REFERENCE_KERNELS, _on_other_devices

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
SHAPES = [
    # Rows of 35, 1, 64 and 5 numbers, one of 3 * 8192 + 17, and groups of one number.
    ((2, 6, 5, 1, 7), 3),
    ((3, 8, 1, 1, 1), 2),
    ((2, 4, 4, 4, 4), 1),
    ((2, 12, 5), 12),
    ((1, 2, 24593), 2),
    ((4, 6), 6),
]


def inputs(shape, dtype=torch.float64, seed=0, offset=0.0):
    """x of the shape, weight, bias [C], and a gradient of the result, all of them numbers that `dtype` holds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (shape, shape[1:2], shape[1:2], shape)
    x, *rest = (torch.randn(each, generator=generator, dtype=torch.float64) for each in shapes)
    x = x + offset
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), rest[0].to(parameter_dtype), rest[1].to(parameter_dtype), rest[2].to(dtype)


def in_numpy(x, weight, bias, grad, groups, eps=EPS, relu=False):
    """The result, and gradients of x, weight and bias by the chain rule, in float64."""
    x, weight, bias, grad = (tensor.detach().double().numpy() for tensor in (x, weight, bias, grad))
    rows = (*x.shape[:2], -1)

    def mean(values):
        """The mean of each group at each of its channels and cells."""
        grouped = values.reshape(len(x), groups, -1)
        return np.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(values.shape)

    centred = x.reshape(rows) - mean(x.reshape(rows))
    deviation = np.sqrt(mean(centred**2) + eps)
    normed = centred / deviation
    result = normed * weight[:, None] + bias[:, None]
    grad = np.where(result > 0, grad.reshape(rows), 0) if relu else grad.reshape(rows)
    result = np.maximum(result, 0) if relu else result
    of_normed = grad * weight[:, None]
    of_x = (of_normed - mean(of_normed) - normed * mean(of_normed * normed)) / deviation
    return result.reshape(x.shape), of_x.reshape(x.shape), (grad * normed).sum((0, 2)), grad.sum((0, 2))


def run_both_ways(x, weight, bias, grad, groups, eps=EPS, relu=False):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    result = group_norm(*leaves, groups, eps, relu)
    return result.detach(), *torch.autograd.grad(result, leaves, grad)


def assert_near(actual, expected, tolerance):
    """Equal up to `tolerance` of each number and of the largest one."""
    expected = torch.as_tensor(expected)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_equals_the_definition(shape, groups, relu):
    tensors = inputs(shape)
    actual = run_both_ways(*tensors, groups, relu=relu)
    for mine, true in zip(actual, in_numpy(*tensors, groups, relu=relu), strict=True):
        assert_near(mine, true, 1e-11)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_other_dtypes_differ_from_float64_by_rounding(shape, groups, dtype, relu):
    tensors, eps = inputs(shape, dtype), 1e-2  # one number has no variance, and 1 / sqrt(eps) magnifies rounding
    actual = run_both_ways(*tensors, groups, eps, relu)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32, torch.float32]
    close = max(torch.finfo(dtype).eps, 4e-6)
    result, of_x, *of_parameters = in_numpy(*tensors, groups, eps, relu)
    assert_near(actual[0], result, close)
    assert_near(actual[1], of_x, 4 * close)
    for mine, true in zip(actual[2:], of_parameters, strict=True):
        assert_near(mine, true, 4e-6)  # summed in float32 or better, whatever the dtype of x


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torchs_own(dtype, relu):
    x, weight, bias, grad = inputs((2, 16, 5, 6, 7), dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    result = F.group_norm(leaves[0], 4, *leaves[1:], EPS)
    result = torch.relu(result) if relu else result
    expected = (result.detach(), *torch.autograd.grad(result, leaves, grad))
    for mine, other in zip(run_both_ways(x, weight, bias, grad, 4, relu=relu), expected, strict=True):
        assert mine.dtype == other.dtype
        assert_near(mine, other.double(), max(4 * torch.finfo(dtype).eps, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_parameters_of_a_half_type(dtype):
    x, weight, bias, grad = inputs((2, 6, 5, 7), dtype)
    tensors = x, weight.to(dtype), bias.to(dtype), grad
    actual = run_both_ways(*tensors, 2)
    assert {tensor.dtype for tensor in actual} == {dtype}
    for mine, true in zip(actual, in_numpy(*tensors, 2), strict=True):
        assert_near(mine, true, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("shape", "groups"), SHAPES[:5])
def test_groups_far_from_zero(shape, groups):
    tensors = inputs(shape, torch.float32, offset=1e4)
    for mine, true in zip(run_both_ways(*tensors, groups), in_numpy(*tensors, groups), strict=True):
        assert_near(mine, true, 4e-6)  # torch's own loses what the mean of float32 numbers loses


def test_a_first_value_far_from_the_others(kernels):
    x, weight, bias, grad = inputs((2, 4, 20, 30, 40), torch.float32)
    x[:, ::2, 0, 0, 0] = 1e3
    # What torch's own sums for the gradient of weight nearly cancels here.
    close = 1e-4 if kernels == "compiled" else 1e-2
    for mine, true in zip(run_both_ways(x, weight, bias, grad, 2), in_numpy(x, weight, bias, grad, 2), strict=True):
        assert_near(mine, true, close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.3, -1e4, 3e4])
def test_constant_groups_give_the_bias(value, dtype):
    for shape, groups in SHAPES:
        x, weight, bias, _ = inputs(shape, dtype)
        expected = bias.to(dtype).view(-1, *[1] * (x.dim() - 2)).expand(shape)
        assert torch.equal(group_norm(torch.full_like(x, value), weight, bias, groups), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_stay_in_their_group(bad, dtype):
    x, weight, bias, grad = inputs((2, 6, 5, 1, 7), dtype)
    for place in ((0, 0), (34 // 7, 6)):
        broken = x.clone()
        broken[1, 2, place[0], 0, place[1]] = bad
        for relu in (False, True):
            result, of_x, *of_parameters = run_both_ways(broken, weight, bias, grad, 3, relu=relu)
            expected, expected_of_x, *_ = run_both_ways(x, weight, bias, grad, 3, relu=relu)
            is_hit = torch.zeros(2, 6, dtype=torch.bool)
            is_hit[1, 2:4] = True
            assert result[is_hit].isnan().all()
            assert of_x[is_hit].isnan().all()
            assert torch.equal(result[~is_hit], expected[~is_hit])
            assert torch.equal(of_x[~is_hit], expected_of_x[~is_hit])
            assert of_parameters[0].isnan().tolist() == [False, False, True, True, False, False]
            assert of_parameters[1].isfinite().all()


def test_relu_passes_what_is_above_zero():
    x = torch.tensor([[[-1.0, 0.0, 1.0]]], dtype=torch.float64)
    weight, bias = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    grad = torch.tensor([[[5.0, 7.0, 11.0]]], dtype=torch.float64)
    result, of_x, of_weight, of_bias = run_both_ways(x, weight, bias, grad, 1, eps=0.0, relu=True)
    root = math.sqrt(1.5)
    torch.testing.assert_close(result, torch.tensor([[[0.0, 0.0, root]]], dtype=torch.float64))
    torch.testing.assert_close(of_bias, torch.tensor([11.0], dtype=torch.float64))
    torch.testing.assert_close(of_weight, torch.tensor([11 * root], dtype=torch.float64))
    # Only the last number passes; (0, 0, 11) less its mean less its part along the normed row (-r, 0, r), times r.
    true = root * torch.tensor([[[-11 / 3 + 11 / 2, -11 / 3, 11 - 11 / 3 - 11 / 2]]], dtype=torch.float64)
    torch.testing.assert_close(of_x, true)


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float16, 2.0**-25), (torch.float32, 0.0)])
def test_relu_passes_nothing_where_the_result_rounds_to_zero(dtype, tiny):
    x, grad = torch.zeros(1, 64, 3, dtype=dtype), torch.ones(1, 64, 3, dtype=dtype)
    bias = torch.full((64,), tiny)
    bias[:5] = 1.5 * tiny + 1e-7
    result, _, _, of_bias = run_both_ways(x, torch.ones(64), bias, grad, 8, relu=True)
    assert torch.equal(of_bias > 0, result[0, :, 0] > 0)
    assert of_bias.tolist() == [3.0] * 5 + [0.0] * 59


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_passes_a_gradient_exactly_where_the_stored_result_is_above_zero(dtype):
    x, weight, bias, _ = inputs((2, 4, 9, 11), dtype)
    x = (x * 2**-12 + 1).to(dtype)  # many results lie close to zero
    for channel in range(4):
        grad = torch.zeros_like(x)
        grad[:, channel] = 1
        result, _, _, of_bias = run_both_ways(x, weight, bias * 0, grad, 2, relu=True)
        assert of_bias[channel] == (result[:, channel] > 0).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6, 3, 4, 5), (2, 6, 0, 4, 5), (0, 6)])
def test_nothing_to_norm(shape, dtype):
    tensors = inputs(shape, dtype)
    result, of_x, of_weight, of_bias = run_both_ways(*tensors, 2, relu=True)
    assert result.shape == of_x.shape == shape
    assert of_weight.tolist() == of_bias.tolist() == [0.0] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(dtype):
    tensors = inputs((2, 6, 3, 4, 5), dtype)
    expected = run_both_ways(*tensors, 3, relu=True)
    strided = [torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in tensors]
    assert not any(tensor.is_contiguous() for tensor in strided)
    last = [tensors[0].to(memory_format=torch.channels_last_3d), *tensors[1:3]]
    for given in (strided, [*last, tensors[3].to(memory_format=torch.channels_last_3d)]):
        actual = run_both_ways(*given, 3, relu=True)
        assert actual[0].is_contiguous()
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [((2, 8, 50, 60), 4), ((1, 4, 70, 80, 90), 2), ((3, 64, 40, 41), 64)])
def test_bits_do_not_depend_on_the_number_of_threads(shape, groups, dtype, kernels):
    if kernels == "reference":
        pytest.skip("torch's own sums over as many parts as there are threads")
    tensors = inputs(shape, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_both_ways(*tensors, groups, relu=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_gradients_of_the_parameters_of_many_cells(kernels):
    tensors = inputs((2, 4, 90, 100, 80), torch.bfloat16)
    actual, expected = run_both_ways(*tensors, 2), in_numpy(*tensors, 2)
    for mine, true in zip(actual[2:], expected[2:], strict=True):
        assert_near(mine, true, 2e-6 if kernels == "compiled" else 1e-3)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 3), 2), ((1, 3, 2, 3), 1), ((2, 2, 37), 2)])
def test_gradcheck(shape, groups, relu):
    leaves = [tensor.requires_grad_() for tensor in inputs(shape)[:3]]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, w, b, groups, 1e-2, relu), leaves)


def test_a_second_derivative_is_refused():
    x, weight, bias, _ = inputs((2, 4, 5))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(group_norm(x, weight, bias, 2).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="group_norm can be differentiated once"):
        gradient.sum().backward()


def test_the_moments_have_no_gradient():
    x, weight, bias, _ = inputs((2, 4, 5))
    result, mean, rstd = torch.ops.seg3d.group_norm(x.requires_grad_(), weight, bias, 2, EPS, False)
    assert [tensor.requires_grad for tensor in (result, mean, rstd)] == [True, False, False]
    grouped = x.detach().reshape(2, 2, 10)
    torch.testing.assert_close(mean, grouped.mean(-1) - grouped[..., 0])
    torch.testing.assert_close(rstd, (grouped.var(-1, correction=0) + EPS).rsqrt())


def test_autocast_changes_nothing():
    x, weight, bias, _ = inputs((2, 4, 5), torch.float32)
    expected = group_norm(x, weight, bias, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_norm(x, weight, bias, 2), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_passes_torchs_own_checks(dtype):
    x, weight, bias, grad = inputs((2, 4, 3, 5), dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    norm, backward = torch.ops.seg3d.group_norm.default, torch.ops.seg3d.group_norm_backward.default
    torch.library.opcheck(norm, (*leaves, 2, EPS, True))
    torch.library.opcheck(norm, (x.to(memory_format=torch.channels_last), weight, bias, 2, EPS, False))
    moments = norm(x, weight, bias, 2, EPS, True)[1:]
    torch.library.opcheck(backward, (grad, x, weight, bias, *moments, 2, True))


def test_compiles_without_a_graph_break_and_exports():
    x, weight, bias, _ = inputs((2, 4, 5), torch.float32)
    x.requires_grad_()

    class Norm(torch.nn.Module):
        def forward(self, x, weight, bias):
            return group_norm(x * 2, weight, bias, 2, relu=True)

    expected = Norm()(x, weight, bias)
    compiled = torch.compile(Norm(), fullgraph=True, backend="aot_eager")
    actual = compiled(x, weight, bias)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), x), torch.autograd.grad(expected.sum(), x))
    program = torch.export.export(Norm(), (x.detach(), weight, bias))
    torch.testing.assert_close(program.module()(x.detach(), weight, bias), expected)


def test_other_devices_run_the_reference_and_never_come_back_to_the_operator():
    names = [name for name in PLAIN_ON_CUDA if name.startswith("group_norm")]
    assert names == ["group_norm", "group_norm_backward"]
    for name in names:
        assert _on_other_devices(name) is REFERENCE_KERNELS[name]
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"seg3d::{name}", "CUDA")
    x, weight, bias, grad = (tensor.to("meta") for tensor in inputs((2, 4, 5), torch.bfloat16))
    result, *gradients = run_both_ways(x, weight, bias, grad, 2)
    assert (result.shape, result.dtype) == (x.shape, torch.bfloat16)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]


X, WEIGHT, BIAS, _ = inputs((2, 4, 3), torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.numpy()}, TypeError, "x must be a torch.Tensor .* got ndarray"),
        ({"x": X.long()}, TypeError, "x must be .* got torch.int64"),
        ({"x": X[0, 0]}, ValueError, r"x must have the shape \[N, C, ...\], got \(3,\)"),
        ({"x": X[:, :0]}, ValueError, "with C >= 1, got"),
        ({"weight": WEIGHT.double()}, TypeError, "weight must be float32, got torch.float64"),
        ({"x": X.bfloat16(), "weight": WEIGHT.half()}, TypeError, "weight must be bfloat16 or float32, got"),
        ({"bias": BIAS.bfloat16()}, TypeError, "bias must be float32, got torch.bfloat16"),
        ({"weight": WEIGHT[1:]}, ValueError, "weight must have one entry per channel, got 3 for C = 4"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias is on meta, x on cpu; move them to one device"),
        ({"groups": 3}, ValueError, "groups must be >= 1 and divide C = 4, got 3"),
        ({"groups": 0}, ValueError, "groups must be >= 1 and divide C = 4, got 0"),
        ({"groups": 2.0}, TypeError, "groups must be an int >= 1, got 2.0"),
        ({"eps": -1.0}, ValueError, "eps must be a float >= 0, got -1.0"),
        ({"relu": 1}, TypeError, "relu must be True or False, got 1"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        group_norm(**{"x": X, "weight": WEIGHT, "bias": BIAS, "groups": 2, **changes})


def test_the_bare_operator_refuses_what_does_not_fit(kernels):
    if kernels == "reference":
        pytest.skip("torch's own operators refuse in their own words")
    norm, backward = torch.ops.seg3d.group_norm, torch.ops.seg3d.group_norm_backward
    with pytest.raises(RuntimeError, match=r"must have the shape \[C\] with C = 4"):
        norm(X, WEIGHT[1:], BIAS, 2, EPS, False)
    with pytest.raises(RuntimeError, match="must have the dtype of x"):
        norm(X.double(), WEIGHT, BIAS, 2, EPS, False)
    with pytest.raises(RuntimeError, match="C >= 1"):
        norm(X[:, :0], WEIGHT[:0], BIAS[:0], 1, EPS, False)
    for groups in (0, 3, -2):
        with pytest.raises(RuntimeError, match="groups must divide C"):
            norm(X, WEIGHT, BIAS, groups, EPS, False)
    moments = norm(X, WEIGHT, BIAS, 2, EPS, False)[1:]
    with pytest.raises(RuntimeError, match="grad must have the dtype, the shape"):
        backward(X[1:], X, WEIGHT, BIAS, *moments, 2, False)
    for wrong in (moments[0][:1], moments[0].double(), moments[0][0]):
        with pytest.raises(RuntimeError, match="must be those of group_norm"):
            backward(X, X, WEIGHT, BIAS, wrong, moments[1], 2, False)
