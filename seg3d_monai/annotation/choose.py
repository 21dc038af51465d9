"""The greedy choice among candidates: doubtful, unlike what is annotated or chosen, spread over specimens.

Unlikeness is that of the greedy k-centre algorithm (Gonzalez 1985), by which core-sets are chosen for active learning
(Sener and Savarese 2018): the distance of the features to the nearest centre, where all that is annotated, and then
each choice, is a centre. Alone it takes outliers, and doubt alone takes one place ten times, so each step takes the
candidate with the largest weighted sum of the two (a weighted k-centre, as Ramalingam et al. 2023 study it).

Must not know: voxels, volumes, networks.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.annotation.scores import standardised


@dataclass(frozen=True)
class Choice:
    """One choice.

    Args:
        candidate: its position.
        uncertainty: share of the candidates with less doubt, 0 to 1.
        unlikeness: distance to the nearest centre when it was chosen, over the longest one at the beginning, 0 to 1.
    """

    candidate: int
    uncertainty: float
    unlikeness: float


def choose(
    *,
    doubts: Sequence[float],
    features: NDArray[np.floating],
    centres: NDArray[np.floating],
    specimens: Sequence[str],
    number: int,
    conflict: Callable[[int, int], bool],
    unlike_weight: float = 0.5,
) -> list[Choice]:
    """Choose candidates one by one.

    A specimen gets at most twice its even share of the choices, as long as others have candidates left. Of equals the
    first is taken.

    Args:
        doubts: of each of N candidates, at least 0.
        features: [N, F].
        centres: [M, F], features of what is annotated; M may be 0, then all candidates are equally unlike at first.
        specimens: of each candidate.
        number: how many.
        conflict: whether two candidates, by their positions, must not both be chosen.
        unlike_weight: of unlikeness, 0 to 1; uncertainty has the rest.

    Returns:
        Choices in the order in which they were made; fewer than `number` where conflicts leave none.

    Raises:
        ValueError: the weight or the number is out of range.
    """
    if not 0.0 <= unlike_weight <= 1.0:
        raise ValueError(f"unlike_weight={unlike_weight} is not a weight; use a number from 0 to 1")
    if number < 1:
        raise ValueError(f"num={number} chooses nothing; use 1 or more")
    scaled, known = standardised(features, centres)
    uncertainty = np.searchsorted(np.sort(doubts), doubts, side="left") / max(1, len(doubts))
    distance = np.full(len(scaled), np.inf)
    for centre in known:
        distance = np.minimum(distance, np.linalg.norm(scaled - centre, axis=1))
    longest = _longest(distance)
    most = math.ceil(2 * number / max(1, len(set(specimens))))
    taken: Counter[str] = Counter()
    is_open = np.ones(len(scaled), bool)
    choices: list[Choice] = []
    while len(choices) < number and is_open.any():
        fair = is_open & np.array([taken[specimen] < most for specimen in specimens])
        eligible = fair if fair.any() else is_open
        unlikeness = np.ones(len(scaled)) if np.isinf(distance).all() else np.minimum(distance / longest, 1.0)
        value = (1 - unlike_weight) * uncertainty + unlike_weight * unlikeness
        best = int(np.argmax(np.where(eligible, value, -np.inf)))
        choices.append(Choice(best, float(uncertainty[best]), float(unlikeness[best])))
        taken[specimens[best]] += 1
        is_open &= [other != best and not conflict(best, other) for other in range(len(scaled))]
        distance = np.minimum(distance, np.linalg.norm(scaled - scaled[best], axis=1))
        if len(known) == 0 and len(choices) == 1:
            longest = _longest(distance)
    return choices


def _longest(distance: NDArray[np.float64]) -> float:
    """The longest finite distance, 1 where there is none above 0."""
    finite = distance[np.isfinite(distance)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0
