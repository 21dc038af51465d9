"""Targets: exact boxes, fragments that become ignore, and the extremes of how many there are."""

import numpy as np
import pytest
import torch
from crop_toys import boxes_by_loop, label_volume

from seg3d_monai.data.targets import compact_labels, derive_targets, instance_extents


def test_boxes_ids_and_classes_of_a_hand_made_crop() -> None:
    label = label_volume((4, 6, 9), {7: (0, 1, 2, 2, 4, 5), 3: (2, 0, 6, 4, 6, 9)}, np.int32)
    targets = derive_targets(label, classes={3: 1, 7: 0}, min_voxels=1)
    assert targets["ids"].tolist() == [3, 7]
    assert targets["boxes"].tolist() == [[2, 0, 6, 4, 6, 9], [0, 1, 2, 2, 4, 5]]
    assert targets["classes"].tolist() == [1, 0]
    assert torch.equal(targets["label"], torch.from_numpy(label.astype(np.int64)))
    assert targets["boxes"].dtype == torch.float32
    assert targets["label"].dtype == targets["ids"].dtype == targets["classes"].dtype == torch.int64


def test_no_instance_at_all() -> None:
    targets = derive_targets(np.zeros((3, 4, 5), np.uint16))
    assert targets["boxes"].shape == (0, 6)
    assert targets["ids"].shape == targets["classes"].shape == (0,)
    assert targets["label"].shape == (3, 4, 5)
    assert not targets["label"].any()


def test_only_ignore() -> None:
    targets = derive_targets(torch.full((3, 4, 5), -1))
    assert len(targets["ids"]) == 0
    assert (targets["label"] == -1).all()


def test_one_instance_that_fills_the_crop() -> None:
    targets = derive_targets(np.full((2, 3, 5), 9, np.uint8))
    assert targets["ids"].tolist() == [9]
    assert targets["boxes"].tolist() == [[0, 0, 0, 2, 3, 5]]


def test_three_hundred_instances_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 301, (12, 20, 31)).astype(np.int32)
    label[rng.random(label.shape) < 0.1] = -1
    targets = derive_targets(label, classes=2, min_voxels=0)
    expected = boxes_by_loop(label)
    assert targets["ids"].tolist() == list(expected)
    assert targets["boxes"].tolist() == list(expected.values())
    assert set(targets["classes"].tolist()) == {2}


def test_cut_fragments_become_ignore_and_small_whole_instances_stay() -> None:
    label = label_volume(
        (4, 8, 10),
        {
            1: (0, 0, 0, 2, 2, 2),  # 8 of 100 voxels, at a face: less than a tenth
            2: (0, 4, 0, 2, 6, 2),  # 8 of 40, at a face: fewer than min_voxels
            3: (1, 3, 4, 3, 5, 6),  # 8 of 8: small but whole
            4: (1, 6, 4, 3, 8, 6),  # 8 of 9, at a face: cut
            5: (0, 0, 4, 4, 2, 8),  # 32 of 60, at a face: enough is visible
            6: (1, 3, 8, 3, 5, 9),  # 4 of 7, inside: it shrank, it was not cut
            8: (1, 6, 8, 3, 7, 9),  # 2 of 7, inside: most of it was lost outside what was read
        },
    )
    full = {1: 100, 2: 40, 3: 8, 4: 9, 5: 60, 6: 7, 8: 7}
    targets = derive_targets(label, full_voxels=full, min_voxels=10, min_visible=0.1)
    assert targets["ids"].tolist() == [3, 5, 6]
    found = targets["label"].numpy()
    for gone in (1, 2, 4, 8):
        assert (found[label == gone] == -1).all()
    for kept in (3, 5, 6):
        assert ((found == kept) == (label == kept)).all()
    assert ((found == 0) == (label == 0)).all()


def test_without_full_sizes_only_small_pieces_at_a_face_are_fragments() -> None:
    label = label_volume((4, 8, 10), {1: (0, 0, 0, 1, 1, 3), 2: (1, 2, 2, 2, 3, 5)})
    assert derive_targets(label, min_voxels=4)["ids"].tolist() == [2]
    assert derive_targets(label, min_voxels=3)["ids"].tolist() == [1, 2]


def test_an_id_without_a_class_is_an_error() -> None:
    label = label_volume((3, 4, 5), {1: (1, 1, 1, 2, 2, 2), 4: (1, 2, 3, 2, 3, 4)})
    with pytest.raises(ValueError, match=r"label ids \[4\] have no class"):
        derive_targets(label, classes={1: 0}, min_voxels=1)


@pytest.mark.parametrize("label", [np.zeros((2, 3), int), np.zeros((2, 3, 4), np.float32), np.zeros((1, 2, 3, 4), int)])
def test_only_integer_volumes(label: np.ndarray) -> None:
    with pytest.raises(ValueError, match="integer array"):
        derive_targets(label)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64, np.uint64])
def test_compact_labels_keeps_order_and_finds_ignore(dtype: type) -> None:
    ignore = int(np.iinfo(dtype).max)
    label = np.array([[[0, 7, 7], [ignore, 100, 3]]], dtype)
    codes, ids = compact_labels(label, ignore=ignore)
    assert codes.tolist() == [[[0, 2, 2], [-1, 3, 1]]]
    assert ids.tolist() == [3, 7, 100]


def test_compact_labels_of_huge_ids_and_of_nothing() -> None:
    codes, ids = compact_labels(np.array([[[4_000_000_000, 0, 5, 2**32 - 1]]], np.uint32), ignore=2**32 - 1)
    assert codes.tolist() == [[[2, 0, 1, -1]]]
    assert ids.tolist() == [5, 4_000_000_000]
    codes, ids = compact_labels(np.zeros((0, 2, 3), np.uint16))
    assert codes.shape == (0, 2, 3)
    assert len(ids) == 0
    codes, ids = compact_labels(np.full((1, 2, 3), 65535, np.uint16), ignore=65535)
    assert (codes == -1).all()
    assert len(ids) == 0


def test_extents_of_absent_ids_are_zero() -> None:
    codes = np.zeros((2, 3, 4), np.int32)
    codes[1, 2, 1:3] = 2
    boxes, voxels = instance_extents(codes, 3)
    assert boxes.tolist() == [[0] * 6, [1, 2, 1, 2, 3, 3], [0] * 6]
    assert voxels.tolist() == [0, 2, 0]


def test_debris_is_ignored_by_its_size_in_the_whole_volume() -> None:
    label = np.zeros((3, 8, 10), np.int64)
    label[0:2, 1:4, 1:5] = 1  # 24 voxels, whole
    label[1:3, 5:7, 6:8] = 2  # 8 voxels, whole: debris
    label[0, 6:8, 0:3] = 3  # 6 of 40 voxels, cut: its whole size counts
    targets = derive_targets(label, full_voxels={1: 24, 2: 8, 3: 40}, min_voxels=5, min_object_voxels=9)
    assert targets["ids"].tolist() == [1, 3]
    assert (targets["label"][label == 2] == -1).all()
    assert targets["boxes"].tolist() == [[0, 1, 1, 2, 4, 5], [0, 6, 0, 1, 8, 3]]
    everything = derive_targets(label, full_voxels={1: 24, 2: 8, 3: 40}, min_voxels=5)
    assert everything["ids"].tolist() == [1, 2, 3]


def test_ranks_with_their_ids_give_what_the_ids_give() -> None:
    ids = np.array([3, 8, 70_000, 70_001])
    label = label_volume(
        (4, 8, 10), {3: (0, 0, 0, 2, 3, 3), 70_000: (1, 4, 4, 3, 8, 9), 70_001: (0, 7, 9, 1, 8, 10)}, np.int64
    )
    label[3, :2] = -1  # the id 8 left the crop
    options = {"classes": {3: 1, 70_000: 0, 70_001: 2}, "full_voxels": {3: 40, 70_000: 40, 70_001: 9}, "min_voxels": 2}
    ranks = np.searchsorted(ids, label) + 1
    ranks[label <= 0] = label[label <= 0]
    expected = derive_targets(label, **options)  # type: ignore[arg-type]
    assert expected["ids"].tolist() == [3, 70_000]
    for dtype in (np.int32, np.int64):
        found = derive_targets(ranks.astype(dtype), ids=ids, **options)  # type: ignore[arg-type]
        for key in ("label", "ids", "boxes", "classes"):
            assert torch.equal(found[key], expected[key])  # type: ignore[literal-required]
            assert found[key].dtype == expected[key].dtype  # type: ignore[literal-required]
    nothing = derive_targets(np.zeros((2, 3, 4), np.int32), ids=np.zeros(0, np.int64))
    assert nothing["boxes"].shape == (0, 6)
    for wrong in (5, -2):
        with pytest.raises(ValueError, match="for 4 ids"):
            derive_targets(np.full((2, 3, 4), wrong), ids=ids)
