"""The scores: toys counted by hand, other implementations, pooling, conventions."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics.panoptic_quality import compute_panoptic_quality
from scipy.optimize import linear_sum_assignment

from seg3d_monai.metrics import ContingencyTable, InstanceMetrics

KEYS = ["0.1", "0.25", "0.5", "0.55", "0.6", "0.65", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95"]


def score(*pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    metrics = InstanceMetrics()
    for truth, prediction in pairs:
        metrics.update(truth, prediction)
    return metrics.compute()


def toy() -> tuple[np.ndarray, np.ndarray]:
    """Shape (2, 3, 10). Truth: A 12 voxels, B 6, C 4. Prediction: 1 over A (12, of them 10 in A), 2 over half of B
    (3 in B, 0 beside), 3 the other half of B (3), 4 far away (5 voxels)."""
    truth = np.zeros((2, 3, 10), dtype=np.uint16)
    prediction = np.zeros((2, 3, 10), dtype=np.int32)
    truth[:, :2, 0:3] = 10  # A: 2 x 2 x 3 = 12
    prediction[:, :2, 0:3] = 7
    prediction[0, 0, 0] = prediction[1, 1, 2] = 0  # two voxels of A are missed
    prediction[0, 2, 0:2] = 7  # and two voxels of background taken: 12 in all, 10 in A
    truth[:, 2, 4:7] = 3000  # B: 6
    prediction[0, 2, 4:7] = 1
    prediction[1, 2, 4:7] = 2
    truth[0, 0, 8:10] = truth[0, 1, 8:10] = 4  # C: 4, missed
    prediction[1, 0, 5:10] = 90  # 5 voxels of nothing
    return truth, prediction


def test_the_toy_counted_by_hand() -> None:
    result = score(toy())
    assert list(result["thresholds"]) == KEYS
    # A: 10 / (12 + 12 - 10) = 10/14 = 0.714. B with each half: 3/6 = 0.5. C: none.
    for key in ("0.1", "0.25", "0.5"):
        entry = result["thresholds"][key]
        assert (entry["tp"], entry["fp"], entry["fn"]) == (2, 2, 1)
        assert entry["precision"] == 2 / 4
        assert entry["recall"] == 2 / 3
        assert entry["f1"] == pytest.approx(4 / 7)
        assert entry["ap_dsb"] == 2 / 5
        assert entry["pq"] == pytest.approx((10 / 14 + 0.5) / (2 + 1 + 0.5))
    for key in ("0.55", "0.6", "0.65", "0.7"):
        entry = result["thresholds"][key]
        assert (entry["tp"], entry["fp"], entry["fn"]) == (1, 3, 2)
        assert entry["ap_dsb"] == 1 / 6
    assert (result["thresholds"]["0.75"]["tp"], result["thresholds"]["0.75"]["f1"]) == (0, 0.0)
    assert result["map"] == pytest.approx((2 / 5 + 4 / 6) / 10)
    # SEG: A is covered by 10 of 12; no half of B covers MORE than half of it.
    assert result["seg"] == pytest.approx((10 / 14) / 3)
    assert result["mucov"] == pytest.approx((10 / 14 + 0.5 + 0.5 + 0) / 4)
    # AJI: A 10 / 14, B takes one half 3 / 6, C 0 / 4, unused: the other half 3, the far one 5.
    assert result["aji"] == pytest.approx((10 + 3) / (14 + 6 + 4 + 3 + 5))
    # Foreground: 10 + 6 shared; truth 22, prediction 12 + 6 + 5 = 23.
    assert result["foreground_iou"] == pytest.approx(16 / (22 + 23 - 16))
    assert (result["num_volumes"], result["num_truth"], result["num_predicted"]) == (1, 3, 4)


def test_perfect_prediction_with_other_ids_scores_one() -> None:
    truth, _ = toy()
    result = score((truth, (truth.astype(np.int64) * 1_000_000_007)))
    assert all(entry["f1"] == entry["pq"] == entry["ap_dsb"] == 1.0 for entry in result["thresholds"].values())
    assert result["map"] == result["seg"] == result["mucov"] == result["aji"] == result["foreground_iou"] == 1.0


def test_nothing_true_nothing_predicted_and_one_of_both() -> None:
    empty = np.zeros((2, 3, 5), dtype=np.uint8)
    one = empty.copy()
    one[0, 1, 1:4] = 9
    for pair, counts in [
        ((empty, empty), (0, 0, 0)),
        ((empty, one), (0, 1, 0)),
        ((one, empty), (0, 0, 1)),
        ((one, one), (1, 0, 0)),
    ]:
        result = score(pair)
        entry = result["thresholds"]["0.5"]
        assert (entry["tp"], entry["fp"], entry["fn"]) == counts
        wanted = float(counts[0])
        assert entry["f1"] == entry["precision"] == entry["recall"] == entry["pq"] == wanted
        assert result["map"] == result["seg"] == result["mucov"] == result["aji"] == wanted
        assert "NaN" not in json.dumps(result)
    nothing = InstanceMetrics().compute()
    assert nothing["num_volumes"] == 0
    assert json.loads(json.dumps(nothing)) == nothing


def test_counts_are_pooled_over_volumes_not_scores() -> None:
    truth, prediction = toy()
    empty = np.zeros_like(truth)
    result = score((truth, prediction), (truth, truth), (empty, empty), (empty, truth))
    entry = result["thresholds"]["0.5"]
    assert (entry["tp"], entry["fp"], entry["fn"]) == (2 + 3, 2 + 3, 1)
    assert entry["f1"] == pytest.approx(10 / 16)
    assert result["seg"] == pytest.approx((10 / 14 + 3) / 6)
    assert result["mucov"] == pytest.approx((10 / 14 + 1 + 3) / 10)
    assert result["num_volumes"] == 4


def test_merged_and_streamed_equal_whole_and_reset_forgets() -> None:
    rng = np.random.default_rng(3)
    volumes = [blobs(rng, (9, 14, 22)) for _ in range(3)]
    whole, first, second = InstanceMetrics(), InstanceMetrics(), InstanceMetrics()
    for number, (truth, prediction) in enumerate(volumes):
        whole.update(truth, prediction)
        table = ContingencyTable()
        for z in (6, 0, 3):
            for x in (11, 0):
                part = (slice(z, z + 3), slice(None), slice(x, x + 11))
                table.add(truth[part], prediction[part])
        (first if number == 1 else second).add_table(table)
    first.merge(second)
    merged, expected = first.compute(), whole.compute()
    assert merged["thresholds"]["0.5"]["tp"] == expected["thresholds"]["0.5"]["tp"]
    for key in ("map", "seg", "mucov", "aji", "foreground_iou"):
        assert merged[key] == pytest.approx(expected[key], abs=1e-12)
    whole.reset()
    assert whole.compute() == InstanceMetrics().compute()


def test_ignore_removes_voxels_and_excuses_predictions() -> None:
    truth = np.zeros((1, 4, 8), dtype=np.uint16)
    truth[0, 0, :4] = 1
    truth[0, 2:, :] = 65535
    prediction = np.zeros_like(truth)
    prediction[0, 0, :4] = 1
    prediction[0, 2, :4] = 1  # as much in ignore as outside: IoU stays 1
    prediction[0, 1:4, 5] = 2  # 2 of 3 in ignore: excused
    prediction[0, 3, 0:2] = 3  # wholly in ignore: excused
    prediction[0, 1, 7] = prediction[0, 2, 7] = 4  # half, not more than half: a false positive
    result = score((truth, prediction))
    entry = result["thresholds"]["0.95"]
    assert (entry["tp"], entry["fp"], entry["fn"]) == (1, 1, 0)
    assert result["num_predicted"] == 2
    assert result["mucov"] == pytest.approx(0.5)
    assert result["aji"] == pytest.approx(4 / 5)
    assert result["foreground_iou"] == pytest.approx(4 / 6)


def test_an_excused_prediction_may_match() -> None:
    truth = np.array([[[1, 1, 255, 255, 255]]], dtype=np.uint8)
    result = score((truth, np.ones((1, 1, 5), dtype=np.uint8)))
    entry = result["thresholds"]["0.5"]
    assert (entry["tp"], entry["fp"], entry["fn"]) == (1, 0, 0)
    signed = score((np.array([[[1, 1, -1, -1, -1]]]), np.ones((1, 1, 5), dtype=np.int64)))
    assert signed == result


def blobs(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Random boxes as truth, and shifted, split, lost and added ones as prediction."""
    truth, prediction = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for index in range(1, 12):
        low = [int(rng.integers(0, n - 2)) for n in shape]
        high = [a + int(rng.integers(2, 6)) for a in low]
        truth[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = index * 5
        shift = rng.integers(-1, 2, 3)
        moved = tuple(slice(max(0, a + s), b + s) for a, b, s in zip(low, high, shift, strict=True))
        if rng.random() < 0.85:
            prediction[moved] = 100 - index
    return truth, prediction


def naive(truth: np.ndarray, prediction: np.ndarray, threshold: float) -> dict[str, float]:
    """Dense and slow, straight from the definitions."""
    true_masks = [truth == i for i in np.unique(truth) if i]
    predicted_masks = [prediction == i for i in np.unique(prediction) if i]
    iou = np.array([[(t & p).sum() / (t | p).sum() for p in predicted_masks] for t in true_masks])
    rows, columns = linear_sum_assignment(np.where(iou >= threshold, 1000 + iou, 0), maximize=True)
    kept = iou[rows, columns] >= threshold
    tp = int(kept.sum())
    fp, fn = len(predicted_masks) - tp, len(true_masks) - tp
    covered = [
        max([iou[i, j] for j, p in enumerate(predicted_masks) if (t & p).sum() > t.sum() / 2], default=0.0)
        for i, t in enumerate(true_masks)
    ]
    intersection = union = 0
    used = set()
    for i, t in enumerate(true_masks):
        if iou[i].max() == 0:
            union += t.sum()
            continue
        j = int(iou[i].argmax())
        used.add(j)
        intersection += (t & predicted_masks[j]).sum()
        union += (t | predicted_masks[j]).sum()
    union += sum(p.sum() for j, p in enumerate(predicted_masks) if j not in used)
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "pq": iou[rows, columns][kept].sum() / (tp + (fp + fn) / 2),
        "seg": float(np.mean(covered)),
        "mucov": float(iou.max(axis=0).mean()),
        "aji": intersection / union,
    }


def overlaps_iou(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    table = ContingencyTable()
    table.add(truth, prediction)
    return table.overlaps().iou


def test_equals_naive_loops_and_monai_on_random_volumes() -> None:
    rng = np.random.default_rng(11)
    for _ in range(12):
        truth, prediction = blobs(rng, (8, 13, 17))
        result = score((truth, prediction))
        for key in KEYS:
            expected = naive(truth, prediction, float(key))
            for name in ("tp", "fp", "fn"):
                assert result["thresholds"][key][name] == expected[name]
            assert result["thresholds"][key]["pq"] == pytest.approx(expected["pq"])
        for name in ("seg", "mucov", "aji"):
            assert result[name] == pytest.approx(expected[name])
        # MONAI matches IoU > threshold, so a threshold that no pair meets exactly.
        iou = overlaps_iou(truth, prediction)
        assert not np.any(iou == 0.55)
        monai_pq = compute_panoptic_quality(
            torch.from_numpy(prediction), torch.from_numpy(truth), metric_name="pq", match_iou_threshold=0.55
        )
        assert result["thresholds"]["0.55"]["pq"] == pytest.approx(float(monai_pq), abs=1e-5)


def test_axes_and_ids_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    truth, prediction = blobs(rng, (7, 12, 19))
    expected = score((truth, prediction))
    turned = score((truth.transpose(2, 0, 1), prediction.transpose(2, 0, 1)))
    shuffled = score((truth * 17, np.where(prediction > 0, 10_000 - prediction, 0)))
    for other in (turned, shuffled):
        for key in KEYS:
            assert other["thresholds"][key] == pytest.approx(expected["thresholds"][key])
        assert other["seg"] == pytest.approx(expected["seg"])
        assert other["mucov"] == pytest.approx(expected["mucov"])


def test_wrong_input_is_refused_and_changes_nothing() -> None:
    metrics = InstanceMetrics()
    with pytest.raises(ValueError, match="integers"):
        metrics.update(np.zeros((2, 3, 4)), np.zeros((2, 3, 4), int))
    with pytest.raises(ValueError, match="shape"):
        metrics.update(np.zeros((2, 3, 4), int), np.zeros((2, 4, 3), int))
    assert metrics.compute() == InstanceMetrics().compute()
