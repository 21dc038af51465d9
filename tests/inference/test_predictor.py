"""The predictor around a network that returns known detections."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inference_toys import same_partition
from scipy import ndimage
from torch import nn

from seg3d_monai.data.intensity import Intensity, measure_intensity
from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import predict_labels
from seg3d_monai.inference.predictor import InstancePredictor

SIZE = (6, 10, 14)
ROI = (0, 0, 0, *SIZE)
RANGE = Intensity(low=(0.0,), high=(1.0,))


class Known(nn.Module):
    """Detections whose numbers are fixed, as a detector in evaluation mode returns them."""

    def __init__(self, boxes, scores, classes, mask_logits):
        super().__init__()
        self.found = {"boxes": boxes, "scores": scores, "classes": classes, "mask_logits": mask_logits}
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = None
        self.was_training = None

    def forward(self, images):
        self.seen, self.was_training = images, self.training
        return [self.found]


def known(count=3):
    """Two boxes filled by their halves along x, and one whose logits are all negative."""
    boxes = torch.tensor([[0.0, 0, 0, 2, 3, 4], [1.5, 2.2, 3.0, 4.5, 6, 7], [0, 0, 0, 6, 10, 14]])
    logits = torch.full((3, 1, 1, 4), -5.0)
    logits[0, ..., :2] = 5
    logits[1, ..., 2:] = 5
    return Known(boxes[:count], torch.tensor([0.9, 0.6, 0.5])[:count], torch.tensor([1, 0, 2])[:count], logits[:count])


def make(network=None, **changes):
    return InstancePredictor(**({"network": network or known(), "intensity": RANGE} | changes))


def test_instances_are_exactly_the_detections():
    found = make()(torch.zeros(1, *SIZE), ROI)
    assert np.asarray(found.boxes).tolist() == known().found["boxes"][:2].tolist()
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])
    assert found.classes.tolist() == [1, 0]
    first = np.zeros((2, 3, 4), bool)
    first[..., :2] = True
    second = np.zeros((4, 4, 4), bool)
    second[:3, :, 2:] = True  # z 1.5 .. 4.5 holds the centres of voxels 1 to 3, y 2.2 .. 6 those of 2 to 5
    assert np.array_equal(found.masks[0], first)
    assert np.array_equal(found.masks[1], second)


@pytest.mark.parametrize(("threshold", "wanted"), [(0.0, [0.9, 0.6]), (0.6001, [0.9]), (0.9001, [])])
def test_score_threshold(threshold, wanted):
    found = make(score_threshold=threshold)(torch.zeros(1, *SIZE), ROI)
    assert found.scores.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(("min_voxels", "wanted"), [(0, 3), (1, 2), (13, 1), (25, 0)])
def test_least_number_of_voxels(min_voxels, wanted):
    assert len(make(min_voxels=min_voxels)(torch.zeros(1, *SIZE), ROI)) == wanted


@pytest.mark.parametrize(
    ("min_visible", "wanted"),
    # Filled boxes along x, by score: 0..8; 4..12, half of it covered; 0..12, covered whole or to two thirds; 12..14.
    [(0.0, [0.9, 0.8, 0.7, 0.6]), (0.5, [0.9, 0.8, 0.6]), (0.51, [0.9, 0.6]), (0.3, [0.9, 0.8, 0.6])],
)
def test_a_second_view_of_a_cell_is_dropped(min_visible, wanted):
    boxes = torch.tensor([[1.0, 2, start, 3, 5, end] for start, end in ((0, 12), (0, 8), (4, 12), (12, 14))])
    scores = torch.tensor([0.7, 0.9, 0.8, 0.6])  # not in the order that decides
    network = Known(boxes, scores, torch.zeros(4, dtype=torch.int64), torch.full((4, 1, 1, 1), 5.0))
    found = make(network, min_visible=min_visible)(torch.zeros(1, *SIZE), ROI)
    assert found.scores.tolist() == pytest.approx(wanted)


def test_what_a_dropped_view_covered_is_free_again():
    """4..12 is dropped (half covered by 0..8), so 6..14 has lost two of its eight columns only, to 0..8."""
    boxes = torch.tensor([[1.0, 2, start, 3, 5, end] for start, end in ((0, 8), (4, 12), (6, 14))])
    scores = torch.tensor([0.9, 0.8, 0.7])
    network = Known(boxes, scores, torch.zeros(3, dtype=torch.int64), torch.full((3, 1, 1, 1), 5.0))
    found = make(network, min_visible=0.7)(torch.zeros(1, *SIZE), ROI)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])


def test_mask_threshold():
    (mask,) = make(known(1), mask_threshold=0.999)(torch.zeros(1, *SIZE), ROI).masks or [np.zeros(1, bool)]
    assert not mask.any()


def test_no_detections():
    found = make(known(0))(torch.zeros(1, *SIZE), ROI)
    assert len(found) == 0
    assert np.asarray(found.boxes).shape == (0, 6)


def test_a_range_is_needed():
    with pytest.raises(ValueError, match="for_volume"):
        make(intensity=None)(torch.zeros(1, *SIZE), ROI)


def test_for_volume_measures_the_whole_volume_once_and_leaves_the_predictor_alone():
    values = np.random.default_rng(0).integers(0, 60_000, (2, 8, 12, 16)).astype(np.uint16)
    volume = ArrayVolume(values)
    network = known()
    predictor = make(network, intensity=None, percentiles=(5.0, 95.0))
    bound = predictor.for_volume(volume)
    assert predictor.intensity is None
    assert bound.intensity == measure_intensity(volume, (5.0, 95.0))
    block = torch.from_numpy(values[:, 2:8, 1:11, :14].astype(np.float32))
    bound(block, (2, 1, 0, 8, 11, 14))
    assert network.seen.shape == (1, 2, *SIZE)
    assert network.seen.dtype == torch.float32
    low, high = np.percentile(values.reshape(2, -1), [5, 95], axis=1)
    wanted = (block.numpy() - low[:, None, None, None]) / (high - low)[:, None, None, None]
    np.testing.assert_allclose(network.seen[0].numpy(), wanted, atol=1e-4)


def test_the_block_is_not_changed():
    block = torch.full((1, *SIZE), 3.0)
    make()(block, ROI)
    assert (block == 3).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_network_runs_in_evaluation_mode_and_keeps_its_own(training):
    network = known().train(training)
    make(network)(torch.zeros(1, *SIZE), ROI)
    assert network.was_training is False
    assert network.training is training


def test_a_failing_network_keeps_its_mode():
    network = known().train()
    network.found = None
    with pytest.raises(AttributeError):
        make(network)(torch.zeros(1, *SIZE), ROI)
    assert network.training


def test_a_pickled_predictor_finds_the_same():
    predictor = pickle.loads(pickle.dumps(make()))
    wanted, found = make()(torch.zeros(1, *SIZE), ROI), predictor(torch.zeros(1, *SIZE), ROI)
    assert np.array_equal(found.boxes, wanted.boxes)
    assert all(np.array_equal(a, b) for a, b in zip(found.masks, wanted.masks, strict=True))


def test_bfloat16_gives_full_precision_boxes():
    network = known()
    network.found["mask_logits"] = network.found["mask_logits"].bfloat16()
    found = make(network, amp="bf16")(torch.zeros(1, *SIZE), ROI)
    assert np.asarray(found.boxes).dtype == np.float32
    assert np.asarray(found.boxes).tolist() == known().found["boxes"][:2].tolist()


@pytest.mark.parametrize("amp", ["half", "fp16"])
def test_an_unknown_or_impossible_precision_is_refused(amp):
    with pytest.raises(ValueError, match=f"amp='{amp}'"):
        make(amp=amp)


@pytest.mark.parametrize(
    "changes", [{"mask_threshold": 0.0}, {"mask_threshold": 1.0}, {"score_threshold": 50}, {"min_voxels": -1}]
)
def test_thresholds_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make(**changes)


def test_identity_tells_weights_and_settings_apart():
    plain = make().identity()
    assert make().identity() == plain
    other = known()
    other.weight.data += 1
    others = [
        make(other),
        make(intensity=Intensity(low=(0.0,), high=(2.0,))),
        make(score_threshold=0.6),
        make(mask_threshold=0.6),
        make(min_voxels=2),
        make(amp="bf16"),
        make(flips="x"),
        make(flips="xy"),
    ]
    identities = [p.identity() for p in others]
    assert all(identities.count(i) == 1 and i != plain for i in identities)


def test_identity_of_a_network_with_scalar_buffers():
    network = known()
    network.register_buffer("steps", torch.tensor(3))
    before = make(network).identity()
    network.steps += 1
    assert make(network).identity() != before


class Blobs(nn.Module):
    """Finds connected bright voxels: box a quarter voxel wider on each side, score and logits from their brightness.

    Args:
        capacity: the most it finds in one image.
        blind: numbers of the calls that find nothing.
        stride: boxes end on multiples of this many voxels; None for the quarter voxel.
    """

    def __init__(self, capacity=None, blind=(), stride=None):
        super().__init__()
        self.capacity, self.blind, self.stride = capacity, blind, stride
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return [self.detect(image[0].numpy()) for image in images]

    def detect(self, image):
        labels, count = ndimage.label(image > 0.5, np.ones((3, 3, 3)))
        count = 0 if len(self.seen) - 1 in self.blind else min(count, self.capacity or count)
        windows = ndimage.find_objects(labels)[:count]
        low = np.array([[s.start for s in w] for w in windows], np.float32).reshape(-1, 3)
        high = np.array([[s.stop for s in w] for w in windows], np.float32).reshape(-1, 3)
        if self.stride is None:
            low, high = np.maximum(low - 0.25, 0), np.minimum(high + 0.25, image.shape)
        else:
            low, high = low // self.stride * self.stride, -(-high // self.stride) * self.stride
        return {
            "boxes": torch.from_numpy(np.concatenate([low, high], 1)).float(),
            "scores": torch.tensor([float(image[w].max()) for w in windows]),
            "classes": torch.zeros(count, dtype=torch.int64),
            "mask_logits": [torch.from_numpy(8 * image[w] - 4) for w in windows],
        }


def blobs(shape, seed, count=9):
    """Bright cuboids of 1 to 3 voxels with bright and dim voxels, on a grid of odd extents; count of at most 9."""
    rng = np.random.default_rng(seed)
    image = np.zeros(shape, np.float32)
    for cell in rng.permutation(9)[:count]:
        y, x = (int(n * (i + 0.2)) // 3 for n, i in zip(shape[1:], divmod(int(cell), 3), strict=True))
        z, (d, h, w) = rng.integers(0, shape[0] - 3), rng.integers(1, 4, 3)
        image[z : z + d, y : y + h, x : x + w] = rng.uniform(0.55, 0.95, (d, h, w))
    return torch.from_numpy(image)[None]


def same(found, wanted):
    assert found.scores == pytest.approx(wanted.scores, abs=1e-6)
    assert np.asarray(found.boxes) == pytest.approx(np.asarray(wanted.boxes), abs=1e-5)
    assert found.classes.tolist() == wanted.classes.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(found.masks, wanted.masks, strict=True))


def predict_one_by_one(predictor, blocks):
    return [predictor(block, (0, 0, 0, *block.shape[1:])) for block in blocks]


def predict_together(predictor, blocks):
    return predictor.predict_batch(blocks, [(0, 0, 0, *block.shape[1:]) for block in blocks])


@pytest.mark.parametrize("flips", ["", "x"])
def test_blocks_of_one_shape_go_through_the_network_together(flips):
    shapes = [(7, 13, 21), (5, 17, 19), (7, 13, 21), (7, 13, 21)]
    blocks = [blobs(shape, seed, count) for seed, (shape, count) in enumerate(zip(shapes, (9, 4, 0, 1), strict=True))]
    predictor = make(Blobs(), flips=flips)
    found = predict_together(predictor, blocks)
    assert [len(f) for f in found] == [9, 4, 0, 1]
    views = len(flips) + 1
    assert predictor.network.seen == [(3, 1, 7, 13, 21)] * views + [(1, 1, 5, 17, 19)] * views
    for one, wanted in zip(found, predict_one_by_one(predictor, blocks), strict=True):
        same(one, wanted)


def test_a_convolution_gives_the_same_in_a_batch_up_to_rounding():
    class Smoothed(Blobs):
        def forward(self, images):
            return super().forward(F.conv3d(images, torch.full((1, 1, 3, 3, 3), 1 / 9), padding=1))

    blocks = [blobs((7, 13, 21), seed) for seed in range(3)]
    for one, wanted in zip(
        predict_together(make(Smoothed()), blocks), predict_one_by_one(make(Smoothed()), blocks), strict=True
    ):
        assert len(one) > 0
        same(one, wanted)


def test_only_the_crowded_block_of_a_batch_is_looked_at_in_parts():
    blocks = [blobs((7, 13, 64), seed, count) for seed, count in enumerate((1, 9, 0))]
    network = Blobs(capacity=8)
    found = predict_together(make(network), blocks)
    assert network.seen[0] == (3, 1, 7, 13, 64)
    assert len(network.seen) > 1
    assert all(shape[0] == 1 and shape[4] < 64 for shape in network.seen[1:])
    for one, wanted in zip(found, predict_one_by_one(make(Blobs()), blocks), strict=True):
        same(one, wanted)


def test_a_batch_of_nothing():
    assert make().predict_batch([], []) == []


def test_as_many_rois_as_blocks_and_as_many_results_as_images():
    with pytest.raises(ValueError, match="2 blocks and 1 rois"):
        make().predict_batch([torch.zeros(1, *SIZE)] * 2, [ROI])
    with pytest.raises(ValueError, match="1 results for 2 images"):
        make().predict_batch([torch.zeros(1, *SIZE)] * 2, [ROI] * 2)


@pytest.mark.parametrize("flips", ["x", "y", "z", "xy", ["z", "x"], ("x", "y", "z")])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_an_equivariant_network_gives_what_it_gives_without_flips(flips, count):
    block = blobs((7, 13, 21), 3, count)
    network = Blobs()
    (found,) = predict_together(make(network, flips=flips), [block])
    assert len(network.seen) == 2 ** len(flips)
    assert len(found) == count
    same(found, make(Blobs())(block, ROI))


@pytest.mark.parametrize("blind", [0, 1, 2, 3])
def test_a_view_that_missed_an_object_counts_as_zero(blind):
    block = blobs((7, 13, 21), 3)
    (wanted,) = predict_together(make(Blobs()), [block])
    found = make(Blobs(blind={blind}), flips="xy", score_threshold=0.1)(block, ROI)
    wanted.scores = wanted.scores * 3 / 4
    same(found, wanted)
    assert len(make(Blobs(blind={blind}), flips="xy", score_threshold=0.95 * 3 / 4)(block, ROI)) == 0


def test_a_network_that_ignores_its_input_is_seen_from_both_sides():
    network = Known(*(value[:1] for value in known().found.values()))
    found = make(network, flips="x", score_threshold=0.4)(torch.zeros(1, *SIZE), ROI)
    assert np.asarray(found.boxes).tolist() == [[0, 0, 0, 2, 3, 4], [0, 0, 10, 2, 3, 14]]
    assert found.scores.tolist() == pytest.approx([0.45, 0.45])
    assert found.masks[0][0, 0].tolist() == [True, True, False, False]
    assert found.masks[1][0, 0].tolist() == [False, False, True, True]


def test_the_grid_of_a_strided_network_is_mirrored_exactly_on_an_odd_size():
    """x 5..7 of 17 is 4..8 on a grid of four voxels; mirrored it is 10..12, which gives 8..12, that is 5..9."""
    block = torch.zeros(1, 8, 8, 17)
    block[0, 2, 2, 5:7] = 0.75
    found = make(Blobs(stride=4), flips="x")(block, ROI)
    assert np.asarray(found.boxes).tolist() == [[0, 0, 4.5, 4, 4, 8.5]]
    assert found.scores.tolist() == [0.75]


@pytest.mark.parametrize("flips", ["w", "xx", "xyzx", ["xy"], [0]])
def test_unknown_flips_are_refused(flips):
    with pytest.raises(ValueError, match="flips is"):
        make(flips=flips)


@pytest.mark.parametrize("value", [0, 7, 65_535])
def test_a_constant_stack_holds_nothing(value):
    volume = np.full((1, 9, 17, 33), value, np.uint16)
    labels, table = predict_labels(ArrayVolume(volume), make(Blobs(), intensity=None, flips="x"), progress=False)
    assert not labels.any()
    assert len(table) == 0


def test_a_stack_that_is_half_saturated():
    volume = np.random.default_rng(0).integers(0, 9_000, (1, 8, 18, 36)).astype(np.uint16)
    wanted = np.zeros((8, 18, 36), np.int64)
    wanted[:, 1:17, 1:17], wanted[:, 1:17, 19:35] = 1, 2
    volume[0][wanted > 0] = 65_535
    labels, _ = predict_labels(ArrayVolume(volume), make(Blobs(), intensity=None), progress=False)
    assert same_partition(labels, wanted)


def test_nan_in_a_block_is_refused():
    block = torch.zeros(1, *SIZE)
    block[0, 2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"roi \[0, 0, 0, 6, 10, 14\] holds NaN"):
        make()(block, ROI)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_box_that_is_not_finite_is_refused(value):
    network = known()
    network.found["boxes"][1, 3] = value
    with pytest.raises(ValueError, match="the network returned the box"):
        make(network)(torch.zeros(1, *SIZE), ROI)
