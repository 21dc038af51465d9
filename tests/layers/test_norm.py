import pytest
import torch
from torch import nn

from seg3d_monai.layers import norm
from seg3d_monai.layers.norm import BatchNorm, CellNorm, ChannelNorm, GroupNorm, LayerNorm


@pytest.fixture(params=["operator", "torch"], autouse=True)
def way(request, monkeypatch):
    """Each test runs on the operator and on torch's own norm."""
    for name in ("LEAST_NUMBERS", "LEAST_GROUPED_NUMBERS"):
        monkeypatch.setattr(norm, name, 0 if request.param == "operator" else 2**62)
    return request.param


def names_called(module, x):
    with torch.profiler.profile() as profile:
        module(x)
    return {event.key for event in profile.key_averages()}


def norm_and_torchs(kind, channels, relu=False, eps=1e-5):
    """The module, and nn.LayerNorm with the same parameters, which are no ones and zeros."""
    torch.manual_seed(0)
    module, other = kind(channels, eps, relu), nn.LayerNorm(channels, eps)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    other.load_state_dict(module.state_dict())
    return module, other


@pytest.mark.parametrize("kind", [LayerNorm, CellNorm, ChannelNorm])
def test_parameters_are_those_of_torchs_own(kind):
    module = kind(8)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module.weight, torch.ones(8))
    assert not module.bias.any()
    assert isinstance(module, nn.LayerNorm)
    assert "relu=True" in repr(kind(8, relu=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [5, 64])
@pytest.mark.parametrize("kind", [LayerNorm, CellNorm])
def test_results_and_gradients_equal_those_of_torchs_own(kind, channels, relu, dtype):
    module, other = norm_and_torchs(kind, channels, relu, eps=1e-3)
    x = torch.randn(2, 7, channels).to(dtype).requires_grad_()
    grad = torch.randn(2, 7, channels).to(dtype)
    normed, expected = module(x), other(x)
    expected = torch.relu(expected) if relu else expected
    torch.testing.assert_close(normed, expected)
    mine = torch.autograd.grad(normed, [x, *module.parameters()], grad)
    true = torch.autograd.grad(expected, [x, *other.parameters()], grad)
    close = 1e-5 if dtype == torch.float32 else 3e-2  # of torch's own
    for one, two in zip(mine, true, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_channel_norm_looks_at_each_cell(relu, dtype):
    module, other = norm_and_torchs(ChannelNorm, 6, relu)
    volume = torch.randn(2, 6, 3, 4, 5).to(dtype).requires_grad_()
    normed = module(volume)
    expected = other(volume.movedim(1, -1)).movedim(-1, 1)
    expected = torch.relu(expected) if relu else expected
    torch.testing.assert_close(normed, expected)
    grad = torch.randn(2, 6, 3, 4, 5).to(dtype)
    mine, true = (torch.autograd.grad(result, volume, grad)[0] for result in (normed, expected))
    close = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(mine, true, rtol=close, atol=close)
    torch.testing.assert_close(module(volume[..., 1:3, 2:]), normed[..., 1:3, 2:])
    assert module(volume[:, :, :0]).shape == (2, 6, 0, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LayerNorm, CellNorm, ChannelNorm])
def test_autocast_keeps_the_dtype_of_x(kind, dtype):
    module = kind(8).double() if dtype == torch.float64 else kind(8)
    x = torch.randn(2, 8, 8, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed = module(x)
        loss = normed.float().sum()
    assert normed.dtype == dtype
    loss.backward()
    assert module.weight.grad.dtype == module.weight.dtype
    assert torch.equal(normed, module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LayerNorm, CellNorm])
def test_a_module_of_a_half_type(kind, dtype):
    module, other = norm_and_torchs(kind, 64, relu=True)
    module, other = module.to(dtype), other.to(dtype)
    x = torch.randn(9, 64).to(dtype)
    normed = module(x)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, torch.relu(other(x)))


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float64, torch.float32, torch.bfloat16])
def test_cell_norm_answers_in_the_dtype_of_x_whatever_its_parameters(given, parameters):
    module = CellNorm(8).to(parameters)
    assert module(torch.randn(3, 8).to(given)).dtype == given


def test_other_devices_run_torchs_own():
    module = LayerNorm(8, relu=True).to("meta")
    names = names_called(module, torch.empty(3, 8, device="meta"))
    assert {"aten::layer_norm", "aten::relu"} <= names
    assert not any("seg3d" in name for name in names)


@pytest.mark.parametrize("kind", [LayerNorm, CellNorm])
def test_cpus_run_the_operator_where_it_is_faster(kind, monkeypatch):
    monkeypatch.undo()
    large = torch.zeros(norm.LEAST_NUMBERS // 8, 8, dtype=torch.bfloat16)
    for x, runs_operator in ((large, True), (large[1:], False), (large.float(), False), (large.half(), False)):
        names = names_called(kind(8), x)
        assert ("seg3d::layer_norm" in names) == runs_operator
        assert ("aten::layer_norm" in names) != runs_operator


def test_a_traced_graph_holds_the_operator_for_all_sizes(way):
    module = LayerNorm(8)
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(module, (torch.randn(4, 8).bfloat16(),), dynamic_shapes=({0: rows},))
    assert "seg3d.layer_norm" in program.graph_module.code
    x = torch.randn(20, 8).bfloat16()
    torch.testing.assert_close(program.module()(x), module(x))


def group_norm_and_torchs(groups, channels, relu=False):
    """The module, and nn.GroupNorm with the same parameters, which are no ones and zeros."""
    torch.manual_seed(0)
    module, other = GroupNorm(groups, channels, eps=1e-3, relu=relu), nn.GroupNorm(groups, channels, eps=1e-3)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    other.load_state_dict(module.state_dict())
    return module, other


def test_parameters_of_group_norm_are_those_of_torchs_own():
    module = GroupNorm(2, 8, relu=True)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module.weight, torch.ones(8))
    assert not module.bias.any()
    assert isinstance(module, nn.GroupNorm)
    assert "relu=True" in repr(module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [(3, 4, 5), (1, 9), ()])
def test_group_norm_equals_torchs_own(size, relu, dtype):
    module, other = group_norm_and_torchs(2, 6, relu)
    if dtype == torch.float64:
        module, other = module.double(), other.double()
    x, grad = torch.randn(2, 2, 6, *size).to(dtype).unbind()
    x.requires_grad_()
    normed, expected = module(x), other(x)
    expected = torch.relu(expected) if relu else expected
    torch.testing.assert_close(normed, expected)
    mine = torch.autograd.grad(normed, [x, *module.parameters()], grad)
    true = torch.autograd.grad(expected, [x, *other.parameters()], grad)
    close = 1e-5 if dtype in (torch.float64, torch.float32) else 3e-2  # of torch's own
    for one, two in zip(mine, true, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_group_norm_of_a_half_type(dtype):
    module, other = (each.to(dtype) for each in group_norm_and_torchs(2, 6, relu=True))
    x = torch.randn(2, 6, 50).to(dtype)
    normed = module(x)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, torch.relu(other(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_keeps_the_dtype_of_x_under_autocast(dtype):
    module, x = GroupNorm(2, 8, relu=True), torch.randn(2, 8, 8, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed = module(x)
    assert normed.dtype == dtype
    assert torch.equal(normed, module(x))


def test_group_norm_leaves_x_as_it_is():
    x = torch.randn(2, 8, 30)
    given = x.clone()
    GroupNorm(2, 8, relu=True)(x)
    assert torch.equal(x, given)


def test_group_norm_on_other_devices_is_torchs_own():
    names = names_called(GroupNorm(2, 8, relu=True).to("meta"), torch.empty(3, 8, 5, device="meta"))
    assert {"aten::group_norm", "aten::relu_"} <= names
    assert not any("seg3d" in name for name in names)


@pytest.mark.parametrize("relu", [False, True])
def test_cpus_run_the_group_norm_operator_where_it_is_faster(relu, monkeypatch):
    monkeypatch.undo()
    large = torch.zeros(1, 8, norm.LEAST_GROUPED_NUMBERS // 8, 1, 1, dtype=torch.bfloat16)
    cases = (
        (large, True),
        (large[:, :, 1:].contiguous(), False),
        (large.float(), relu),
        (large.half(), False),
        (large.to(memory_format=torch.channels_last_3d), False),
    )
    for x, runs_operator in cases:
        names = names_called(GroupNorm(2, 8, relu=relu), x)
        assert ("seg3d::group_norm" in names) == runs_operator
        assert ("aten::group_norm" in names) != runs_operator


def test_a_traced_graph_holds_the_group_norm_operator_for_all_sizes():
    module = GroupNorm(2, 8, relu=True)
    cells = torch.export.Dim("cells", min=2)
    x = torch.randn(2, 8, 20).bfloat16()
    program = torch.export.export(module, (x[..., :4].contiguous(),), dynamic_shapes=({2: cells},))
    assert "seg3d.group_norm" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_equals_torchs_own(relu, dtype):
    torch.manual_seed(0)
    module, other = BatchNorm(5, relu=relu), nn.BatchNorm3d(5, momentum=0.02)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 3, 4, 6).to(dtype).requires_grad_()
    for is_training in (True, False):
        normed, expected = module.train(is_training)(x), other.train(is_training)(x)
        expected = torch.relu(expected) if relu else expected
        torch.testing.assert_close(normed, expected)
        grad = torch.randn(2, 5, 3, 4, 6).to(dtype)
        mine = torch.autograd.grad(normed, [x, *module.parameters()], grad)
        true = torch.autograd.grad(expected, [x, *other.parameters()], grad)
        torch.testing.assert_close(mine, true)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(module, name), getattr(other, name))


def test_batch_norm_takes_weights_of_a_half_type():
    module, other = BatchNorm(5), nn.BatchNorm3d(5, momentum=0.02)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    x = torch.randn(2, 5, 3, 4, 6).bfloat16()
    normed = module(x)
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed, other(x))
    torch.testing.assert_close(module.running_var, other.running_var)
    normed.float().square().sum().backward()
    assert module.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 2), (1, 3, 1, 1, 1)])
def test_batch_norm_of_too_few_numbers_is_that_of_a_prediction(shape):
    module = BatchNorm(3, relu=True)
    module.running_mean[:] = torch.tensor([1.0, -2.0, 0.5])
    x = torch.ones(shape)
    normed = module(x)
    assert normed.shape == shape
    torch.testing.assert_close(normed.flatten().tolist(), [0.0, 3.0, 0.5] if len(x) else [], atol=1e-4, rtol=1e-4)
    assert module.running_mean.tolist() == [1.0, -2.0, 0.5]
    normed.sum().backward()
    assert module.weight.grad is not None
