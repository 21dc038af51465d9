"""Instances: validation, conversion, and the way into the volume's frame."""

import numpy as np
import pytest
import torch

from seg3d_monai.inference.instances import Instances, pack_mask, unpack_mask


def one(box, mask, score=0.5, class_index=0):
    return Instances(boxes=np.array([box]), scores=np.array([score]), classes=np.array([class_index]), masks=[mask])


def test_empty():
    empty = Instances.empty()
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 6)
    assert empty.place((0, 0, 0, 4, 5, 6)) == []
    assert len(Instances(boxes=[], scores=[], classes=[], masks=[])) == 0


def test_torch_becomes_numpy():
    instances = Instances(
        boxes=torch.tensor([[0.5, 1.0, 2.0, 2.5, 3.0, 6.5]]),
        scores=torch.tensor([0.75], dtype=torch.bfloat16),
        classes=torch.tensor([2]),
        masks=[torch.ones(3, 2, 5, dtype=torch.bool)],
    )
    assert instances.boxes.dtype == np.float32
    assert instances.scores.tolist() == [0.75]
    assert instances.classes.tolist() == [2]
    assert instances.masks[0].shape == (3, 2, 5)
    assert isinstance(instances.masks[0], np.ndarray)


def test_place_moves_tightens_and_keeps_the_box():
    mask = np.zeros((3, 2, 5), bool)
    mask[1, 0, 1:4] = True
    (placed,) = one((0.5, 1, 2, 2.5, 3, 6.5), mask, 0.25, 3).place((10, 20, 30, 14, 25, 40))
    assert placed.roi == (11, 21, 33, 12, 22, 36)
    assert placed.mask.shape == (1, 1, 3)
    assert placed.mask.all()
    assert placed.box == (10.5, 21, 32, 12.5, 23, 36.5)
    assert (placed.score, placed.class_index, placed.number) == (0.25, 3, 0)


def test_place_clips_to_the_roi_and_drops_what_has_no_voxel():
    instances = Instances(
        boxes=np.array([[-2, 0, 0, 2, 1, 1], [4, 0, 0, 5, 1, 1], [1, 1, 1, 2, 2, 2], [0, 0, 2, 1, 1, 9]], float),
        scores=np.full(4, 0.5),
        classes=np.zeros(4, int),
        masks=[np.ones((4, 1, 1), bool), np.ones((1, 1, 1), bool), np.zeros((1, 1, 1), bool), np.ones((1, 1, 7), bool)],
    )
    placed = instances.place((10, 0, 0, 14, 3, 5))
    assert [(p.number, p.roi) for p in placed] == [(0, (10, 0, 0, 12, 1, 1)), (3, (10, 0, 2, 11, 1, 5))]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"masks": [np.ones((2, 2, 5), bool)]}, ValueError, "mask of instance 0 has shape"),
        ({"masks": [np.ones((3, 2, 5))]}, TypeError, "threshold"),
        ({"scores": np.array([np.nan])}, ValueError, "scores of instance 0 are not finite"),
        ({"scores": np.array([0.5, 0.5])}, ValueError, "scores have shape"),
        ({"classes": np.array([-1])}, ValueError, "classes hold -1"),
        ({"classes": np.array([0.5])}, TypeError, "classes have dtype"),
        ({"boxes": np.array([[0, 1, 2, 3, 3.0]])}, ValueError, "boxes have shape"),
        ({"boxes": np.array([[3.0, 1, 2, 0, 3, 7]])}, ValueError, "inverted"),
    ],
)
def test_wrong_results_are_refused(change, kind, message):
    arguments = {
        "boxes": np.array([[0.0, 1, 2, 3, 3, 7]]),
        "scores": np.array([0.5]),
        "classes": np.array([0]),
        "masks": [np.ones((3, 2, 5), bool)],
    }
    Instances(**arguments)
    with pytest.raises(kind, match=message):
        Instances(**(arguments | change))


def test_masks_survive_packing():
    mask = np.random.default_rng(0).random((3, 5, 7)) < 0.4
    assert (unpack_mask(pack_mask(mask), mask.shape) == mask).all()
