"""An array that is sliced without being read agrees with NumPy."""

import numpy as np
import pytest

from seg3d_monai.viewing.lazy import LazyArray

ARRAY = np.arange(3 * 4 * 5 * 6, dtype=np.int32).reshape(3, 4, 5, 6)


def lazy(most_bytes=None, read_log=None):
    def read(time, roi):
        if read_log is not None:
            read_log.append((time, roi))
        z1, y1, x1, z2, y2, x2 = roi
        return ARRAY[time, z1:z2, y1:y2, x1:x2]

    return LazyArray(read, [range(n) for n in ARRAY.shape], ARRAY.dtype, most_bytes)


KEYS = [
    (),
    ...,
    1,
    -1,
    np.int64(2),
    slice(1, 3),
    (slice(None), 2),
    (..., 3),
    (1, ..., slice(None, None, 2)),
    (slice(None), slice(3, None, -1), slice(None, None, -2), 5),
    (0, 1, 2, 3),
    (slice(2, 2),),
    (slice(-2, None), slice(1, -1), slice(0, 100), slice(-3, -1)),
    np.array([2, 0]),
    (slice(None), [1, 3]),
    None,
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_it_agrees_with_numpy(key):
    part = lazy()[key]
    expected = ARRAY[key]
    assert part.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(part), expected)
    assert np.asarray(part).dtype == ARRAY.dtype


def test_parts_of_parts():
    part = lazy()[:, 1:][1, ::2][..., ::-1]
    expected = ARRAY[:, 1:][1, ::2][..., ::-1]
    assert (part.ndim, part.size, len(part)) == (expected.ndim, expected.size, len(expected))
    np.testing.assert_array_equal(part, expected)
    np.testing.assert_array_equal(np.asarray(part, dtype=np.float32), expected.astype(np.float32))


def test_nothing_is_read_but_the_box_of_what_is_left():
    log = []
    part = lazy(read_log=log)[2][1:3, ::2, 4]
    assert log == []
    np.asarray(part)
    assert log == [(2, (1, 0, 4, 3, 5, 5))]


def test_too_much_is_refused_before_it_is_read():
    log = []
    array = lazy(most_bytes=480, read_log=log)  # one time point
    np.asarray(array[1])
    with pytest.raises(ValueError, match="view a part with --roi"):
        np.asarray(array[:2])
    assert len(log) == 1


def test_indices_outside():
    with pytest.raises(IndexError):
        lazy()[3]
    with pytest.raises(IndexError, match="5 indices for an array of 4 axes"):
        lazy()[0, 0, 0, 0, 0]
