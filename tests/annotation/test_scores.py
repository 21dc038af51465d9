"""Doubt by hand, and what is seen of a backbone while a prediction runs."""

import numpy as np
import pytest
import torch
from annotate_toys import Grey
from torch import nn

from seg3d_monai.annotation.scores import BackboneProbe, doubt, pooled, standardised
from seg3d_monai.inference import Instances


def instances(boxes: list[list[float]], scores: list[float]) -> Instances:
    extents = [[int(np.ceil(box[a + 3]) - np.floor(box[a])) for a in range(3)] for box in boxes]
    return Instances(
        boxes=np.array(boxes, float).reshape(-1, 6),
        scores=np.array(scores),
        classes=np.zeros(len(boxes), np.int64),
        masks=[np.ones(extent, bool) for extent in extents],
    )


def test_doubt_is_the_expected_number_of_mistakes() -> None:
    boxes = [[0, 0, 0, 2, 4, 4]] * 4
    assert doubt(instances(boxes, [0.9, 0.5, 0.2, 1.0]), (0, 0, 0, 4, 8, 8)) == pytest.approx(0.1 + 0.5 + 0.2)
    assert doubt(Instances.empty(), (0, 0, 0, 4, 8, 8)) == 0
    assert doubt(instances(boxes[:1], [0.5]), (0, 0, 0, 4, 8, 8)) == 0.5


def test_doubt_counts_instances_that_are_centred_in_the_region() -> None:
    # Centres (1, 2, 2), (2, 6, 9) and (5, 6, 9); the region is half-open.
    boxes = [[0, 0, 0, 2, 4, 4], [0, 4, 8, 4, 8, 10], [4, 4, 8, 6, 8, 10]]
    found = instances(boxes, [0.5, 0.6, 0.7])
    assert doubt(found, (1, 2, 2, 2, 6, 9)) == pytest.approx(0.5)
    assert doubt(found, (2, 6, 9, 5, 7, 10)) == pytest.approx(0.4)
    assert doubt(found, (0, 0, 0, 6, 8, 10)) == pytest.approx(0.5 + 0.4 + 0.3)


def test_many_instances() -> None:
    scores = np.linspace(0, 1, 1001)
    found = instances([[0, 0, 0, 1, 1, 1]] * 1001, scores.tolist())
    assert doubt(found, (0, 0, 0, 1, 1, 1)) == pytest.approx(250.0)  # the mean of min(s, 1 - s) is 1/4


def test_features_are_means_of_every_channel_of_every_level() -> None:
    fine = torch.arange(2 * 2 * 3 * 4, dtype=torch.float32).reshape(1, 2, 2, 3, 4)
    levels = {"p1": fine, "p2": torch.full((1, 1, 1, 2, 2), 7.0, dtype=torch.bfloat16)}
    assert pooled(levels).tolist() == [11.5, 35.5, 7.0]
    assert pooled(levels).dtype == np.float32


def test_the_probe_sees_the_first_image_and_leaves_no_hook() -> None:
    backbone = Grey()

    def predict() -> str:
        for grey in (3.0, 5.0):
            backbone(torch.full((1, 1, 2, 3, 4), grey))
        return "done"

    result, features = BackboneProbe(backbone).watch(predict)
    assert (result, features.tolist()) == ("done", [3.0])
    assert not backbone._forward_hooks


def test_features_alone_end_the_prediction_early() -> None:
    backbone, after = Grey(), []

    def predict() -> None:
        try:
            backbone(torch.full((1, 1, 2, 3, 4), 3.0))
        except Exception:  # nobody on the way may take it for a failure
            after.append("caught")
        after.append("went on")

    assert BackboneProbe(backbone).features(predict).tolist() == [3.0]
    assert not after
    assert not backbone._forward_hooks


def test_a_prediction_without_the_backbone_is_refused() -> None:
    probe = BackboneProbe(nn.Identity())
    with pytest.raises(ValueError, match="did not use the backbone"):
        probe.watch(lambda: None)
    with pytest.raises(ValueError, match="did not use the backbone"):
        probe.features(lambda: None)


def test_standardised_features_have_unit_spread_and_constant_ones_vanish() -> None:
    features, centres = standardised(np.array([[0.0, 5.0], [4.0, 5.0]]), np.array([[2.0, 5.0]]))
    spread = np.sqrt(8 / 3)
    np.testing.assert_allclose(features, [[-2 / spread, 0], [2 / spread, 0]])
    np.testing.assert_allclose(centres, [[0, 0]])
