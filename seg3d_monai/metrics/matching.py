"""One-to-one matching of true and predicted objects at an IoU threshold, optimal and sparse.

As many pairs as possible, and of those matchings the one with the greatest sum of IoU. Above an IoU of 0.5 a pair has
no rival; at or below, objects compete (an object cut into two exact halves has IoU 0.5 with both). Only competing
objects are solved, each connected group by itself, with SciPy's assignment solvers.

It must not know images, ids or scores.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

MAX_DENSE_CELLS = 4_000_000


def match_instances(
    truth_index: np.ndarray, predicted_index: np.ndarray, iou: np.ndarray, threshold: float
) -> np.ndarray:
    """Choose the pairs that match.

    Args:
        truth_index: int [K], the true object of each overlapping pair; a pair occurs once.
        predicted_index: int [K], its predicted object.
        iou: float [K], in (0, 1].
        threshold: smallest IoU of a match, in (0, 1].

    Returns:
        int64 [M]: positions among the K pairs, ascending; no object occurs twice.

    Raises:
        ValueError: threshold is out of its range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    edges = np.flatnonzero(iou >= threshold)
    if len(edges) == 0:
        return edges
    truth, truth_edge = np.unique(truth_index[edges], return_inverse=True)
    predicted, predicted_edge = np.unique(predicted_index[edges], return_inverse=True)
    rivals = (np.bincount(truth_edge)[truth_edge] > 1) | (np.bincount(predicted_edge)[predicted_edge] > 1)
    chosen = [edges[~rivals]]
    contested = np.flatnonzero(rivals)
    if len(contested):
        nodes = len(truth) + len(predicted)
        graph = coo_array(
            (np.ones(len(contested)), (truth_edge[contested], len(truth) + predicted_edge[contested])),
            shape=(nodes, nodes),
        )
        _, group_of_node = connected_components(graph, directed=False)
        group = group_of_node[truth_edge[contested]]
        order = np.argsort(group, kind="stable")
        bounds = np.flatnonzero(np.diff(group[order])) + 1
        for members in np.split(contested[order], bounds):
            won = _assign(truth_edge[members], predicted_edge[members], iou[edges[members]])
            chosen.append(edges[members[won]])
    return np.sort(np.concatenate(chosen))


def _assign(rows: np.ndarray, columns: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """Positions of the matched edges of one connected group."""
    row_nodes, row = np.unique(rows, return_inverse=True)
    column_nodes, column = np.unique(columns, return_inverse=True)
    num_rows, num_columns = len(row_nodes), len(column_nodes)
    # One pair more always outweighs all the IoU that it may cost.
    gain = 1 + iou / (2 * min(num_rows, num_columns))
    if num_rows * num_columns <= MAX_DENSE_CELLS:
        gains = np.zeros((num_rows, num_columns))
        gains[row, column] = gain
        matched_row, matched_column = linear_sum_assignment(gains, maximize=True)
    else:
        # Each row may also take a column of its own at no gain, so a full matching exists.
        own = np.arange(num_rows)
        costs = csr_array(
            (
                np.concatenate([2 - gain, np.full(num_rows, 2.0)]),
                (np.concatenate([row, own]), np.concatenate([column, num_columns + own])),
            ),
            shape=(num_rows, num_columns + num_rows),
        )
        matched_row, matched_column = min_weight_full_bipartite_matching(costs)
    column_of_row = np.full(num_rows, -1)
    column_of_row[matched_row] = matched_column
    return np.flatnonzero(column_of_row[row] == column)
