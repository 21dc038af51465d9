"""Regions of an atlas on a grid of its own, against a plain loop over voxels and by hand."""

from itertools import product

import numpy as np
import pytest
from measure_toys import BLOCK_SIZES, SHAPE, SPACING, crowded, measured, pictures

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import measure, regions


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_regions_by_a_plain_loop(tmp_path, monkeypatch, block_size):
    monkeypatch.setattr(measure, "_BLOCK_SIZE", block_size)
    monkeypatch.setattr(regions, "_PENDING_ROWS", 10)
    labels = crowded()
    atlas = np.random.default_rng(5).integers(0, 4, (6, 8, 9)) * 600_000_000
    own = (8.0, 5.0, 2.0)
    votes = {}
    for place in product(*map(range, SHAPE)):
        nearest = [
            min(int((p + 0.5) * s / a), n - 1) for p, s, a, n in zip(place, SPACING, own, atlas.shape, strict=True)
        ]
        votes.setdefault(labels[place], []).append(atlas[tuple(nearest)])
    table = measured(tmp_path, labels, pictures(), atlas=ArrayVolume(atlas, own))
    for row in table.to_dict("records"):
        names, counts = np.unique(votes[row["id"]], return_counts=True)
        assert row["region"] == names[counts.argmax()]
        assert row["region_share"] == counts.max() / counts.sum()


def test_regions_tie_to_the_lower_id_and_may_be_finer_than_the_stack(tmp_path):
    labels = np.array([1, 1, 2, 2, 0, 3], np.uint32).reshape(1, 1, 6)
    image = np.zeros((1, 1, 1, 6), np.uint8)
    coarse = ArrayVolume(np.array([9, 5, 4]).reshape(1, 1, 3), (1.0, 1.0, 2.1))
    table = measured(tmp_path, labels, image, spacing_um=(1.0, 1.0, 1.0), atlas=coarse)
    # centres 0.5 .. 5.5 um over the faces 2.1 and 4.2
    assert list(table["region"]) == [9, 5, 4]
    table = measured(tmp_path, np.array([1, 1, 1, 1, 2, 2]).reshape(1, 1, 6), image, (1.0, 1.0, 1.0), atlas=coarse)
    assert list(table["region"]) == [5, 4]
    assert list(table["region_share"]) == [0.5, 1]
    # a centre on a face between two fine voxels takes the lower
    fine = ArrayVolume(np.arange(12).reshape(1, 1, 12), (1.0, 1.0, 0.1))
    table = measured(tmp_path, np.arange(1, 7).reshape(1, 1, 6), image, (1.0, 1.0, 0.2), atlas=fine)
    assert list(table["region"]) == [0, 2, 4, 6, 8, 10]
