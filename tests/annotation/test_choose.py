"""The greedy choice against orders that were worked out by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from seg3d_monai.annotation.choose import Choice, choose


def order(
    doubts: Sequence[float],
    features: Sequence[float],
    centres: Sequence[float] = (),
    *,
    number: int = 99,
    weight: float = 0.5,
    specimens: Sequence[str] | None = None,
    conflicts: Sequence[tuple[int, int]] = (),
) -> list[Choice]:
    pairs = {frozenset(pair) for pair in conflicts}
    return choose(
        doubts=doubts,
        features=np.array(features, float).reshape(-1, 1),
        centres=np.array(centres, float).reshape(-1, 1),
        specimens=specimens or ["a"] * len(doubts),
        number=number,
        conflict=lambda a, b: frozenset((a, b)) in pairs,
        unlike_weight=weight,
    )


def test_k_centre_on_a_line() -> None:
    # From the centre 0: 10 is farthest; then 4, which is 4 from 0 and 6 from 10; then 2, and 9, which is 1 from 10.
    choices = order([0] * 5, [9, 2, 4, 10, 0], [0], weight=1.0)
    assert [choice.candidate for choice in choices] == [3, 2, 1, 0, 4]
    np.testing.assert_allclose([choice.unlikeness for choice in choices], [1, 0.4, 0.2, 0.1, 0])


def test_k_centre_in_the_plane_with_axes_of_unequal_spread() -> None:
    # The second axis is a hundred times as wide; by spread the corners of a square are alike.
    features = np.array([[0, 0], [1, 0], [0, 100], [1, 100], [0.5, 50]])
    choices = choose(
        doubts=[0] * 5,
        features=features,
        centres=features[:1],
        specimens=["a"] * 5,
        number=4,
        conflict=lambda a, b: False,
        unlike_weight=1.0,
    )
    assert [choice.candidate for choice in choices] == [3, 1, 2, 4]
    np.testing.assert_allclose([c.unlikeness for c in choices], [1, np.sqrt(0.5), np.sqrt(0.5), 0.5])


def test_doubt_alone() -> None:
    choices = order([1, 0, 3, 0], [0, 9, 9, 9], [0], weight=0.0)
    assert [choice.candidate for choice in choices] == [2, 0, 1, 3]
    assert [choice.uncertainty for choice in choices] == [0.75, 0.5, 0, 0]


def test_both_together() -> None:
    # uncertainty 0, 0.25, 0.5, 0.75; unlikeness 1, 0, 0.5, 0.2 at first: 0.5, 0.125, 0.5, 0.475, the first of equals.
    # Then distances to {0, 10}: 0 -> 0, 0, 5, 2: 0, 0.125, 0.5, 0.475. Then to 5 as well: 0, 0, 0, 2.
    choices = order([0, 1, 2, 3], [10, 0, 5, 2], [0])
    assert [choice.candidate for choice in choices] == [0, 2, 3, 1]
    assert [choice.uncertainty for choice in choices] == [0, 0.5, 0.75, 0.25]
    np.testing.assert_allclose([choice.unlikeness for choice in choices], [1, 0.5, 0.2, 0])


def test_without_anything_annotated_the_most_doubtful_is_first() -> None:
    choices = order([0, 5, 1], [0, 1, 9], number=2)
    assert [choice.candidate for choice in choices] == [1, 2]
    assert [choice.unlikeness for choice in choices] == [1, 1]  # 9 is the farthest from 1


def test_conflicts_are_left_out() -> None:
    choices = order([3, 2, 1], [0, 0, 0], weight=0.0, conflicts=[(0, 1)])
    assert [choice.candidate for choice in choices] == [0, 2]


def test_a_specimen_has_at_most_twice_its_even_share_while_others_are_left() -> None:
    # Of 3 choices over 3 specimens nobody gets more than 2.
    specimens = ["a", "a", "a", "b", "c"]
    found = [choice.candidate for choice in order([9, 8, 7, 2, 1], [0] * 5, weight=0.0, specimens=specimens, number=3)]
    assert found == [0, 1, 3]
    # Of 5, nobody more than 4; where nothing else is left the rest is taken all the same.
    found = [c.candidate for c in order([9, 8, 7, 6, 5], [0] * 5, weight=0.0, specimens=["a"] * 4 + ["b"], number=1)]
    assert found == [0]
    specimens = ["a"] * 5 + ["b"]
    found = [c.candidate for c in order([9, 8, 7, 6, 5, 1], [0] * 6, weight=0.0, specimens=specimens, number=4)]
    assert found == [0, 1, 2, 3]
    found = [c.candidate for c in order([9, 8, 7, 6, 5, 1], [0] * 6, weight=0.0, specimens=specimens, conflicts=[])]
    assert found == [0, 1, 2, 3, 4, 5]


def test_equal_features_and_one_candidate() -> None:
    assert [c.candidate for c in order([0, 0], [1, 1], [1])] == [0, 1]
    assert order([2], [3], [3]) == [Choice(0, 0.0, 0.0)]
    assert order([], [], [1]) == []


@pytest.mark.parametrize(("changes", "message"), [({"weight": 1.5}, "unlike_weight=1.5"), ({"number": 0}, "num=0")])
def test_wrong_arguments_are_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order([1], [1], **changes)  # type: ignore[arg-type]
