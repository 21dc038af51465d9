"""Attention blocks against torch's MultiheadAttention and the formulas; masks."""

import math

import pytest
import torch
from torch import nn

from seg3d_monai.layers import CrossAttention, FeedForward, SelfAttention

CHANNELS, HEADS = 12, 3


def oracle(attention):
    """The same weights in torch's own module, which takes masks that are True where attention is forbidden."""
    other = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True, dtype=torch.float64)
    parts = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        other.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        other.out_proj.weight.copy_(attention.output.weight)
        other.out_proj.bias.copy_(attention.output.bias)
    return other


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def cross():
    module = randomised(CrossAttention(channels=CHANNELS, num_heads=HEADS))
    tensors = [torch.randn(2, length, CHANNELS, dtype=torch.float64) for length in (5, 5, 7, 7)]
    return module, tensors


def normed(module, x):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * module.norm.weight + module.norm.bias


@pytest.mark.parametrize("rows", ["none", "shared", "own"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_cross_attention_is_torchs(rows, is_padded):
    module, (queries, positions, memory, memory_positions) = cross()
    forbidden = {"none": None, "shared": torch.rand(5, 7) < 0.5, "own": torch.rand(2, 5, 7) < 0.5}[rows]
    padding = torch.arange(7) >= torch.tensor([[7], [4]]) if is_padded else None
    if forbidden is not None:
        forbidden[..., 0] = False  # a softmax over nothing has no oracle; see below
    mask = forbidden.repeat_interleave(HEADS, 0) if rows == "own" else forbidden
    wanted, _ = oracle(module.attention)(
        queries + positions, memory + memory_positions, memory, key_padding_mask=padding, attn_mask=mask
    )
    found = module(queries, positions, memory, memory_positions, forbidden, padding)
    torch.testing.assert_close(found, normed(module, queries + wanted))


def test_self_attention_is_torchs():
    module = randomised(SelfAttention(channels=CHANNELS, num_heads=HEADS))
    queries, positions = torch.randn(2, 2, 5, CHANNELS, dtype=torch.float64)
    forbidden = torch.rand(5, 5) < 0.4
    forbidden.fill_diagonal_(False)
    placed = queries + positions
    for mask in (None, forbidden):
        wanted, _ = oracle(module.attention)(placed, placed, queries, attn_mask=mask)
        torch.testing.assert_close(module(queries, positions, mask), normed(module, queries + wanted))


def test_feed_forward_is_the_formula():
    module = randomised(FeedForward(channels=CHANNELS, hidden=20))
    x = torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    hidden = (x @ module.expand.weight.T + module.expand.bias).clamp(min=0)
    torch.testing.assert_close(module(x), normed(module, x + hidden @ module.reduce.weight.T + module.reduce.bias))


def test_a_query_reads_allowed_keys_only():
    module, (queries, positions, memory, memory_positions) = cross()
    forbidden = torch.zeros(2, 5, 7, dtype=torch.bool)
    forbidden[0, 2, [1, 4]] = True
    forbidden[1, :, 6] = True
    wanted = module(queries, positions, memory, memory_positions, forbidden)
    spoiled = memory.clone()
    spoiled[0, [1, 4]] = spoiled[1, 6] = 1e6
    found = module(queries, positions, spoiled, memory_positions, forbidden)
    assert torch.equal(found[0, 2], wanted[0, 2])
    assert torch.equal(found[1], wanted[1])
    assert not torch.isclose(found[0, [0, 1, 3, 4]], wanted[0, [0, 1, 3, 4]]).all(-1).any()


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_query_that_may_read_nothing_reads_all_but_padding(is_padded):
    module, (queries, positions, memory, memory_positions) = cross()
    padding = torch.arange(7) >= torch.tensor([[3], [6]]) if is_padded else None
    forbidden = torch.zeros(2, 5, 7, dtype=torch.bool)
    forbidden[0, 1] = True
    forbidden[1, 4, :6] = True  # allows what is padding only
    free = module(queries, positions, memory, memory_positions, None, padding)
    found = module(queries, positions, memory, memory_positions, forbidden, padding)
    torch.testing.assert_close(found[0], free[0])
    torch.testing.assert_close(found[1, :4], free[1, :4])
    if is_padded:
        torch.testing.assert_close(found[1, 4], free[1, 4])
        spoiled = memory.masked_fill(padding[..., None], 1e6)
        assert torch.equal(module(queries, positions, spoiled, memory_positions, forbidden, padding), found)


def test_an_image_of_padding_alone_stays_finite():
    module, (queries, positions, memory, memory_positions) = cross()
    padding = torch.tensor([[True], [False]]).expand(2, 7)
    for forbidden in (None, torch.ones(2, 5, 7, dtype=torch.bool)):
        assert module(queries, positions, memory, memory_positions, forbidden, padding).isfinite().all()


def test_masks_change_nothing_where_they_forbid_nothing_and_positions_may_be_shared():
    module, (queries, positions, memory, memory_positions) = cross()
    shared = memory_positions[:1].expand(2, -1, -1)
    wanted = module(queries, positions, memory, shared)
    nothing = torch.zeros(2, 5, 7, dtype=torch.bool)
    torch.testing.assert_close(module(queries, positions, memory, shared[0], nothing, nothing[:, 0]), wanted)


def test_permuting_queries_permutes_results():
    module, (queries, positions, memory, memory_positions) = cross()
    forbidden, order = torch.rand(2, 5, 7) < 0.5, torch.tensor([3, 0, 4, 1, 2])
    wanted = module(queries, positions, memory, memory_positions, forbidden)[:, order]
    found = module(queries[:, order], positions[:, order], memory, memory_positions, forbidden[:, order])
    torch.testing.assert_close(found, wanted)


def test_no_query():
    module, (queries, positions, memory, memory_positions) = cross()
    forbidden = torch.zeros(2, 0, 7, dtype=torch.bool)
    assert module(queries[:, :0], positions[:, :0], memory, memory_positions, forbidden).shape == (2, 0, CHANNELS)
    alone = randomised(SelfAttention(channels=CHANNELS, num_heads=HEADS))
    assert alone(queries[:, :0], positions[:, :0]).shape == (2, 0, CHANNELS)


def test_gradient_reaches_every_parameter():
    module, tensors = cross()
    forbidden = torch.rand(2, 5, 7) < 0.5
    module(*tensors, forbidden).pow(3).sum().backward()
    # Adding one vector to all keys changes no softmax.
    idle = [name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert idle in ([], ["attention.key.bias"])


def test_large_values_under_autocast():
    module = CrossAttention(channels=CHANNELS, num_heads=HEADS)
    tensors = [torch.randn(2, length, CHANNELS) * 30 for length in (5, 5, 7, 7)]
    forbidden = torch.rand(2, 5, 7) < 0.7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(*tensors, forbidden).detach()
    assert found.isfinite().all()
    assert math.isclose(float(found.std()), 1.0, rel_tol=0.1)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="channels 10 is no multiple of num_heads 4"):
        SelfAttention(channels=10, num_heads=4)
