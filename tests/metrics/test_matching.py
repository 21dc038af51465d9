"""Matching: optimal against brute force, at ties, sparse at scale."""

import itertools
import time

import numpy as np
import pytest

from seg3d_monai.metrics import match_instances, matching


def brute_force(iou: np.ndarray, threshold: float) -> tuple[int, float]:
    """Most pairs, then most IoU, by trying every assignment of a small dense matrix."""
    if iou.shape[0] > iou.shape[1]:
        iou = iou.T
    best = (0, 0.0)
    for columns in itertools.permutations(range(iou.shape[1]), iou.shape[0]):
        chosen = [iou[row, column] for row, column in enumerate(columns) if iou[row, column] >= threshold]
        best = max(best, (len(chosen), sum(chosen)))
    return best


@pytest.mark.parametrize("max_dense_cells", [4_000_000, 0])
def test_equals_brute_force(max_dense_cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MAX_DENSE_CELLS", max_dense_cells)
    rng = np.random.default_rng(0)
    for _ in range(150):
        shape = rng.integers(1, 6, 2)
        iou = rng.choice([0, 0, 0.1, 0.2, 0.25, 0.3, 0.5], size=shape)
        truth, predicted = np.nonzero(iou)
        order = rng.permutation(len(truth))
        truth, predicted = truth[order], predicted[order]
        matched = match_instances(truth, predicted, iou[truth, predicted], 0.15)
        assert len(set(truth[matched])) == len(set(predicted[matched])) == len(matched)
        count, total = brute_force(iou, 0.15)
        assert len(matched) == count
        assert iou[truth, predicted][matched].sum() == pytest.approx(total)


def test_the_greedy_choice_is_not_taken() -> None:
    # Truth 0 likes prediction 0 best (0.4), but then truth 1 has none: two matches need 0-1 and 1-0.
    truth, predicted = np.array([0, 0, 1]), np.array([0, 1, 0])
    matched = match_instances(truth, predicted, np.array([0.4, 0.2, 0.3]), 0.1)
    assert matched.tolist() == [1, 2]


def test_an_object_cut_into_exact_halves_matches_once_at_one_half() -> None:
    truth, predicted, iou = np.array([0, 0]), np.array([0, 1]), np.array([0.5, 0.5])
    assert len(match_instances(truth, predicted, iou, 0.5)) == 1
    assert len(match_instances(truth, predicted, iou, 0.55)) == 0


def test_the_threshold_itself_matches() -> None:
    one = np.array([0])
    for numerator, threshold in [(10, 0.5), (11, 0.55), (12, 0.6), (13, 0.65), (14, 0.7), (17, 0.85), (19, 0.95)]:
        assert len(match_instances(one, one, np.array([numerator]) / np.array([20]), threshold)) == 1


def test_no_pairs_and_wrong_thresholds() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert len(match_instances(none, none, none.astype(float), 0.5)) == 0
    for threshold in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            match_instances(none, none, none.astype(float), threshold)


def test_a_hundred_thousand_objects_are_quick() -> None:
    rng = np.random.default_rng(0)
    count = 100_000
    truth = np.concatenate([np.arange(count), np.arange(count)])
    predicted = np.concatenate([np.arange(count), rng.permutation(count)])
    pairs = np.unique(np.stack([truth, predicted], 1)[: 2 * count - count // 2], axis=0)
    iou = rng.uniform(0.05, 1.0, len(pairs))
    start = time.perf_counter()
    for threshold in (0.1, 0.5, 0.9):
        matched = match_instances(pairs[:, 0], pairs[:, 1], iou, threshold)
        assert len(np.unique(pairs[matched, 0])) == len(np.unique(pairs[matched, 1])) == len(matched) > 0
    assert time.perf_counter() - start < 20
