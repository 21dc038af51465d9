import math

import pytest
import torch
from ms_deform_attn3d_cases import Attention, attend_by_grid_sample, attentions

from seg3d_monai.ops import ms_deform_attn3d

pytestmark = pytest.mark.usefixtures("kernels")

WIDE = Attention(((3, 4, 5), (2, 1, 3)), 1, 9, 2, 112, 3)  # channels in blocks of four, two and one vectors


def shapes_of(attention):
    return torch.tensor(attention.shapes)


@attentions
def test_equals_the_naive_loop(attention):
    value, locations, weights = attention.tensors()
    actual = ms_deform_attn3d(value, shapes_of(attention), locations, weights)
    torch.testing.assert_close(actual, attention.attended(value, locations, weights), rtol=1e-12, atol=1e-13)


@attentions
def test_gradients_equal_those_of_grid_sample(attention):
    value, locations, weights = attention.tensors()
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = ms_deform_attn3d(leaves[0], shapes_of(attention), *leaves[1:])
    actual = torch.autograd.grad(output, leaves, attention.grad())
    for name, mine, true in zip("vlw", actual, attention.gradients(attention.grad(), *leaves), strict=True):
        is_far = ~(leaves[1].abs() < 10).all(-1)  # the stand-ins of far and NaN locations have other slopes
        if name == "l":
            assert not mine[is_far].any()
            mine, true = mine[~is_far], true[~is_far]
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", [Attention(), Attention(((2, 6, 3),) * 3, 1, 5, 2, 32, 4), WIDE], ids=str)
def test_other_dtypes_differ_from_float64_by_the_rounding_of_the_result(attention, dtype):
    value, locations, weights = attention.tensors()
    value, locations, weights = value.to(dtype), locations.float(), weights.float()
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = ms_deform_attn3d(leaves[0], shapes_of(attention), *leaves[1:])
    exact = attention.attended(value.detach(), locations.detach(), weights.detach())
    assert output.dtype == dtype
    resolution = max(torch.finfo(dtype).eps, 4e-6)
    torch.testing.assert_close(output.double(), exact, rtol=resolution, atol=resolution)
    grad = attention.grad().to(dtype)
    actual = torch.autograd.grad(output, leaves, grad)
    assert [gradient.dtype for gradient in actual] == [dtype, torch.float32, torch.float32]
    for mine, true in zip(actual, attention.gradients(grad, *(leaf.detach() for leaf in leaves)), strict=True):
        is_near = true.abs() < 1e6  # NaN and far locations
        torch.testing.assert_close(mine.double()[is_near], true[is_near], rtol=resolution, atol=30 * resolution)


def test_half_locations_and_weights_are_taken_too():
    attention = Attention()
    value, locations, weights = (tensor.nan_to_num(0, 0, 0).half() for tensor in attention.tensors())
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = ms_deform_attn3d(leaves[0], shapes_of(attention), *leaves[1:])
    exact = attention.attended(*(leaf.detach() for leaf in leaves))
    torch.testing.assert_close(output.double(), exact, rtol=1e-3, atol=1e-3)
    assert all(g.dtype == torch.float16 for g in torch.autograd.grad(output.sum(), leaves))


def test_hand_counted_samples():
    # A level of 2 x 1 x 3 voxels holds 1 .. 6, the next one of a single voxel holds 100.
    value = torch.tensor([1.0, 2, 3, 4, 5, 6, 100]).view(1, 7, 1, 1)
    shapes = torch.tensor([[2, 1, 3], [1, 1, 1]])
    centre = torch.tensor([0.25, 0.5, 1 / 6])  # of the first voxel
    last = torch.tensor([0.75, 0.5, 5 / 6])
    queries = {
        "the first voxel": (centre, 1.0),
        "the middle of all": (torch.tensor([0.5, 0.5, 0.5]), 3.5),
        "half over the border": (torch.tensor([0.25, 0.0, 1 / 6]), 0.5),
        "outside": (torch.tensor([0.25, -0.5, 1 / 6]), 0.0),
        "the last voxel": (last, 6.0),
    }
    for place, expected in queries.values():
        locations = torch.stack([place, torch.tensor([0.5, 0.5, 0.5])]).view(1, 1, 1, 2, 1, 3)
        weights = torch.tensor([1.0, 0.25]).view(1, 1, 1, 2, 1)
        assert ms_deform_attn3d(value, shapes, locations, weights).item() == pytest.approx(expected + 25)


def test_what_lies_outside_is_never_read():
    # The level between two levels of NaN: samples over its border must not touch them, forward or backward.
    shapes = torch.tensor([[2, 3, 2], [3, 2, 4], [2, 2, 3]])
    value = torch.randn(1, 48, 2, 5, generator=torch.Generator().manual_seed(0))
    value[:, :12] = value[:, 36:] = math.nan
    locations = torch.rand(1, 40, 2, 3, 2, 3, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.3
    locations[:, :, :, [0, 2]] = 7.0
    leaves = [t.requires_grad_() for t in (value, locations, torch.rand(1, 40, 2, 3, 2))]
    output = ms_deform_attn3d(leaves[0], shapes, *leaves[1:])
    assert torch.isfinite(output).all()
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "sizes",
    [{name: 0} for name in ("num_queries", "num_images", "points", "heads", "channels")],
    ids=lambda sizes: next(iter(sizes)),
)
def test_nothing(sizes):
    attention = Attention(**sizes)
    leaves = [tensor.requires_grad_() for tensor in attention.tensors()]
    output = ms_deform_attn3d(leaves[0], shapes_of(attention), *leaves[1:])
    assert output.shape == attention.grad().shape
    assert not output.any()
    output.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


def test_no_level():
    attention = Attention(shapes=())
    value, locations, weights = attention.tensors()
    output = ms_deform_attn3d(value, torch.zeros(0, 3, dtype=torch.int64), locations, weights)
    assert output.shape == attention.grad().shape
    assert not output.any()


def test_gradcheck():
    attention = Attention(((2, 3, 4), (1, 2, 2)), 1, 3, 2, 3, 2)
    value, _, weights = attention.tensors()
    locations = torch.rand(1, 3, 2, 2, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn3d(v, shapes_of(attention), x, w), leaves)


def test_a_second_derivative_is_refused():
    attention = Attention()
    value, locations, weights = attention.tensors()
    value.requires_grad_()
    loss = ms_deform_attn3d(value, shapes_of(attention), locations, weights).square().sum()
    (gradient,) = torch.autograd.grad(loss, value, create_graph=True)
    with pytest.raises(NotImplementedError, match="ms_deform_attn3d can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("attention", [WIDE, Attention(((3, 4, 5),), 1, 200, 1, 64, 2)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(attention):
    leaves = [tensor.float().requires_grad_() for tensor in attention.tensors()]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            output = ms_deform_attn3d(leaves[0], shapes_of(attention), *leaves[1:])
            results.append((output, *torch.autograd.grad(output, leaves, attention.grad().float())))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_strided_inputs():
    attention = Attention(channels=6)
    tensors = attention.tensors()
    strided = [torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in tensors]
    assert not any(tensor.is_contiguous() for tensor in strided)
    actual = ms_deform_attn3d(strided[0], shapes_of(attention).T.contiguous().T, *strided[1:])
    assert torch.equal(actual, ms_deform_attn3d(tensors[0], shapes_of(attention), *tensors[1:]))


def test_autocast_changes_nothing():
    attention = Attention()
    tensors = [tensor.float() for tensor in attention.tensors()]
    expected = ms_deform_attn3d(tensors[0], shapes_of(attention), *tensors[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ms_deform_attn3d(tensors[0], shapes_of(attention), *tensors[1:]), expected)


def test_the_operator_passes_torchs_own_checks():
    attention = Attention(((2, 3, 2), (1, 2, 2)), 1, 3, 2, 4, 2)
    value, locations, weights = (tensor.nan_to_num(0.5, 0.5, 0.5) for tensor in attention.tensors())
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(torch.ops.seg3d.ms_deform_attn3d.default, (leaves[0], shapes_of(attention), *leaves[1:]))
    detached = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(
        torch.ops.seg3d.ms_deform_attn3d_backward.default,
        (attention.grad(), detached[0], shapes_of(attention), *detached[1:]),
    )


def test_compiles_without_a_graph_break_and_exports():
    attention = Attention(channels=4)
    value, locations, weights = (tensor.nan_to_num(0.5, 0.5, 0.5).float() for tensor in attention.tensors())
    value.requires_grad_()

    class Attend(torch.nn.Module):
        def forward(self, value, shapes, locations, weights):
            return ms_deform_attn3d(value * 2, shapes, locations, weights.softmax(-1))

    expected = Attend()(value, shapes_of(attention), locations, weights)
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    actual = compiled(value, shapes_of(attention), locations, weights)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), value), torch.autograd.grad(expected.sum(), value))
    program = torch.export.export(Attend(), (value.detach(), shapes_of(attention), locations, weights))
    torch.testing.assert_close(program.module()(value.detach(), shapes_of(attention), locations, weights), expected)


def call_with(**changes):
    value, locations, weights = Attention().tensors()
    arguments = {
        "value": value,
        "spatial_shapes": shapes_of(Attention()),
        "sampling_locations": locations,
        "attention_weights": weights,
        **changes,
    }
    return ms_deform_attn3d(**arguments)


VALUE, LOCATIONS, WEIGHTS = Attention().tensors()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": VALUE.numpy()}, TypeError, "value must be a torch.Tensor .* got ndarray"),
        ({"value": VALUE.long()}, TypeError, "value must be .* got torch.int64"),
        ({"value": VALUE[0]}, ValueError, r"value must have the shape \[N, S, M, Dh\]"),
        ({"value": VALUE[:, 1:]}, ValueError, "value has S = 65 rows, but the levels .* have 66 voxels"),
        ({"value": VALUE[:1]}, ValueError, r"sampling_locations must have the shape .* with N, M = 1, 3"),
        (
            {"spatial_shapes": torch.tensor([[3, 4], [5, 6]])},
            ValueError,
            r"spatial_shapes must have the shape \[L, 3\]",
        ),
        ({"spatial_shapes": torch.tensor([[3.0, 4.0, 5.0]])}, TypeError, "spatial_shapes must be int64"),
        ({"spatial_shapes": torch.tensor([[3, 4, 5], [2, -1, -3]])}, ValueError, "spatial_shapes must be >= 1"),
        ({"spatial_shapes": torch.tensor([[3, 4, 5]])}, ValueError, "sampling_locations must have .* L = 1"),
        ({"sampling_locations": LOCATIONS[..., :2]}, ValueError, "sampling_locations must have the shape"),
        ({"sampling_locations": LOCATIONS[..., 0, :]}, ValueError, "sampling_locations must have the shape"),
        ({"attention_weights": WEIGHTS[:, 1:]}, ValueError, "attention_weights must have the shape"),
        ({"attention_weights": WEIGHTS.to("meta")}, ValueError, "move them to one device"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call_with(**changes)


@pytest.mark.parametrize("shape", [(4, 4, 5), (1, 4, 5), (2**62, 2, 2), (0, 4, 5), (-3, -4, 5)])
def test_the_bare_operator_refuses_levels_that_do_not_fit(shape):
    shapes = torch.tensor([shape, (2, 1, 3)])
    with pytest.raises((RuntimeError, ValueError), match="spatial_shapes"):
        torch.ops.seg3d.ms_deform_attn3d(VALUE, shapes, LOCATIONS, WEIGHTS)


# Levels that the kernels cut into slabs: with more samples than rows, and rows beyond half a megabyte a head.
LARGE = [
    Attention(((20, 12, 14), (3, 2, 4)), 1, 1700, 2, 64, 2),
    Attention(((2, 50, 60), (1, 3, 2)), 2, 6100, 2, 32, 1),  # two slices are more than a slab
    Attention(((30, 20, 25), (5, 4, 3)), 1, 70_000, 2, 16, 2),  # more samples than are sorted at once
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", LARGE, ids=str)
def test_large_levels(attention, dtype, kernels):
    if kernels == "reference" and dtype != torch.float64:
        pytest.skip("the reference has no slabs")
    value, locations, weights = attention.tensors()
    accumulate = torch.promote_types(dtype, torch.float32)
    leaves = [value.to(dtype), locations.to(accumulate), weights.to(accumulate)]
    leaves = [tensor.requires_grad_() for tensor in leaves]
    grad = attention.grad().to(dtype)
    actual = ms_deform_attn3d(leaves[0], shapes_of(attention), *leaves[1:])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = attend_by_grid_sample(exact[0], attention.shapes, *exact[1:])
    resolution = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=resolution, atol=resolution)
    mine = torch.autograd.grad(actual, leaves, grad)
    true = torch.autograd.grad(expected, exact, grad.double())
    near = [torch.ones_like(true[0], dtype=torch.bool), (exact[1].abs() < 10), torch.ones_like(weights, dtype=bool)]
    for one, other, mask in zip(mine, true, near, strict=True):
        # At a voxel's border the slope jumps; float32 may take the other side.
        is_close = torch.isclose(one.double(), other, rtol=resolution, atol=resolution * other[mask].abs().max())
        assert (is_close | ~mask).double().mean() > (1 if dtype == torch.float64 else 0.9995) - 1e-9


@pytest.mark.parametrize("attention", LARGE[:2], ids=str)
def test_bits_of_large_levels_do_not_depend_on_the_number_of_threads(attention, kernels):
    if kernels == "reference":
        pytest.skip("matrix products of torch are not the same for any number of threads")
    test_bits_do_not_depend_on_the_number_of_threads(attention)


def test_slabs_never_read_what_lies_outside(kernels):
    attention = LARGE[0]
    value, locations, weights = (tensor.float() for tensor in attention.tensors())
    whole = torch.full((1, value.shape[1] + 200, 2, 64), math.nan)
    whole[:, 100:-100] = value
    inner = whole[:, 100:-100]
    assert torch.isfinite(ms_deform_attn3d(inner, shapes_of(attention), locations, weights)).all()
