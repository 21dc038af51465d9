"""Stitching the synthetic specimen, whose truth is known: two grids of blocks give the same nuclei."""

import numpy as np
import pytest
from inference_toys import Perfect, same_partition

from seg3d_monai.data.synthetic import make_volume
from seg3d_monai.inference import predict_labels

GRIDS = [((16, 40, 36), (4, 9, 7)), ((11, 25, 50), (2, 5, 12))]


@pytest.fixture(scope="module")
def specimen() -> tuple[np.ndarray, np.ndarray]:
    return make_volume((40, 90, 104), seed=3)


@pytest.mark.parametrize(("block_size", "halo"), GRIDS)
def test_no_nucleus_is_cut_or_counted_twice(
    specimen: tuple[np.ndarray, np.ndarray], block_size: tuple[int, ...], halo: tuple[int, ...]
) -> None:
    image, truth = specimen
    assert truth.max() > 30
    labels, table = predict_labels(image, Perfect(truth.astype(np.int64)), block_size, halo)
    assert same_partition(labels, truth)
    assert len(table) == len(np.unique(truth)) - 1
