"""Detections that are kept give, under any settings, what the predictor returns; the best come first and stay."""

import numpy as np
import pytest
import torch
from torch import nn
from tune_toys import Bright, known_best, predictor_of

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import ResamplingPredictor
from seg3d_monai.inference.detections import InstanceSettings

SHAPE = (9, 17, 30)
ROI = (0, 0, 0, *SHAPE)
SETTINGS = [
    InstanceSettings(),
    InstanceSettings(score_threshold=0.05, mask_threshold=0.3, min_voxels=0, min_visible=0.0),
    InstanceSettings(score_threshold=0.4, mask_threshold=0.6, min_voxels=30, min_visible=0.5),
    InstanceSettings(score_threshold=0.6, mask_threshold=0.45, min_voxels=3, min_visible=0.95),
]


class Crowd(nn.Module):
    """Boxes, scores and masks without sense, many of which overlap; the same for an image of the same shape."""

    def __init__(self, count=60):
        super().__init__()
        self.count = count

    def forward(self, images):
        rng = np.random.default_rng(images.shape[2:])
        lower = rng.uniform(0, np.array(images.shape[2:]) - 2, (self.count, 3))
        boxes = np.concatenate([lower, np.minimum(lower + rng.uniform(1, 9, (self.count, 3)), images.shape[2:])], 1)
        return [
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "scores": torch.tensor(rng.uniform(0, 1, self.count), dtype=torch.float32),
                "classes": torch.tensor(rng.integers(0, 2, self.count)),
                "mask_logits": torch.tensor(rng.normal(0.5, 1, (self.count, 3, 4, 5)), dtype=torch.float32),
            }
            for _ in images
        ]


def same(found, wanted):
    assert found.scores.tolist() == wanted.scores.tolist()
    assert found.boxes.tolist() == wanted.boxes.tolist()
    assert found.classes.tolist() == wanted.classes.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(found.masks, wanted.masks, strict=True))


def bound(network, spacing=None, flips=()):
    predictor = predictor_of(network, flips=flips)
    if spacing is not None:
        predictor = ResamplingPredictor(predictor, spacing_um=spacing)
    image = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.uint16)
    return predictor.for_volume(ArrayVolume(image, (2.0, 1.0, 0.5))), torch.from_numpy(image[None].astype(np.float32))


@pytest.mark.parametrize(("spacing", "flips"), [(None, ()), (None, "x"), ((1.0, 1.0, 1.0), ())])
@pytest.mark.parametrize("settings", SETTINGS)
def test_kept_detections_give_what_the_predictor_returns(settings, spacing, flips):
    predictor, block = bound(Crowd(), spacing, flips)
    kept = predictor.detect(block, ROI)
    wanted = predictor.with_settings(settings)(block, ROI)
    assert len(wanted) > 0
    same(kept.instances(settings), wanted)


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one(count):
    predictor, block = bound(Crowd(count))
    found = predictor.detect(block, ROI).instances(SETTINGS[1])
    assert len(found) == count
    assert found.boxes.shape == (count, 6)


def test_a_lower_score_threshold_only_adds_instances():
    predictor, block = bound(Crowd())
    every = predictor.detect(block, ROI).masked(0.05, 0.5).instances(5, 0.6)
    assert (np.diff(every.scores) <= 0).all()
    assert 10 < len(every) < 60
    for threshold in (0.1, 0.33, float(every.scores[4]), 0.99):
        settings = InstanceSettings(score_threshold=threshold, mask_threshold=0.5, min_voxels=5, min_visible=0.6)
        some = predictor.with_settings(settings)(block, ROI)
        assert some.scores.tolist() == [score for score in every.scores.tolist() if score >= threshold]
        assert all(np.array_equal(a, b) for a, b in zip(some.masks, every.masks, strict=False))


def test_masks_end_where_the_probability_does():
    image, _ = known_best(rim=0.4)
    predictor = predictor_of(Bright()).for_volume(ArrayVolume(image))
    kept = predictor.detect(torch.from_numpy(image[None].astype(np.float32)), (0, 0, 0, *image.shape))
    for threshold, voxels in ((0.3, 4 * 5 * 6), (0.5, 4 * 5 * 4)):
        masks = kept.instances(InstanceSettings(score_threshold=0.55, mask_threshold=threshold)).masks
        assert [int(mask.sum()) for mask in masks] == [voxels] * 4


def test_other_settings_leave_the_predictor_alone():
    predictor, _ = bound(Crowd(), (1.0, 1.0, 1.0))
    changed = predictor.with_settings(SETTINGS[2])
    assert changed.settings == SETTINGS[2]
    assert predictor.settings.score_threshold == 0.8
    assert changed.volume_spacing_um == predictor.volume_spacing_um
    assert changed.identity()["predictor"]["min_visible"] == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("score_threshold", 1.5), ("mask_threshold", 0), ("mask_threshold", 1), ("min_voxels", -1), ("min_visible", 70)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        InstanceSettings(**{name: value})
