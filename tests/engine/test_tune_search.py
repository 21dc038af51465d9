"""The search on curves and functions whose best settings are known: plateaus, ties, noise, rounds."""

import pytest

from seg3d_monai.engine.tune_search import SCORE, Curve, choose_near, choose_score, search_settings

STEPS = [0.5, 0.6, 0.7, 0.8, 1.0]


def curve(values, upper=STEPS, lower=0.05):
    return Curve(lower=lower, upper=upper, values=values, num_objects=list(range(len(upper), 0, -1)))


@pytest.mark.parametrize(
    ("threshold", "step"), [(0.0, 0), (0.05, 0), (0.5, 0), (0.501, 1), (0.6, 1), (0.8, 3), (0.81, 4), (1.0, 4)]
)
def test_a_curve_is_a_step_function(threshold, step):
    assert curve([0] * 5).step_at(threshold) == step


@pytest.mark.parametrize(
    ("values", "start", "wanted"),
    [
        ([0.8, 1.0, 0.9, 0.7, 0.0], 0.9, 0.55),  # the middle between 0.5 and 0.6
        ([0.8, 1.0, 1.0, 0.7, 0.0], 0.9, 0.6),
        ([0.8, 1.0, 0.99, 0.7, 0.0], 0.9, 0.6),  # the tolerance is 0.01
        ([0.8, 1.0, 0.98, 0.7, 0.0], 0.9, 0.55),
        ([1.0, 0.8, 0.9, 0.7, 0.0], 0.9, 0.28),  # from the least threshold, 0.05, to 0.5, which is 0.275
        ([0.8, 1.0, 0.9, 0.7, 0.0], 0.58, 0.58),  # what there was is as good
        ([0.8, 1.0, 0.995, 0.7, 0.0], 0.7, 0.7),
        ([1.0, 0.8, 1.0, 0.7, 0.0], 0.9, 0.28),  # the wider stretch
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0.8, 0.8),
    ],
)
def test_the_middle_of_the_widest_good_stretch(values, start, wanted):
    assert choose_score(curve(values), start, tolerance=0.01) == wanted


def test_a_narrow_stretch_gets_as_many_digits_as_it_needs():
    found = choose_score(curve([0.5, 1.0, 0.0], upper=[0.99512, 0.9957, 1.0]), 0.5, tolerance=0.0)
    assert found == 0.9954
    low, high = 0.5, 0.5 + 1e-9
    found = choose_score(curve([0.5, 1.0, 0.0], upper=[low, high, 1.0]), 0.2, tolerance=0.0)
    assert low < found <= high


def test_a_single_step():
    assert choose_score(curve([0.0], upper=[1.0]), 0.8, tolerance=0.01) == 0.8


@pytest.mark.parametrize(
    ("values", "start", "wanted"),
    [
        ([0.5, 0.6, 0.7, 0.9], 20, 100),
        ([0.5, 0.6, 0.895, 0.9], 20, 50),  # as good as the best, and nearer
        ([0.9, 0.895, 0.9, 0.9], 20, 20),
        ([0.9, 0.6, 0.9, 0.6], 20, 10),  # equally near and good: the lower one
        ([0.895, 0.6, 0.9, 0.6], 20, 50),  # equally near: the better one
    ],
)
def test_of_what_is_as_good_the_nearest(values, start, wanted):
    assert choose_near([10, 20, 50, 100], values, start, tolerance=0.01) == wanted


class Valley:
    """Falls with the distance from the best settings, and by `noise` in every other curve."""

    def __init__(self, best, noise=0.0):
        self.best, self.noise, self.asked = best, noise, []

    def value(self, settings):
        return -sum(abs(settings[name] - best) for name, best in self.best.items())

    def curve(self, settings):
        self.asked.append({name: value for name, value in settings.items() if name != SCORE})
        upper = [place / 10 for place in range(1, 11)]
        less = self.noise if len(self.asked) % 2 else 0
        values = [self.value(settings | {SCORE: threshold - 0.05}) - less for threshold in upper]
        return curve(values, upper=upper, lower=0)


def test_all_settings_are_found_and_others_stay():
    judge = Valley({SCORE: 0.35, "a": 3, "b": 0})
    start = {SCORE: 0.9, "a": 1, "b": 2, "c": 7}
    found = search_settings(judge, start, {"a": [1, 2, 3, 4], "b": [0, 1]}, tolerance=0.01)
    assert found == {SCORE: 0.35, "a": 3, "b": 0, "c": 7}


def test_every_value_is_judged_with_the_threshold_that_suits_it():
    """With a = 1 all is well at a threshold of 0.35, but nothing is at 0.85, where the search begins."""

    class Split(Valley):
        def value(self, settings):
            return 1 - abs(settings[SCORE] - 0.35) if settings["a"] else 0.5 if settings[SCORE] > 0.8 else 0.0

    assert search_settings(Split({}), {SCORE: 0.85, "a": 0}, {"a": [0, 1]}, tolerance=0.01) == {SCORE: 0.35, "a": 1}


def test_settings_that_depend_on_each_other_take_rounds():
    class Slanted(Valley):
        def value(self, settings):
            return -abs(settings["a"] - 3) - 0.5 * abs(settings["b"] - settings["a"])

    start, candidates = {SCORE: 0.5, "a": 0, "b": 0}, {"b": [0, 1, 2, 3], "a": [0, 1, 2, 3]}
    once = search_settings(Slanted({}), start, candidates, tolerance=0.01, rounds=1)
    assert once == {SCORE: 0.5, "a": 3, "b": 0}
    assert search_settings(Slanted({}), start, candidates, tolerance=0.01) == {SCORE: 0.5, "a": 3, "b": 3}


def test_noise_moves_nothing():
    start = {SCORE: 0.35, "a": 3, "b": 0}
    judge = Valley(start, noise=0.009)
    assert search_settings(judge, start, {"a": [1, 2, 3, 4], "b": [0, 1]}, tolerance=0.01) == start


@pytest.mark.parametrize(("start", "rounds"), [(3, 1), (2, 2)])
def test_it_ends_once_nothing_changes(start, rounds):
    judge = Valley({SCORE: 0.35, "a": 3})
    search_settings(judge, {SCORE: 0.35, "a": start}, {"a": [2, 3]}, tolerance=0.01)
    assert judge.asked == [{"a": 2}, {"a": 3}] * rounds + [{"a": 3}]


def test_nothing_to_try_but_the_score():
    assert search_settings(Valley({SCORE: 0.35}), {SCORE: 0.9, "a": 5}, {}, tolerance=0.01) == {SCORE: 0.35, "a": 5}
