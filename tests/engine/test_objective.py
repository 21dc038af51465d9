"""Sums of metrics, read as text."""

import numpy as np
import pytest

from seg3d_monai.engine.objective import Objective
from seg3d_monai.metrics import InstanceMetrics


def report():
    """One of two objects is found exactly, the other to one half; a third prediction is false."""
    truth, prediction = np.array([1, 1, 2, 2, 0, 0]), np.array([1, 1, 2, 0, 0, 3])
    metrics = InstanceMetrics()
    metrics.update(truth, prediction)
    return metrics.compute()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("f1_50", 0.8),  # both match: 2 tp, 1 fp
        ("f1_55", 0.4),
        ("precision_50", 2 / 3),
        ("recall_50", 1.0),
        ("seg", 0.5),  # half is not more than half
        ("mucov", 0.5),
        ("f1_50 + seg", 1.3),
        (" f1_50+f1_55 +seg ", 1.7),
        ("seg + seg", 1.0),
    ],
)
def test_sums(text, value):
    assert Objective(text).of(report()) == pytest.approx(value)


def test_it_is_shown_as_it_is_meant():
    assert str(Objective("f1_50+seg")) == "f1_50 + seg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f1_51", r"metric='f1_51' holds 'f1_51', which is no metric; did you mean f1_\d\d\?"),
        ("seg + ", "metric='seg . ' holds '', which is no metric; choose from f1_10, .*, or a sum of these"),
        ("", "holds ''"),
        ("f1_50 - seg", "holds 'f1_50 - seg'"),
        ("__import__('os')", "choose from f1_10"),
        ("2", "holds '2'"),
    ],
)
def test_what_is_no_sum_of_metrics_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Objective(text)
