"""Mask2Former decoder: which cells a query reads, order of levels, query selection, padding, gradients."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seg3d_monai.decoders import Mask2FormerDecoder
from seg3d_monai.heads import DeformablePixelDecoder
from seg3d_monai.layers import PLACE_CHANNELS, PixelDecoderOutput, pool_to_levels, sine_positions

SIZE = (5, 18, 26)
STRIDES = [(1, 4, 4), (2, 8, 8), (4, 8, 16)]
MASK_STRIDE = (1, 2, 2)
CHANNELS, MASK_CHANNELS, IMAGES = 16, 6, 2


def cells(stride):
    return tuple(-(-n // s) for n, s in zip(SIZE, stride, strict=True))


def decoded(num_levels=3, valid=None, seed=0):
    """Random memory and mask features; `valid`, [N, 3] voxels, makes the rest padding."""
    torch.manual_seed(seed)
    strides = STRIDES[:num_levels]
    memory = [torch.randn(IMAGES, CHANNELS, *cells(stride)) for stride in strides]
    masks = torch.randn(IMAGES, MASK_CHANNELS + PLACE_CHANNELS, *cells(MASK_STRIDE))
    padding = None
    if valid is not None:
        *padding, fine = (
            torch.stack([~torch.isin(torch.arange(np.prod(cells(s))), inside(image, s)) for image in valid])
            for s in [*strides, MASK_STRIDE]
        )
        padding = [p.view(IMAGES, *cells(s)) for p, s in zip(padding, strides, strict=True)]
        masks = masks.masked_fill(fine.view(IMAGES, 1, *cells(MASK_STRIDE)), 0)
    return PixelDecoderOutput(memory, [cells(s) for s in strides], strides, padding, masks, MASK_STRIDE)


def inside(valid, stride):
    """Flat numbers of the cells that begin in the valid part."""
    grid = np.stack(np.meshgrid(*map(np.arange, cells(stride)), indexing="ij"), -1).reshape(-1, 3)
    return torch.from_numpy(np.flatnonzero((grid * np.array(stride) < np.array(valid)).all(1)))


def build(num_levels=3, seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {"num_classes": 2, "num_queries": 5, "num_layers": 4, "num_heads": 4, "feedforward": 24}
    return Mask2FormerDecoder(
        channels=CHANNELS, mask_channels=MASK_CHANNELS, num_levels=num_levels, **(arguments | changes)
    )


def mask_of(embed, features, size, stride):
    """Of one query: whether the mean mask logit over a cell's part of the image is negative, cell by cell [d, h, w]."""
    logits = np.einsum("c,czyx->zyx", embed.detach().double().numpy(), features.double().numpy())
    ratio = [s // m for s, m in zip(stride, MASK_STRIDE, strict=True)]
    outside = np.zeros(size, dtype=bool)
    for cell in np.ndindex(*size):
        part = tuple(slice(c * r, (c + 1) * r) for c, r in zip(cell, ratio, strict=True))
        outside[cell] = logits[part].mean() < 0
    return torch.from_numpy(outside)


@pytest.mark.parametrize("source", ["learned", "selected"])
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_names_and_shapes(source, num_levels):
    outputs = build(num_levels, query_source=source)(given := decoded(num_levels))
    names = ["initial", "1", "2", "3", "4"]
    assert outputs["names"] == (["encoder", *names] if source == "selected" else names)
    assert outputs["class_logits"].shape == (len(outputs["names"]), IMAGES, 5, 3)
    assert outputs["mask_embeds"].shape == (len(outputs["names"]), IMAGES, 5, MASK_CHANNELS + PLACE_CHANNELS)
    assert outputs["mask_features"] is given.mask_features
    assert outputs["mask_stride"] == MASK_STRIDE


def test_levels_are_visited_in_turn_coarsest_first():
    decoder, seen = build(num_layers=7), []
    for layer in decoder.layers:
        layer.cross_attention.register_forward_hook(lambda _, inputs, __: seen.append(inputs[2].shape[1]))
    decoder(decoded())
    fine, middle, coarse = (np.prod(cells(stride)) for stride in STRIDES)
    assert seen == [coarse, middle, fine, coarse, middle, fine, coarse]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_query_reads_the_memory_inside_its_last_mask_only(level):
    # One query, which hears of nothing but what it reads; the last layer reads `level`.
    number = 3 - level
    decoder = build(num_queries=1, num_layers=number)
    given = decoded()
    wanted = decoder(given)
    last_mask = wanted["mask_embeds"][number - 1, :, 0]
    outside = torch.stack(
        [
            mask_of(embed, features, given.sizes[level], given.strides[level])
            for embed, features in zip(last_mask, given.mask_features, strict=True)
        ]
    )
    assert outside.any((1, 2, 3)).all()
    assert not outside.all((1, 2, 3)).any()
    memory = list(given.memory)
    memory[level] = memory[level].masked_fill(outside[:, None], 1e4)
    given = given._replace(memory=memory)
    found = decoder(given)
    assert torch.equal(found["class_logits"], wanted["class_logits"])
    assert torch.equal(found["mask_embeds"], wanted["mask_embeds"])
    for n in range(IMAGES):
        z, y, x = (~outside[n]).nonzero()[0]
        memory[level] = memory[level].clone()
        memory[level][n, :, z, y, x] += 3
    changed = decoder(given)["class_logits"]
    assert torch.equal(changed[:number], wanted["class_logits"][:number])
    assert not torch.isclose(changed[number], wanted["class_logits"][number]).all(-1).any()


def test_a_query_with_an_empty_mask_reads_everywhere():
    decoder, given = build(num_queries=1, num_layers=1), decoded()
    embed = decoder(given)["mask_embeds"][0, 0, 0].detach()
    given = given._replace(mask_features=-embed[:, None, None, None].expand_as(given.mask_features))
    found = decoder(given)
    everywhere = embed[:, None, None, None].expand_as(given.mask_features)  # a mask of the whole image
    given = given._replace(mask_features=everywhere)
    torch.testing.assert_close(found["class_logits"], decoder(given)["class_logits"])
    given = given._replace(memory=[m.clone() for m in given.memory])
    given.memory[2][:, :, -1, -1, -1] += 3
    assert not torch.isclose(found["class_logits"][1], decoder(given)["class_logits"][1]).any()


VALID = [(5, 18, 26), (3, 7, 11)]


@pytest.mark.parametrize("source", ["learned", "selected"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_padding_is_not_read(source, is_empty):
    decoder, given = build(query_source=source, num_queries=3), decoded(valid=VALID)
    if is_empty:  # zeros forbid nothing, also not in the padding
        given = given._replace(mask_features=torch.zeros_like(given.mask_features))
    wanted = decoder(given)
    memory = [m.masked_fill(p[:, None], 1e4) for m, p in zip(given.memory, given.padding, strict=True)]
    found = decoder(given._replace(memory=memory))
    assert torch.equal(found["class_logits"], wanted["class_logits"])
    assert torch.equal(found["mask_embeds"], wanted["mask_embeds"])


def test_mask_features_are_averaged_over_the_cells_of_each_level():
    torch.manual_seed(0)
    features = torch.randn(2, 3, *cells(MASK_STRIDE), dtype=torch.float64)
    pooled = pool_to_levels(features, [MASK_STRIDE, *STRIDES])
    for found, stride in zip(pooled, STRIDES, strict=True):
        assert found.shape == (2, 3, *cells(stride))
        ratio = [s // m for s, m in zip(stride, MASK_STRIDE, strict=True)]
        for cell in np.ndindex(*cells(stride)):
            part = features[:, :, *(slice(c * r, (c + 1) * r) for c, r in zip(cell, ratio, strict=True))]
            # Zeros stand for what the border cuts off.
            torch.testing.assert_close(found[:, :, *cell], part.sum((2, 3, 4)) / np.prod(ratio))
    assert [p.dtype for p in pool_to_levels(features.bfloat16(), [MASK_STRIDE, *STRIDES])] == [torch.float32] * 3


def test_permuting_queries_permutes_predictions():
    decoder, given, order = build().double(), decoded(), torch.tensor([3, 0, 4, 1, 2])
    memory = [m.double() for m in given.memory]
    given = given._replace(memory=memory, mask_features=given.mask_features.double())
    wanted = decoder(given)
    with torch.no_grad():
        decoder.content.copy_(decoder.content[order])
        decoder.positions.copy_(decoder.positions[order])
    found = decoder(given)
    for name in ("class_logits", "mask_embeds"):
        torch.testing.assert_close(found[name], wanted[name][:, :, order])


def test_images_of_a_batch_are_independent():
    for source in ("learned", "selected"):
        decoder, both = build(query_source=source), decoded()
        wanted = decoder(both)["class_logits"]
        for n in range(IMAGES):
            memory = [m[n : n + 1] for m in both.memory]
            one = both._replace(memory=memory, mask_features=both.mask_features[n : n + 1])
            found = decoder(one)["class_logits"]
            torch.testing.assert_close(found, wanted[:, n : n + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("valid", [None, VALID])
def test_the_encoder_predicts_with_the_selected_cells(valid):
    decoder, given = build(query_source="selected"), decoded(valid=valid)
    selected, positions, (logits, embeds) = decoder.selection(given)
    every_centre = given.centres.expand(IMAGES, -1, -1)
    tokens = decoder.selection.selection.project(given.flat_memory)
    every_logit, every_embed = (x.detach() for x in decoder.selection.head(tokens, every_centre))
    for n in range(IMAGES):
        rows = [given.centres.tolist().index(centre) for centre in selected.centres[n].tolist()]
        torch.testing.assert_close(selected.tokens[n], tokens[n, rows])
        torch.testing.assert_close(logits[n], every_logit[n, rows])
        torch.testing.assert_close(embeds[n], every_embed[n, rows])
        wanted = decoder.selection.positions(sine_positions(selected.centres[n], CHANNELS))
        torch.testing.assert_close(positions[n], wanted)
        assert valid is None or not given.flat_padding[n, rows].any()
    outputs = decoder(given)
    torch.testing.assert_close(outputs["class_logits"][0], logits)
    torch.testing.assert_close(outputs["mask_embeds"][0], embeds)
    assert torch.equal(outputs["tokens"]["class_logits"], selected.scored["class_logits"])


def test_a_memory_of_fewer_cells_than_queries_gives_as_many_queries_as_cells():
    decoder = build(1, query_source="selected", num_queries=500)
    given = decoded(1)
    count = int(np.prod(cells(STRIDES[0])))
    assert decoder(given)["class_logits"].shape == (6, IMAGES, count, 3)
    # Of one valid cell an image, all queries.
    given = decoded(1, valid=[(1, 3, 4), (5, 18, 26)])
    _, positions, (logits, _) = decoder.selection(given)
    assert logits.shape == (IMAGES, count, 3)
    assert torch.equal(positions[0], positions[0, :1].expand(count, -1))
    assert len(positions[1].unique(dim=0)) == count
    # The learned queries are always all there.
    assert build(1, num_queries=500)(given)["class_logits"].shape == (5, IMAGES, 500, 3)


@pytest.mark.parametrize("source", ["learned", "selected"])
@pytest.mark.parametrize("halved", [False, True])
def test_gradient_reaches_every_parameter_and_the_memory(source, halved):
    decoder, given = build(query_source=source), decoded()
    for memory in given.memory:
        memory.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=halved):
        outputs = decoder(given)
    scores = outputs["tokens"]["class_logits"] if "tokens" in outputs else torch.zeros(1)
    (outputs["class_logits"].pow(3).mean() + outputs["mask_embeds"].pow(3).mean() + scores.mean()).backward()
    # Adding one vector to all keys changes no softmax: its gradient is zero but for rounding.
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []
    idle = [name for name, p in decoder.named_parameters() if not p.grad.any() and not name.endswith("key.bias")]
    assert idle == []
    assert all(memory.grad.any() for memory in given.memory)


def test_the_decoder_does_not_disturb_the_selected_content():
    decoder, given = build(query_source="selected"), decoded()
    outputs = decoder(given)
    outputs["class_logits"][1:].sum().backward()
    assert not any(p.grad.any() for p in decoder.selection.selection.project.parameters())
    assert all(p.grad.any() for p in decoder.selection.positions.parameters())


@pytest.mark.parametrize("source", ["learned", "selected"])
def test_predictions_are_float32_under_autocast(source):
    decoder, given = build(query_source=source), decoded()
    wanted = decoder(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder(given)
    for name in ("class_logits", "mask_embeds"):
        assert found[name].dtype == torch.float32
        assert found[name].isfinite().all()
    # Later layers may see a cell on the other side of a mask's border.
    torch.testing.assert_close(found["class_logits"][0], wanted["class_logits"][0], atol=0.05, rtol=0.05)


class Called(TorchDispatchMode):
    """Records the names of the operators that run, and whether one of them takes a mask as an index."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ == "index":
            assert not any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["learned", "selected"])
def test_the_forward_pass_waits_for_no_value(source):
    """On a GPU each such operator would wait for all the work before it."""
    levels = {"c1": MASK_STRIDE} | {f"c{i}": stride for i, stride in enumerate(STRIDES, 2)}
    pixel_decoder = DeformablePixelDecoder(
        channels=dict.fromkeys(levels, 3),
        strides=levels,
        memory_levels=["c2", "c3", "c4"],
        mask_levels=["c1"],
        hidden=CHANNELS,
        mask_channels=MASK_CHANNELS,
        num_layers=1,
        feedforward=8,
    )
    decoder = build(query_source=source)
    features = {level: torch.randn(IMAGES, 3, *cells(stride)) for level, stride in levels.items()}
    valid = torch.tensor(VALID)
    decoder(pixel_decoder(features, valid))  # sizes seen before are not built again
    with Called() as called:
        decoder(pixel_decoder(features, valid))
    assert {"ms_deform_attn3d", "addmm", "native_layer_norm"} <= called.names
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "unique_dim"}
    assert not waiting & called.names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_source": "random"}, "query_source is 'random'; choose 'learned' or 'selected'"),
        ({"num_queries": 0}, "num_queries is 0; give at least 1"),
        ({"num_layers": 0}, "num_layers is 0; give at least 1"),
        ({"num_heads": 3}, "channels 16 is no multiple of num_heads 3"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_another_number_of_levels_is_named():
    with pytest.raises(ValueError, match="the memory has 2 levels"):
        build()(decoded(2))
