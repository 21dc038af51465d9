"""The sparse contingency table: against scikit-image, in blocks, with huge ids and ignored voxels."""

import numpy as np
import pytest
from skimage.metrics import contingency_table

from seg3d_monai.metrics import ContingencyTable


def dense(table: ContingencyTable) -> dict[tuple[int, int], int]:
    overlaps = table.overlaps()
    return {
        (int(overlaps.truth_ids[t]), int(overlaps.predicted_ids[p])): int(n)
        for t, p, n in zip(overlaps.truth_index, overlaps.predicted_index, overlaps.intersection, strict=True)
    }


def test_equals_scikit_image_on_random_labels() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, (3, 7, 11))
    prediction = rng.integers(0, 9, (3, 7, 11))
    table = ContingencyTable()
    table.add(truth, prediction)
    expected = contingency_table(truth, prediction).toarray()
    assert dense(table) == {(t, p): int(expected[t, p]) for t in range(1, 6) for p in range(1, 9) if expected[t, p] > 0}
    overlaps = table.overlaps()
    np.testing.assert_array_equal(overlaps.truth_voxels, expected.sum(1)[1:])
    np.testing.assert_array_equal(overlaps.predicted_voxels, expected.sum(0)[1:])
    assert overlaps.foreground_intersection == expected[1:, 1:].sum()
    assert overlaps.foreground_union == expected.sum() - expected[0, 0]


def test_blocks_in_any_order_and_merged_tables_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat(rng.integers(0, 40, (6, 5, 4)), 3, axis=2).astype(np.uint16)
    prediction = np.repeat(rng.integers(0, 40, (6, 4, 5)), 3, axis=2)[:, :, :12]
    prediction = np.concatenate([prediction, prediction[:, :1]], axis=1)
    whole = ContingencyTable()
    whole.add(truth, prediction)
    first, second = ContingencyTable(), ContingencyTable()
    corners = [(z, y) for z in (4, 0, 2) for y in (2, 0, 4)]
    for number, (z, y) in enumerate(corners):
        part = (slice(z, z + 2), slice(y, y + 2))
        (first if number % 2 else second).add(truth[part], prediction[part])
    first.merge(second)
    assert dense(first) == dense(whole)
    np.testing.assert_array_equal(first.overlaps().predicted_voxels, whole.overlaps().predicted_voxels)


def test_folding_on_the_way_changes_nothing() -> None:
    table, folded = ContingencyTable(), ContingencyTable()
    for _ in range(5):
        block = np.array([1, 1, 2, 0], dtype=np.uint8)
        table.add(block, block)
        folded.add(block, block)
        folded._fold()
    assert dense(table) == dense(folded) == {(1, 1): 10, (2, 2): 5}


def test_ids_may_have_gaps_and_be_huge() -> None:
    big = np.iinfo(np.uint64).max - 1
    truth = np.array([[[0, 5, 5, big]]], dtype=np.uint64)
    prediction = np.array([[[2**62, 2**62, 7, 7]]], dtype=np.int64)
    table = ContingencyTable()
    table.add(truth, prediction)
    assert dense(table) == {(5, 2**62): 1, (5, 7): 1, (int(big), 7): 1}


@pytest.mark.parametrize(
    ("dtype", "ignore"), [(np.uint8, 255), (np.uint16, 65535), (np.uint32, 2**32 - 1), (np.int64, -1), (np.int16, -1)]
)
def test_ignored_voxels_are_in_no_count(dtype: type, ignore: int) -> None:
    truth = np.array([1, 1, ignore, ignore, 0, 0], dtype=dtype)
    prediction = np.array([3, 3, 3, 4, 4, 9], dtype=np.uint32)
    table = ContingencyTable()
    table.add(truth, prediction)
    overlaps = table.overlaps()
    assert overlaps.truth_ids.tolist() == [1]
    assert overlaps.predicted_ids.tolist() == [3, 4, 9]
    assert overlaps.predicted_voxels.tolist() == [2, 1, 1]
    assert overlaps.predicted_ignored.tolist() == [1, 1, 0]
    assert overlaps.iou.tolist() == [1.0]
    assert overlaps.foreground_union == 4


def test_a_prediction_wholly_ignored_is_still_listed() -> None:
    table = ContingencyTable()
    table.add(np.array([255, 255, 1], dtype=np.uint8), np.array([8, 8, 0]))
    overlaps = table.overlaps()
    assert overlaps.predicted_ids.tolist() == [8]
    assert overlaps.predicted_voxels.tolist() == [0]


def test_empty_tables_and_empty_blocks() -> None:
    assert len(ContingencyTable().overlaps().truth_ids) == 0
    table = ContingencyTable()
    table.add(np.zeros((0, 3, 4), dtype=np.uint8), np.zeros((0, 3, 4), dtype=np.uint8))
    table.add(np.zeros((2, 3, 4), dtype=np.uint8), np.zeros((2, 3, 4), dtype=np.uint8))
    overlaps = table.overlaps()
    assert len(overlaps.truth_ids) == len(overlaps.predicted_ids) == len(overlaps.iou) == 0
    assert overlaps.foreground_union == 0


def test_bool_masks_count_as_one_object() -> None:
    table = ContingencyTable()
    table.add(np.array([True, True, False]), np.array([False, True, True]))
    assert dense(table) == {(1, 1): 1}


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3), int), "truth has dtype float64"),
        (np.zeros((2, 3), int), np.zeros((2, 3), np.float32), "prediction has dtype float32"),
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "shape"),
        (np.full((2, 3), -2), np.zeros((2, 3), int), "truth holds the id -2"),
        (np.zeros((2, 3), int), np.full((2, 3), -1), "prediction holds the id -1"),
    ],
)
def test_wrong_labels_are_refused(truth: np.ndarray, prediction: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContingencyTable().add(truth, prediction)


def test_counts_of_voxels_stand_for_the_voxels() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 5, 400).astype(np.uint8)
    truth[rng.random(400) < 0.1] = 255
    prediction = rng.integers(0, 6, 400)
    voxels, counted = ContingencyTable(), ContingencyTable()
    voxels.add(truth, prediction)
    counted.add_counts(truth, prediction, np.ones(400, np.int64), truth == 255)
    for name in ("truth_ids", "truth_voxels", "predicted_ids", "predicted_voxels", "predicted_ignored", "intersection"):
        np.testing.assert_array_equal(getattr(counted.overlaps(), name), getattr(voxels.overlaps(), name))
    assert dense(counted) == dense(voxels)
    nothing = np.zeros(0, np.int64)
    counted.add_counts(nothing, nothing, nothing, nothing.astype(bool))
    assert dense(counted) == dense(voxels)
