"""The predictor around a network that returns known detections."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from seg3d_monai.data.intensity import Intensity, measure_intensity
from seg3d_monai.data.volume import ArrayVolume
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
    ]
    identities = [p.identity() for p in others]
    assert all(identities.count(i) == 1 and i != plain for i in identities)


def test_identity_of_a_network_with_scalar_buffers():
    network = known()
    network.register_buffer("steps", torch.tensor(3))
    before = make(network).identity()
    network.steps += 1
    assert make(network).identity() != before
