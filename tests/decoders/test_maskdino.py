"""Mask DINO's decoder: what it returns, what reaches what, and how boxes go from layer to layer."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from seg3d_monai.decoders import Denoising, MaskDINODecoder
from seg3d_monai.decoders.query_selection import mask_boxes
from seg3d_monai.layers import PLACE_CHANNELS, PixelDecoderOutput, pool_to_levels
from seg3d_monai.layers.place_kernel import encode_places

# An image of 6 x 10 x 14 voxels in two levels; mask features at the stride of the first.
SIZES = [(6, 5, 7), (3, 3, 4)]
STRIDES = [(1, 2, 2), (2, 4, 4)]
CHANNELS, MASK_CHANNELS, CLASSES, QUERIES, LAYERS = 16, 6, 3, 9, 2
ALL_MASK_CHANNELS = MASK_CHANNELS + PLACE_CHANNELS


def make_decoded(images=2, seed=0, padding=None, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    memory = [torch.randn(images, CHANNELS, *size, generator=generator) for size in SIZES]
    mask_features = torch.randn(images, ALL_MASK_CHANNELS, *SIZES[0], generator=generator)
    for tensor in (*memory, mask_features):
        tensor.requires_grad_(requires_grad)
    return PixelDecoderOutput(
        memory=memory,
        sizes=list(SIZES),
        strides=list(STRIDES),
        padding=padding,
        mask_features=mask_features,
        mask_stride=STRIDES[0],
    )


def make_target(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lower = torch.rand(count, 3, generator=generator) * torch.tensor([3.0, 6, 9])
    upper = lower + torch.rand(count, 3, generator=generator) * torch.tensor([2.0, 3, 4]) + 1
    return {
        "boxes": torch.cat([lower, upper], 1),
        "classes": torch.randint(CLASSES, (count,), generator=generator),
    }


def make(seed=0, scramble=True, **settings):
    """A decoder; scrambled, all weights are random, also those that start at zero, as after some training."""
    torch.manual_seed(seed)
    arguments = {
        "channels": CHANNELS,
        "mask_channels": MASK_CHANNELS,
        "num_classes": CLASSES,
        "num_queries": QUERIES,
        "num_layers": LAYERS,
        "num_heads": 4,
        "num_points": 2,
        "feedforward": 24,
        "num_levels": 2,
        "content_queries": "selected",
        "denoising": Denoising(num_queries=12),
    }
    decoder = MaskDINODecoder(**(arguments | settings))
    if scramble:
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return decoder


PREDICTIONS = ("class_logits", "mask_embeds", "boxes")


@pytest.mark.parametrize("content_queries", ["learned", "selected"])
def test_what_comes_out_in_training(content_queries):
    decoded = make_decoded()
    outputs = make(content_queries=content_queries)(decoded, [make_target(2), make_target(3)])
    names = ["encoder", "initial", "1", "2"] if content_queries == "selected" else ["encoder", "1", "2"]
    assert outputs["names"] == names
    assert outputs["class_logits"].shape == (len(names), 2, QUERIES, CLASSES)
    assert outputs["mask_embeds"].shape == (len(names), 2, QUERIES, ALL_MASK_CHANNELS)
    assert outputs["boxes"].shape == (len(names), 2, QUERIES, 6)
    assert outputs["mask_features"] is decoded.mask_features
    assert outputs["mask_stride"] == (1, 2, 2)
    denoising = outputs["denoising"]
    assert denoising["target_index"].tolist() == [[0, 1, -2, -1, -1, -2] * 2, [0, 1, 2, -1, -1, -1] * 2]
    assert denoising["class_logits"].shape == (LAYERS, 2, 12, CLASSES)
    assert denoising["mask_embeds"].shape == (LAYERS, 2, 12, ALL_MASK_CHANNELS)
    assert denoising["boxes"].shape == (LAYERS, 2, 12, 6)
    for part in (outputs, denoising):
        for key in PREDICTIONS:
            assert part[key].dtype == torch.float32
            assert part[key].isfinite().all()


@pytest.mark.parametrize("mode", ["evaluation", "no denoising", "no instance"])
def test_without_denoising_part(mode):
    decoder = make(denoising=None if mode == "no denoising" else Denoising()).train(mode != "evaluation")
    targets = None if mode == "evaluation" else [make_target(0), make_target(0)]
    outputs = decoder(make_decoded(), targets)
    assert set(outputs) == {"names", *PREDICTIONS, "mask_features", "mask_stride", "tokens"}
    assert outputs["boxes"].shape == (4, 2, QUERIES, 6)


def test_evaluation_does_not_look_at_targets_and_draws_nothing():
    decoder = make().eval()
    state = torch.get_rng_state()
    with_targets = decoder(make_decoded(), [make_target(2), make_target(3)])
    assert torch.equal(torch.get_rng_state(), state)
    without = decoder(make_decoded())
    assert all(torch.equal(with_targets[key], without[key]) for key in PREDICTIONS)
    assert "denoising" not in with_targets


def test_training_without_targets_is_refused():
    with pytest.raises(ValueError, match="targets is None in training mode"):
        make()(make_decoded())
    assert make(denoising=None)(make_decoded())["names"][-1] == "2"


@pytest.mark.parametrize("counts", [(0, 1, 300), (300, 300, 0), (1, 1, 1)])
def test_any_number_of_instances(counts):
    decoder = make(denoising=Denoising(num_queries=20, max_queries=100))
    outputs = decoder(make_decoded(images=3), [make_target(count, seed=count) for count in counts])
    index = outputs["denoising"]["target_index"]
    for n, count in enumerate(counts):
        shown = index[n][index[n] >= 0]
        groups = 10 if max(counts) == 1 else 1
        assert len(shown) == min(count, 50) * groups
        assert (index[n] == -1).sum() == len(shown)
    for part in (outputs, outputs["denoising"]):
        assert all(part[key].isfinite().all() for key in PREDICTIONS)
        assert (part["boxes"][..., 3:] > part["boxes"][..., :3]).all()


def everything(outputs):
    """A sum over all that is returned, whose derivative is no constant."""
    total = torch.zeros(())
    for part in (outputs, outputs.get("denoising", {})):
        total = total + sum((part[key].sin() * 1.3).sum() for key in PREDICTIONS if key in part)
    return total


@pytest.mark.parametrize("content_queries", ["learned", "selected"])
@pytest.mark.parametrize("counts", [(2, 3), (0, 0)])
def test_every_parameter_has_a_gradient(content_queries, counts):
    decoder = make(content_queries=content_queries, anchor_cells=1.0)
    decoded = make_decoded(requires_grad=True)
    everything(decoder(decoded, [make_target(count) for count in counts])).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Without an instance the label embedding takes part with a zero, which DDP wants.
        if name == "label_embedding.weight" and counts == (0, 0):
            assert not parameter.grad.any()
        else:
            assert parameter.grad.any(), name
    assert all(level.grad.any() for level in decoded.memory)


def test_every_parameter_has_a_gradient_under_autocast():
    decoder = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = decoder(make_decoded(), [make_target(2), make_target(3)])
    assert all(outputs[key].dtype == outputs["denoising"][key].dtype == torch.float32 for key in PREDICTIONS)
    everything(outputs).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in decoder.parameters())


@pytest.mark.parametrize("box_from_mask", [True, False])
def test_no_gradient_goes_through_the_first_boxes_and_contents(box_from_mask):
    decoder = make(denoising=None, box_from_mask=box_from_mask)
    outputs = decoder(make_decoded())
    sum(outputs[key][2:].sin().sum() for key in PREDICTIONS).backward()
    assert not any(parameter.grad.any() for parameter in decoder.selection.parameters())


def test_a_box_trains_its_own_layer_and_the_one_before():
    decoder = make(num_layers=3, denoising=None)
    for layer in decoder.layers:
        # With the content cut between layers, only the box can carry a gradient from one to another.
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
    outputs = decoder(make_decoded())
    biases = [layer.feed_forward.reduce.bias for layer in decoder.layers]
    for number, reached in ((1, [True, False, False]), (2, [True, True, False]), (3, [False, True, True])):
        box = outputs["boxes"][1 + number].sin().sum()
        gradients = torch.autograd.grad(box, biases, retain_graph=True)
        assert [bool(gradient.any()) for gradient in gradients] == reached


# -- denoising

BATCH = (2, 3)


def run(decoder, targets, seed=7):
    torch.manual_seed(seed)
    return decoder(make_decoded(), targets)


def test_matching_queries_do_not_see_denoising_queries():
    decoder = make()
    targets = [make_target(count, seed=count) for count in BATCH]
    outputs = run(decoder, targets)
    for others in (
        run(decoder, targets, seed=8),  # other noise
        run(decoder, [make_target(count, seed=count + 50) for count in BATCH]),  # other instances
        run(decoder, [make_target(3, seed=1), make_target(0)]),  # other numbers of them
    ):
        assert not torch.equal(others["denoising"]["class_logits"], outputs["denoising"]["class_logits"])
        for key in PREDICTIONS:
            assert torch.equal(others[key], outputs[key])


def test_matching_queries_are_those_of_a_decoder_without_denoising():
    outputs = run(make(), [make_target(count) for count in BATCH])
    plain = make(denoising=None)
    plain.load_state_dict({k: v for k, v in make().state_dict().items() if k != "label_embedding.weight"})
    for key, values in run(plain, None).items():
        if key in PREDICTIONS:
            torch.testing.assert_close(outputs[key], values)


def test_groups_do_not_see_each_other_and_nobody_sees_padding():
    """The gradient of one denoising query's class reaches its own group's content alone, and no padding."""

    class Watched(Denoising):
        def __call__(self, *arguments):
            self.queries = super().__call__(*arguments)
            self.queries.content.retain_grad()
            return self.queries

    watched = Watched(num_queries=12)
    decoder = make(denoising=watched)
    for n, t in [(0, 0), (0, 7), (1, 4), (1, 11)]:
        outputs = run(decoder, [make_target(count) for count in BATCH])
        outputs["denoising"]["class_logits"][-1, n, t].sum().backward()
        reached = watched.queries.content.grad.abs().sum(-1) > 0
        wanted = torch.zeros(2, 12, dtype=torch.bool)
        wanted[n, t // 6 * 6 : t // 6 * 6 + 6] = True
        assert torch.equal(reached, wanted & (watched.queries.target_index != -2))
        decoder.zero_grad()


def test_denoising_queries_see_matching_ones():
    decoder = make(content_queries="learned")
    outputs = run(decoder, [make_target(count) for count in BATCH])
    outputs["denoising"]["class_logits"].sum().backward()
    assert decoder.content.weight.grad.any()


def test_an_image_with_fewer_instances_is_denoised_as_alone():
    quiet = Denoising(num_queries=2, label_noise=0.0, box_noise=0.0)
    decoder = make(denoising=quiet)
    decoded = make_decoded()
    together = decoder(decoded, [make_target(1), make_target(4)])["denoising"]
    alone = decoder(make_decoded(), [make_target(1), make_target(0)])["denoising"]
    for key in PREDICTIONS:
        torch.testing.assert_close(together[key][:, 0, [0, 4]], alone[key][:, 0])


# -- boxes


def test_the_first_boxes_are_those_of_the_masks():
    decoder = make().eval()
    decoded = make_decoded()
    outputs = decoder(decoded)
    stride = decoded.strides[0]
    (pooled,) = pool_to_levels(decoded.mask_features, [(1, 2, 2), stride])
    wanted = mask_boxes(outputs["mask_embeds"][0], pooled, stride, outputs["boxes"][0])
    assert torch.equal(outputs["boxes"][1], wanted)
    assert not torch.equal(outputs["boxes"][1], outputs["boxes"][0])
    predicted = make(box_from_mask=False).eval()(decoded)
    assert torch.equal(predicted["boxes"][1], predicted["boxes"][0])


def test_masks_lie_around_the_boxes():
    """The end of an embedding is the kernel of place_kernel.py around the centre of the box of the same prediction."""
    decoder = make().eval()
    outputs = decoder(make_decoded())
    boxes, embeds = outputs["boxes"], outputs["mask_embeds"]
    for layer in range(len(outputs["names"])):
        places = encode_places((boxes[layer, ..., :3] + boxes[layer, ..., 3:]) / 2)
        gains = (embeds[layer, ..., MASK_CHANNELS:] * places).unflatten(-1, (3, 2, -1)).sum(-2)
        # sin² + cos² = 1: what is left are the gains, which are positive.
        assert (gains > 0).all()


def test_boxes_stay_where_they_are_at_first():
    """Box deltas start at zero: every layer answers its reference, positives their noised boxes."""
    decoder = make(scramble=False, denoising=Denoising(num_queries=6, box_noise=0.0))
    target = make_target(3)
    outputs = decoder(make_decoded(images=1), [target])
    for layer in (2, 3):
        torch.testing.assert_close(outputs["boxes"][layer], outputs["boxes"][1])
    for layer in range(LAYERS):
        torch.testing.assert_close(outputs["denoising"]["boxes"][layer, 0], target["boxes"].repeat(2, 1))


def test_first_probabilities_are_about_one_percent():
    decoder = make(scramble=False)
    for head in (decoder.heads.class_logits, decoder.selection.selection.class_logits):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((CLASSES,), 0.01))


def test_boxes_are_refined_layer_by_layer_with_the_same_head():
    decoder = make(denoising=None).eval()
    outputs = decoder(make_decoded())
    contents = []
    decoder.heads.box_deltas.register_forward_hook(lambda *call: contents.append(call[2].double()))
    decoder(make_decoded())
    for layer, deltas in enumerate(contents[-LAYERS:], start=2):
        before, after = outputs["boxes"][layer - 1].double(), outputs["boxes"][layer].double()
        extent = before[..., 3:] - before[..., :3]
        middle = (before[..., 3:] + before[..., :3]) / 2 + deltas[..., :3] * extent
        grown = extent * deltas[..., 3:].exp()
        torch.testing.assert_close(after, torch.cat([middle - grown / 2, middle + grown / 2], -1), atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing():
    """What lies in the padding of the memory reaches no prediction."""
    padding = [torch.zeros(2, *size, dtype=torch.bool) for size in SIZES]
    for level in padding:
        level[1, 2:] = True
        level[1, :, :, 3:] = True
    decoder = make().eval()
    decoded, changed = make_decoded(padding=padding), make_decoded(padding=padding)
    for memory, level in zip(changed.memory, padding, strict=True):
        memory.masked_fill_(level[:, None], 50.0)
    for key, values in decoder(decoded).items():
        if key in PREDICTIONS:
            assert torch.equal(decoder(changed)[key], values)


def test_images_of_a_batch_are_independent():
    decoder = make().eval()
    together = decoder(make_decoded())
    decoded = make_decoded()
    for n in range(2):
        one = PixelDecoderOutput(
            memory=[level[n : n + 1] for level in decoded.memory],
            sizes=decoded.sizes,
            strides=decoded.strides,
            padding=None,
            mask_features=decoded.mask_features[n : n + 1],
            mask_stride=decoded.mask_stride,
        )
        alone = decoder(one)
        for key in PREDICTIONS:
            torch.testing.assert_close(alone[key][:, 0], together[key][:, n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("content_queries", ["learned", "selected"])
def test_more_queries_than_tokens(content_queries):
    tokens = sum(d * h * w for d, h, w in SIZES)
    decoder = make(num_queries=tokens + 20, content_queries=content_queries)
    outputs = decoder(make_decoded(images=1), [make_target(2)])
    assert outputs["boxes"].shape[2] == tokens
    assert outputs["denoising"]["boxes"].shape[2] == 12


def test_user_errors():
    with pytest.raises(ValueError, match="content_queries is 'both'"):
        make(content_queries="both")


def test_repr_tells_the_settings_that_no_weight_tells():
    text = repr(make(box_from_mask=False, anchor_cells=2.5))
    for part in ("box_from_mask=False", "anchor_cells=2.5", f"num_queries={QUERIES}", "Denoising(num_queries=12"):
        assert part in text


@pytest.mark.parametrize("training", [True, False])
def test_no_value_is_read_on_the_host(training):
    """Fake tensors have no values: reading one, for which a GPU's work would be waited for, raises."""

    def run_once():
        decoder = make(scramble=False, denoising=Denoising(num_queries=10, max_queries=10)).train(training)
        padding = [torch.zeros(2, *size, dtype=torch.bool) for size in SIZES]
        return decoder(make_decoded(padding=padding), [make_target(count) for count in (3, 8)])

    run_once()  # what is kept between calls must be real
    with FakeTensorMode(allow_non_fake_inputs=True):
        outputs = run_once()
        with pytest.raises(DataDependentOutputException):
            outputs["boxes"].sum().item()
    assert ("denoising" in outputs) is training
