"""Faults between truth and prediction on hand-made blocks: each kind, in its place, ignore left out."""

import numpy as np
import pandas as pd
import pytest

from seg3d_monai.report.looked_at import KINDS, LookedAt, faults, scored_matches

SHAPE = (6, 30, 40)


def block(labels, number, z, y, x):
    labels[z[0] : z[1], y[0] : y[1], x[0] : x[1]] = number


def scene(origin=(0, 0, 0), ignored=False):
    """A true object for each kind of fault, and one that is found."""
    truth, labels = np.zeros(SHAPE, np.uint16), np.zeros(SHAPE, np.uint32)
    block(truth, 1, (0, 4), (0, 6), (0, 8)), block(labels, 7, (0, 4), (0, 6), (0, 8))  # the same
    block(truth, 2, (0, 4), (10, 16), (0, 8))  # missed
    block(labels, 3, (1, 4), (20, 26), (0, 8))  # false positive
    block(truth, 4, (0, 4), (0, 6), (12, 24)), block(labels, 4, (0, 4), (0, 6), (12, 18))  # split
    block(labels, 5, (0, 4), (0, 6), (18, 24))
    block(truth, 5, (0, 4), (10, 16), (12, 18)), block(truth, 6, (0, 4), (10, 16), (18, 24))  # merged
    block(labels, 6, (0, 4), (10, 16), (12, 24))
    block(truth, 8, (0, 6), (20, 28), (12, 24)), block(labels, 8, (0, 6), (20, 28), (12, 17))  # poor outline, 5 / 12
    if ignored:
        block(truth, 65535, (0, 6), (20, 30), (0, 10))
    table = pd.DataFrame({"id": [3, 4, 5, 6, 7, 8], "score": [0.9, 0.4, 0.5, 0.6, 0.95, 0.3]})
    image = np.zeros(SHAPE, np.uint16)
    return LookedAt(name="v", image=image, labels=labels, table=table, truth=truth, spacing_um=(2, 1, 1), origin=origin)


def test_each_kind_is_found_where_it_is():
    found = {fault.kind: fault for fault in faults(scene(origin=(10, 20, 30)))}
    assert set(found) == set(KINDS) - {"mixed"}
    assert (found["missed"].true_ids, found["missed"].predicted_ids) == ((2,), ())
    assert found["missed"].box == (0, 10, 0, 4, 16, 8)
    assert found["missed"].centroid == (11.5, 32.5, 33.5)
    assert (found["missed"].score, found["missed"].voxels) == (None, 4 * 6 * 8)
    assert (found["false positive"].predicted_ids, found["false positive"].score) == ((3,), 0.9)
    assert (found["split"].true_ids, found["split"].predicted_ids, found["split"].score) == ((4,), (4, 5), 0.5)
    assert (found["merged"].true_ids, found["merged"].predicted_ids) == ((5, 6), (6,))
    assert found["poor outline"].iou == pytest.approx(5 / 12)


def test_false_positives_where_nothing_is_annotated_are_none():
    assert {fault.kind for fault in faults(scene(ignored=True))} == set(KINDS) - {"mixed", "false positive"}


def test_without_truth_or_objects_there_are_no_faults():
    looked = scene()
    assert faults(LookedAt(name="v", image=looked.image, labels=looked.labels, table=looked.table)) == []
    empty = np.zeros(SHAPE, np.uint16)
    nothing = looked.table.iloc[:0]
    assert faults(LookedAt(name="v", image=empty, labels=empty, table=nothing, truth=empty)) == []


def test_the_gravest_come_first():
    truth, labels = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, np.uint32)
    block(truth, 1, (0, 2), (0, 3), (0, 3)), block(truth, 2, (0, 4), (10, 16), (0, 8))
    block(labels, 1, (0, 4), (0, 9), (20, 30)), block(labels, 2, (0, 2), (20, 23), (20, 23))
    table = pd.DataFrame({"id": [1, 2], "score": [0.5, 0.8]})
    found = faults(LookedAt(name="v", image=truth, labels=labels, table=table, truth=truth))
    assert [fault.true_ids for fault in found if fault.kind == "missed"] == [(2,), (1,)]
    assert [fault.predicted_ids for fault in found if fault.kind == "false positive"] == [(2,), (1,)]


def test_scores_and_hits_for_a_precision_recall_curve():
    scores, hits, num_truth = scored_matches([scene()])
    assert num_truth == 6
    assert scores.tolist() == [0.95, 0.9, 0.6, 0.5, 0.4, 0.3]
    assert hits[[0, 1, 2, 5]].tolist() == [True, False, True, False]
    assert hits[3:5].sum() == 1  # of two halves, each with an IoU of 0.5, one counts
    scores, hits, num_truth = scored_matches([])
    assert (len(scores), len(hits), num_truth) == (0, 0, 0)
