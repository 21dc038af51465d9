import naive_oracle
import numpy as np
import pytest
import torch

from seg3d_monai.ops import reference, roi_align3d

pytestmark = pytest.mark.usefixtures("kernels")

BOXES = torch.tensor(
    [
        [0.0, 0.0, 0.0, 4.0, 5.0, 7.0],  # the whole volume
        [0.7, 1.2, 2.9, 3.1, 4.8, 5.3],
        [-2.5, -3.0, -1.6, 2.0, 6.9, 9.2],  # over the border
        [1.3, 2.2, 3.1, 1.6, 2.3, 3.15],  # smaller than a voxel
        [2.0, 2.0, 2.0, 2.0, 4.0, 4.0],  # empty
        [3.0, 1.0, 2.0, 1.0, 4.0, 5.0],  # corners swapped on z
        [20.0, 1.0, 1.0, 24.0, 3.0, 3.0],  # far outside
    ]
)
IMAGES = torch.tensor([0, 1, 1, 0, 1, 0, 1])


def make_features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("out", "scale"), [((2, 3, 4), (1.0, 1.0, 1.0)), ((3, 1, 2), (0.5, 0.8, 1.3)), ((1, 1, 1), (2.0, 0.25, 0.6))]
)
def test_equals_the_naive_loop(out, scale, sampling_ratio, aligned):
    features = make_features(2, 3, 4, 5, 7)
    boxes = BOXES.double()
    pooled = roi_align3d(features, boxes, IMAGES, out, scale, sampling_ratio, aligned)
    expected = naive_oracle.roi_align(
        features.numpy(), boxes.numpy(), IMAGES.tolist(), out, scale, sampling_ratio, aligned
    )
    assert pooled.shape == (len(BOXES), 3, *out)
    np.testing.assert_allclose(pooled.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 2, 8, 19, 33])
def test_any_number_of_channels_in_both_layouts(channels, dtype, layout):
    features = make_features(2, channels, 4, 5, 19, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    pooled = roi_align3d(features, BOXES * 1.5, IMAGES, (2, 3, 4), 1.0, 2)
    exact = features.detach().double().contiguous()
    expected = naive_oracle.roi_align(
        exact.numpy(), (BOXES * 1.5).numpy(), IMAGES.tolist(), (2, 3, 4), [1.0] * 3, 2, True
    )
    resolution = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]  # the boxes are float32
    np.testing.assert_allclose(pooled.detach().double().numpy(), expected, rtol=resolution, atol=resolution)
    assert pooled.is_contiguous(memory_format=layout)

    # The gradient is the transposed linear map: <pool(f), g> = <f, gradient of g>.
    weights = make_features(*pooled.shape, seed=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(pooled, features, weights)
    assert gradient.is_contiguous(memory_format=layout)
    left, right = (torch.tensor(expected) * weights.double()).sum(), (exact * gradient.double()).sum()
    torch.testing.assert_close(left, right, rtol=resolution, atol=30 * resolution)


def test_views_are_read_where_they_lie():
    channels_last = make_features(2, 24, 4, 5, 19).contiguous(memory_format=torch.channels_last_3d)
    for whole in (channels_last, channels_last.contiguous()):
        part = whole[:, 3:20, 1:, ::2, 2:15]
        expected = roi_align3d(part.contiguous(), BOXES, IMAGES, (2, 3, 4))
        torch.testing.assert_close(roi_align3d(part, BOXES, IMAGES, (2, 3, 4)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_boxes_far_apart_in_large_features(dtype):
    # The windows of these boxes do not fit together into one block of the kernel.
    features = make_features(1, 16, 20, 70, 90, dtype=dtype).requires_grad_()
    generator = torch.Generator().manual_seed(5)
    low = torch.rand(40, 3, generator=generator) * torch.tensor([15.0, 60.0, 80.0])
    boxes = torch.cat([low, low + 1 + 9 * torch.rand(40, 3, generator=generator)], 1)
    boxes = torch.cat([boxes, torch.tensor([[0.0, 0.0, 0.0, 20.0, 70.0, 90.0]])])
    images = torch.zeros(41, dtype=torch.int64)
    pooled = roi_align3d(features, boxes, images, (2, 3, 2))
    resolution = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    exact = features.detach().double()
    expected = reference.roi_align3d(exact, boxes, images, 2, 3, 2, 1.0, 1.0, 1.0, 0, True)
    torch.testing.assert_close(
        pooled.double(), expected, rtol=resolution, atol=1e-4 if dtype != torch.float64 else 1e-5
    )
    weights = make_features(*pooled.shape, seed=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(pooled, features, weights)
    expected = reference.roi_align3d_backward(
        weights.double(), boxes, images, 1, 20, 70, 90, 1.0, 1.0, 1.0, 0, True, False
    )
    torch.testing.assert_close(
        gradient.double(), expected, rtol=resolution, atol=1e-4 if dtype != torch.float64 else 1e-5
    )


def test_a_box_on_the_voxel_grid_pools_its_own_voxels():
    features = make_features(1, 2, 4, 5, 7)
    pooled = roi_align3d(features, torch.tensor([[1.0, 2.0, 3.0, 3.0, 5.0, 7.0]]), torch.tensor([0]), (2, 3, 4))
    torch.testing.assert_close(pooled[0], features[0, :, 1:3, 2:5, 3:7], rtol=0, atol=1e-15)


def test_a_ramp_gives_the_coordinates_of_the_bin_centres():
    z, y, x = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), torch.arange(10.0), indexing="ij")
    features = torch.stack([z, y, x])[None]
    box = torch.tensor([[2.0, 1.5, 3.0, 6.0, 7.5, 8.0]])
    pooled = roi_align3d(features, box, torch.tensor([0]), (2, 3, 1))
    # Voxel i has its centre at i + 0.5: bins of extent 2, 2, 5 have their centres at 3, 5; 2.5, 4.5, 6.5; 5.5.
    torch.testing.assert_close(pooled[0, 0, :, 0, 0], torch.tensor([2.5, 4.5]))
    torch.testing.assert_close(pooled[0, 1, 0, :, 0], torch.tensor([2.0, 4.0, 6.0]))
    torch.testing.assert_close(pooled[0, 2, 0, 0, :], torch.tensor([5.0]))


def test_samples_outside_count_zero_and_samples_at_the_border_are_clamped():
    features = torch.full((1, 1, 3, 4, 5), 2.0)
    features[:, :, 0] = 6.0
    # One sample a bin, at z = -2, -1, 0, 1 (centres of voxels -2, -1, 0, 1): outside, on the limit (clamped), inside.
    pooled = roi_align3d(features, torch.tensor([[-2.0, 1.0, 1.0, 2.0, 2.0, 2.0]]), torch.tensor([0]), (4, 1, 1))
    assert pooled.flatten().tolist() == [0.0, 6.0, 6.0, 2.0]
    # The far side of x (size 5): samples at 4, 5, 6.
    pooled = roi_align3d(features, torch.tensor([[1.0, 1.0, 4.0, 2.0, 2.0, 7.0]]), torch.tensor([0]), (1, 1, 3))
    assert pooled.flatten().tolist() == [2.0, 2.0, 0.0]
    # Two samples a bin on y (size 4), at -1.25 and -0.75: half of the bin is lost.
    pooled = roi_align3d(features, torch.tensor([[2.0, -1.0, 1.0, 3.0, 0.0, 2.0]]), torch.tensor([0]), 1, 1.0, 2)
    assert pooled.flatten().tolist() == [1.0]


def test_adaptive_sampling_takes_one_sample_a_voxel():
    features = make_features(1, 1, 6, 4, 8)
    box = torch.tensor([[0.0, 0.0, 0.0, 6.0, 4.0, 8.0]])
    pooled = roi_align3d(features, box, torch.tensor([0]), (2, 2, 2))
    expected = torch.nn.functional.avg_pool3d(features, (3, 2, 4))
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=0)


def test_not_aligned_has_no_shift_and_at_least_one_voxel():
    features = torch.arange(5.0).reshape(1, 1, 1, 1, 5).expand(1, 1, 3, 4, 5)
    thin = torch.tensor([[1.0, 1.0, 2.0, 1.0, 1.0, 2.25]])
    assert roi_align3d(features, thin, torch.tensor([0]), 1, aligned=False).item() == 2.5
    assert roi_align3d(features, thin, torch.tensor([0]), 1, 1.0, 1, aligned=True).item() == pytest.approx(1.625)


def test_each_axis_has_its_own_scale():
    features = make_features(2, 3, 4, 5, 7)
    scale = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)
    boxes = BOXES[:4].double()
    pooled = roi_align3d(features, boxes / scale.repeat(2), IMAGES[:4], (2, 3, 2), scale.tolist(), 2)
    torch.testing.assert_close(pooled, roi_align3d(features, boxes, IMAGES[:4], (2, 3, 2), 1.0, 2))


def test_moving_features_and_boxes_together_changes_nothing():
    features = make_features(1, 2, 9, 8, 11)
    box = torch.tensor([[2.3, 1.1, 3.2, 5.9, 4.7, 7.6]], dtype=torch.float64)
    moved = features.roll((1, 2, 3), dims=(2, 3, 4))
    pooled = roi_align3d(moved, box + torch.tensor([1.0, 2.0, 3.0] * 2), torch.tensor([0]), (2, 3, 2))
    torch.testing.assert_close(pooled, roi_align3d(features, box, torch.tensor([0]), (2, 3, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_other_dtypes_differ_from_float64_by_the_rounding_of_the_result(dtype, sampling_ratio):
    features = make_features(2, 3, 4, 5, 7, dtype=dtype)
    pooled = roi_align3d(features, BOXES, IMAGES, (2, 3, 4), 0.9, sampling_ratio)
    exact = roi_align3d(features.double(), BOXES.double(), IMAGES, (2, 3, 4), 0.9, sampling_ratio)
    assert pooled.dtype == dtype
    resolution = max(torch.finfo(dtype).eps, 4e-6)
    torch.testing.assert_close(pooled.double(), exact, rtol=resolution, atol=resolution)


def test_boxes_of_half_features_are_not_rounded():
    features = torch.arange(600.0).reshape(1, 1, 1, 1, 600).expand(1, 1, 2, 2, 600) % 4
    box = torch.tensor([[0.0, 0.0, 513.0, 1.0, 1.0, 514.0]])  # bfloat16 knows 512 and 516
    assert roi_align3d(features.bfloat16(), box, torch.tensor([0]), 1).item() == 1.0


def test_float64_features_take_boxes_in_float64():
    features = torch.arange(9.0, dtype=torch.float64).reshape(1, 1, 1, 1, 9).expand(1, 1, 2, 2, 9).contiguous()
    box = torch.tensor([[0, 0, 4 + 1e-12, 1, 1, 5 + 1e-12]], dtype=torch.float64)
    pooled = roi_align3d(features, box, torch.tensor([0]), 1, 1.0, 1)
    assert pooled.item() - 4 == pytest.approx(1e-12, rel=1e-3)


def test_half_features_accumulate_in_float32():
    features = torch.ones(1, 1, 12, 14, 16, dtype=torch.bfloat16)
    box = torch.tensor([[0.0, 0.0, 0.0, 12.0, 14.0, 16.0]])
    assert roi_align3d(features, box, torch.tensor([0]), 1).item() == 1.0
    features.requires_grad_()
    many = box.expand(1024, 6)
    roi_align3d(features, many, torch.zeros(1024, dtype=torch.int64), (12, 14, 16)).sum().backward()
    # In bfloat16 a sum of ones stops at 256.
    assert features.grad.dtype == torch.bfloat16
    assert torch.equal(features.grad, torch.full_like(features, 1024.0))


@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(0, True), (2, True), (0, False)])
def test_gradient(sampling_ratio, aligned):
    features = make_features(2, 1, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: roi_align3d(f, BOXES, IMAGES, (2, 1, 3), (0.8, 0.9, 0.7), sampling_ratio, aligned), features
    )


def test_gradient_of_the_plain_reference_is_the_registered_one():
    features = make_features(2, 2, 4, 5, 7).requires_grad_()
    weights = make_features(len(BOXES), 2, 2, 3, 2, seed=1)
    (registered,) = torch.autograd.grad((roi_align3d(features, BOXES, IMAGES, (2, 3, 2)) * weights).sum(), features)
    plain_result = reference.roi_align3d(features, BOXES, IMAGES, 2, 3, 2, 1.0, 1.0, 1.0, 0, True)
    (plain,) = torch.autograd.grad((plain_result * weights).sum(), features)
    torch.testing.assert_close(registered, plain, rtol=1e-12, atol=1e-13)


def test_boxes_get_no_gradient_and_a_second_derivative_is_refused():
    features = make_features(2, 2, 4, 5, 7).requires_grad_()
    boxes = BOXES.clone().requires_grad_()
    loss = roi_align3d(features, boxes, IMAGES, 2).square().sum()
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    assert boxes.grad is None
    with pytest.raises(NotImplementedError, match="differentiated once"):
        gradient.sum().backward()


def test_bits_do_not_depend_on_the_number_of_threads():
    features = make_features(2, 5, 6, 7, 9, dtype=torch.float32).requires_grad_()
    boxes, images = BOXES.repeat(8, 1), IMAGES.repeat(8)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            pooled = roi_align3d(features, boxes, images, (3, 2, 4))
            results.append((pooled, *torch.autograd.grad(pooled.square().sum(), features)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("num_images", "channels", "num_boxes"), [(2, 3, 0), (0, 3, 0), (2, 0, 4), (1, 1, 1)])
def test_nothing_and_one(num_images, channels, num_boxes):
    features = make_features(num_images, channels, 4, 5, 7).requires_grad_()
    boxes, images = BOXES[:num_boxes], torch.zeros(num_boxes, dtype=torch.int64)
    pooled = roi_align3d(features, boxes, images, (2, 3, 4))
    assert pooled.shape == (num_boxes, channels, 2, 3, 4)
    pooled.sum().backward()
    assert features.grad.shape == features.shape
    assert bool((features.grad == 0).all()) == (num_boxes == 0 or channels == 0)


def test_many_boxes_equal_each_alone():
    generator = torch.Generator().manual_seed(3)
    low = torch.rand(200, 3, generator=generator) * torch.tensor([4.0, 5.0, 7.0])
    boxes = torch.cat([low, low + 3 * torch.rand(200, 3, generator=generator)], 1)
    images = torch.randint(0, 2, (200,), generator=generator)
    features = make_features(2, 3, 4, 5, 7)
    together = roi_align3d(features, boxes, images, (2, 3, 2))
    for k in range(0, 200, 37):
        alone = roi_align3d(features, boxes[k : k + 1], images[k : k + 1], (2, 3, 2))
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-12, atol=1e-14)


def test_strided_inputs_and_gradients():
    features = make_features(4, 5, 7, 3, 2).permute(4, 3, 0, 1, 2)
    boxes = torch.stack([BOXES, BOXES + 1], 2)[..., 0]
    images = torch.stack([IMAGES, IMAGES + 9], 1)[:, 0]
    assert not any(tensor.is_contiguous() for tensor in (features, boxes, images))
    pooled = roi_align3d(features, boxes, images, (2, 3, 4))
    torch.testing.assert_close(pooled, roi_align3d(features.contiguous(), BOXES, IMAGES, (2, 3, 4)))
    leaf = features.detach().requires_grad_()
    weights = make_features(4, 3, 2, 3, len(BOXES)).permute(4, 1, 2, 3, 0)
    (strided,) = torch.autograd.grad(roi_align3d(leaf, boxes, images, (2, 3, 4)), leaf, weights)
    (plain,) = torch.autograd.grad(roi_align3d(leaf, boxes, images, (2, 3, 4)), leaf, weights.contiguous())
    torch.testing.assert_close(strided, plain)


def test_autocast_changes_nothing():
    features = make_features(2, 3, 4, 5, 7, dtype=torch.float32).requires_grad_()
    expected = roi_align3d(features, BOXES, IMAGES, (2, 3, 4))
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = roi_align3d(features, BOXES, IMAGES, (2, 3, 4))
        (gradient,) = torch.autograd.grad(pooled.square().sum(), features)
    assert torch.equal(pooled, expected)
    assert torch.equal(gradient, expected_gradient)


def test_the_work_of_a_huge_box_is_bounded_by_the_features():
    features = torch.ones(1, 1, 3, 4, 5)
    box = torch.tensor([[0.0, 0.0, -4e6, 3.0, 4.0, 4e6]])
    pooled = roi_align3d(features, box, torch.tensor([0]), (1, 1, 2))
    # Of the four million samples a bin, one a voxel, those at -1 .. 5 in steps of one count: half of them each side.
    assert pooled.sum().item() * 4e6 == pytest.approx(6.5, abs=1)
    assert roi_align3d(features, box * 1e28, torch.tensor([0]), 2).abs().sum().item() < 1e-20


def test_the_operator_passes_torchs_own_checks():
    features = make_features(2, 2, 3, 4, 5).requires_grad_()
    torch.library.opcheck(
        torch.ops.seg3d.roi_align3d.default, (features, BOXES, IMAGES, 2, 1, 3, 0.5, 1.0, 2.0, 0, True)
    )
    gradient = make_features(len(BOXES), 2, 2, 1, 3)
    for channels_last in (False, True):
        torch.library.opcheck(
            torch.ops.seg3d.roi_align3d_backward.default,
            (gradient, BOXES, IMAGES, 2, 3, 4, 5, 0.5, 1.0, 2.0, 0, True, channels_last),
        )


def test_channels_last_features_pass_torchs_own_checks():
    features = make_features(2, 3, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    torch.library.opcheck(
        torch.ops.seg3d.roi_align3d.default, (features, BOXES, IMAGES, 2, 1, 3, 0.5, 1.0, 2.0, 0, True)
    )


def test_exports():
    class Pool(torch.nn.Module):
        def forward(self, features, boxes, images):
            return roi_align3d(features, boxes, images, (2, 3, 2), spatial_scale=0.5)

    features = make_features(2, 3, 4, 5, 7, dtype=torch.float32)
    count = torch.export.Dim("count", min=2)
    dynamic = {"features": None, "boxes": {0: count}, "images": {0: count}}
    program = torch.export.export(Pool(), (features, BOXES, IMAGES), dynamic_shapes=dynamic)
    actual = program.module()(features, BOXES[:4], IMAGES[:4])
    torch.testing.assert_close(actual, Pool()(features, BOXES[:4], IMAGES[:4]))


def test_compiles_without_a_graph_break():
    def pool(features, boxes, images):
        return roi_align3d(features * 2, boxes, images, (2, 3, 2), spatial_scale=(0.5, 1.0, 1.0)).sum((2, 3, 4))

    features = make_features(2, 3, 4, 5, 7, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    for count in (7, 3, 5):
        expected = pool(features, BOXES[:count], IMAGES[:count])
        actual = compiled(features, BOXES[:count], IMAGES[:count])
        torch.testing.assert_close(actual, expected)
        weights = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, features, weights), torch.autograd.grad(expected, features, weights)
        )


def test_fake_tensors_have_the_shape_and_dtype_of_real_ones():
    features = torch.empty(2, 3, 4, 5, 7, dtype=torch.float16, device="meta")
    pooled = roi_align3d(features, BOXES.to("meta"), IMAGES.to("meta"), (2, 3, 4))
    assert (pooled.shape, pooled.dtype) == ((7, 3, 2, 3, 4), torch.float16)


def call_with(**changes):
    arguments = {
        "features": torch.zeros(2, 1, 4, 5, 7),
        "boxes": BOXES,
        "batch_index": IMAGES,
        "output_size": 2,
        **changes,
    }
    return roi_align3d(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": np.zeros((2, 1, 4, 5, 7))}, TypeError, "features must be a torch.Tensor .* got ndarray"),
        (
            {"features": torch.zeros(2, 1, 4, 5, 7, dtype=torch.int64)},
            TypeError,
            r"features must be .* got torch.int64",
        ),
        ({"features": torch.zeros(1, 4, 5, 7)}, ValueError, r"features must have the shape \[N, C, D, H, W\]"),
        ({"features": torch.zeros(2, 1, 4, 0, 7)}, ValueError, "D, H, W >= 1"),
        ({"features": torch.zeros(2, 1, 4, 5, 7, device="meta")}, ValueError, "move them to one device"),
        ({"boxes": BOXES[:, :4]}, ValueError, r"boxes must have the shape \[K, 6\]"),
        ({"boxes": BOXES.half()}, TypeError, "boxes must be float64 or float32, got torch.float16"),
        ({"boxes": BOXES[:3]}, ValueError, "batch_index must have one entry per box, got 7 for 3 boxes"),
        ({"boxes": BOXES.clone().index_fill_(0, torch.tensor(3), torch.nan)}, ValueError, r"boxes\[3\] = .*not finite"),
        ({"boxes": BOXES.clone().index_fill_(0, torch.tensor(2), torch.inf)}, ValueError, r"boxes\[2\] = .*not finite"),
        ({"batch_index": IMAGES.int()}, TypeError, "batch_index must be int64, got torch.int32"),
        ({"batch_index": IMAGES + 1}, ValueError, r"batch_index\[1\] = 2 is outside the batch of 2 images"),
        ({"batch_index": IMAGES - 1}, ValueError, r"batch_index\[0\] = -1 is outside"),
        ({"output_size": 0}, ValueError, "output_size must be a positive int or three"),
        ({"output_size": (2, 2)}, ValueError, "output_size must be a positive int or three"),
        ({"output_size": 2.0}, TypeError, "output_size must be an int or three ints"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be a positive float"),
        ({"spatial_scale": float("nan")}, ValueError, "spatial_scale must be a positive float"),
        ({"spatial_scale": "1"}, TypeError, "spatial_scale must be a float or three floats"),
        ({"sampling_ratio": -1}, ValueError, "sampling_ratio must be >= 0, got -1"),
        ({"sampling_ratio": 1.5}, TypeError, "sampling_ratio must be an int"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call_with(**changes)


@pytest.mark.parametrize("image", [-1, 2])
def test_the_bare_operator_refuses_a_batch_index_out_of_range(image):
    with pytest.raises((RuntimeError, ValueError), match=r"batch_index\[0\] = -?\d is outside the batch"):
        torch.ops.seg3d.roi_align3d(
            torch.zeros(2, 1, 4, 5, 7), BOXES[:1], torch.tensor([image]), 2, 2, 2, 1.0, 1.0, 1.0, 0, True
        )


def test_the_bare_operator_refuses_boxes_that_are_not_finite():
    with pytest.raises((RuntimeError, ValueError), match="boxes must be finite"):
        torch.ops.seg3d.roi_align3d(
            torch.zeros(2, 1, 4, 5, 7), BOXES[:1] / 0, IMAGES[:1], 2, 2, 2, 1.0, 1.0, 1.0, 0, True
        )
