"""Balanced sampling: counts by hand, only eligible rows, no repeats, uniform."""

import pytest
import torch

from seg3d_monai.matching import sample_balanced


def matches(foreground, background, ignored):
    rows = torch.cat([torch.arange(foreground) * 3, torch.full((background,), -1), torch.full((ignored,), -2)])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("foreground", "background", "ignored", "wanted"),
    [
        (0, 0, 0, (0, 0)),
        (0, 0, 9, (0, 0)),
        (0, 50, 9, (0, 16)),
        (1, 50, 0, (1, 15)),
        (3, 5, 2, (3, 5)),
        (4, 50, 9, (4, 12)),
        (50, 50, 9, (4, 12)),
        (50, 3, 9, (4, 3)),
        (50, 0, 9, (4, 0)),
    ],
)
def test_counts(foreground, background, ignored, wanted):
    matched = matches(foreground, background, ignored)
    positive, negative = sample_balanced(matched, 16, 0.25)
    assert (len(positive), len(negative)) == wanted
    assert (matched[positive] >= 0).all()
    assert (matched[negative] == -1).all()
    for rows in (positive, negative):
        assert rows.dtype == torch.int64
        assert rows.tolist() == sorted(set(rows.tolist()))


def test_the_seed_decides():
    matched = matches(50, 50, 9)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(torch.cat(sample_balanced(matched, 16, 0.5)).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_every_eligible_row_is_equally_likely():
    torch.manual_seed(0)
    matched = matches(10, 20, 5)
    hits = torch.zeros(len(matched))
    for _ in range(2000):
        hits[torch.cat(sample_balanced(matched, 10, 0.5))] += 1
    # 5 of 10 and 5 of 20 rows: standard deviation below 23 draws in 2000.
    assert (hits[matched == -2] == 0).all()
    assert ((hits[matched >= 0] - 1000).abs() < 110).all()
    assert ((hits[matched == -1] - 500).abs() < 100).all()
